"""Evaluated rows from lists, gangs of threads, and the real learner on one rank with the tiny model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real import COUNT, LONGEST, MODEL, NO_ADAPTERS, NO_TEXT, Start

from rlhf_cluster.config import EngineConfig, GenerationConfig, LearnerConfig, LoRAConfig, OptimizerConfig, PPOConfig
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.learner.experience import EvaluatedRow
from rlhf_cluster.learner.worker import LearnerWorker
from rlhf_cluster.models.score_head import ScalarHeadModel
from rlhf_cluster.models.tokenizer import load_tokenizer
from rlhf_cluster.records import Pretraining

DEADLINE_S = 20


@dataclass
class Table:
    """Where the threads of a gang lay down what they bring to a collective."""

    barrier: threading.Barrier
    items: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """A rank that is a thread: the same collectives, without processes."""

    table: Table

    def gather(self, item: Any) -> list[Any]:
        self.table.items[self.rank] = item
        self.table.barrier.wait(DEADLINE_S)
        items = [self.table.items[rank] for rank in range(self.world)]
        self.table.barrier.wait(DEADLINE_S)
        return items

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather(values.clone())).sum(0)

    def max(self, value: float) -> float:
        return max(self.gather(value))


@pytest.fixture
def on_ranks() -> Callable[[int, Callable[[Ranks], Any]], list[Any]]:
    """Runs `work(ranks)` on every rank of a gang; the results in rank order."""

    def run(world: int, work: Callable[[Ranks], Any]) -> list[Any]:
        table = Table(threading.Barrier(world))
        with ThreadPoolExecutor(world) as threads:
            return list(threads.map(work, [ThreadRanks(rank, world, table) for rank in range(world)]))

    return run


@pytest.fixture
def row() -> Callable[..., EvaluatedRow]:
    """An evaluated row from lists; what is not said is 0."""

    def make(
        sample_id: str, old: Sequence[float], ref: Sequence[float], values: Sequence[float], **said: Any
    ) -> EvaluatedRow:
        zeros = np.zeros(len(old), np.float32)
        fields: dict[str, Any] = {
            "prompt_id": "p",
            "prompt_ids": np.array([1, 2], np.int32),
            "response_ids": np.arange(len(old), dtype=np.int32),
            "rollout_logprobs": np.array(old, np.float32),
            "entropies": zeros,
            "weight_versions": zeros.astype(np.int32),
            "score": 0.0,
            "ended": True,
        }
        per_token = {"ref_logprobs": ref, "old_logprobs": old, "values": values}
        fields |= {name: np.array(given, np.float32) for name, given in per_token.items()}
        return EvaluatedRow(sample_id=sample_id, **(fields | said))

    return make


@pytest.fixture(scope="session")
def reward_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward_model")
    model = ScalarHeadModel.from_policy(tiny, torch.float32, "eager", seed=7)
    with torch.no_grad():
        model.score.bias.fill_(0.25)
    model.save(path, load_tokenizer(tiny), torch.float32)
    return path


@pytest.fixture
def start(tiny: Path, reward_model: Path, one_rank: Ranks, free_port: int) -> Start:
    """A learner as the run starts it. All live in this process's gang of one."""

    def make(
        tokens_per_micro_batch: int = 64,
        minibatch_size: int = 4,
        text: Pretraining = NO_TEXT,
        lora: LoRAConfig = NO_ADAPTERS,
        stage: int = 0,
        packing: bool = False,
        critic: Path = reward_model,
        **changed: Any,
    ) -> LearnerWorker:
        rate = OptimizerConfig(lr=1e-3, max_grad_norm=0.0)
        engine = EngineConfig(zero_stage=stage, tokens_per_micro_batch=tokens_per_micro_batch)
        cfg = LearnerConfig(rate, rate, packing, lora, engine)
        ppo = PPOConfig(batch_size=COUNT, minibatch_size=minibatch_size, **changed)
        worker = LearnerWorker(cfg, ppo, MODEL, GenerationConfig(temperature=0.7, max_response_tokens=LONGEST), seed=5)
        worker.start(0, 1, ("127.0.0.1", free_port), 60, tiny, critic, text)
        return worker

    return make
