"""What the workers of each role are made with, from a run's configuration: the same wherever they live, in actors of a
cluster or in bare processes of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_cluster.config import RunConfig, reward_budget_s
from rlhf_cluster.scoring.worker import ScorerInputs, from_here

Arguments = tuple[Any, ...]


def of_generation(cfg: RunConfig, policy: Path, incarnation: str, adapter_rank: int = 0) -> Arguments:
    """Of a `GenerationWorker`."""
    return (
        *(str(policy), cfg.generation, cfg.weights),
        *(cfg.model.context, cfg.model.dtype, incarnation, adapter_rank),
    )


def of_reward(cfg: RunConfig, policy: Path, reward_model: Path | None) -> Arguments:
    """Of a `RewardWorker`. `policy`: whose tokens are read; `reward_model`: stage 2's, where there is one."""
    model, budget = cfg.model, reward_budget_s(cfg)
    computing = (model.dtype, model.attention, cfg.seed)
    inputs = ScorerInputs(str(reward_model), str(policy), *computing, budget, model.chat_template)
    return from_here(cfg.reward), inputs


def of_reference(cfg: RunConfig, policy: Path) -> Arguments:
    """Of a `ReferenceWorker`."""
    return str(policy), cfg.model.dtype, cfg.model.attention, cfg.reference.tokens_per_micro_batch


def of_learner(cfg: RunConfig) -> Arguments:
    """Of a `LearnerWorker`."""
    return cfg.learner, cfg.ppo, cfg.model, cfg.generation, cfg.seed
