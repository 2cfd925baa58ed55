"""The critic on one rank: what it says, how it learns, what it leaves. Without one, `NoCritic` stands in its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_cluster.algo.losses import value_loss
from rlhf_cluster.config import GuardrailsConfig, PPOConfig
from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.learner.experience import Experience
from rlhf_cluster.learner.statistics import Tally, explained_variance, tally_values
from rlhf_cluster.learner.step import guarded_step
from rlhf_cluster.models.batching import PackedBatch
from rlhf_cluster.models.lora import Adapters
from rlhf_cluster.models.score_head import ScalarHeadModel, save_scalar_head_model


class Critic:
    """A body with a scalar head under its own engine: the value before each response token."""

    def __init__(self, model: ScalarHeadModel, adapters: Adapters, engine: TrainEngine) -> None:
        self.config, self.engine, self._adapters = model.config, engine, adapters

    @property
    def engines(self) -> Mapping[str, TrainEngine]:
        return {"critic": self.engine}

    def values(self, batch: PackedBatch) -> list[np.ndarray]:
        """f32 [R] for each sequence of the micro-batch. A collective."""
        return batch.split(self.engine(*batch.value_arguments()))

    def gradient(
        self,
        batch: PackedBatch,
        old: torch.Tensor,
        returns: torch.Tensor,
        mask: torch.Tensor,
        tokens: float,
        cfg: PPOConfig,
        tally: Tally,
    ) -> None:
        """Of one micro-batch, whose minibatch has `tokens` over all ranks; the rest flat, [N]. A collective."""
        loss = value_loss(self.engine(*batch.value_arguments()), old, returns, mask, cfg.value_clip)
        self.engine.backward(cfg.value_coef * loss.loss_sum / tokens)
        count = float(mask.sum())
        tally.mean("critic/vf_loss", loss.loss_sum.detach(), count)
        tally.mean("critic/vf_clipfrac", loss.vf_clipfrac_sum, count)

    def step(self, rate: float, guardrails: GuardrailsConfig, tally: Tally) -> None:
        guarded_step(self.engine, rate, guardrails).tally(tally, "critic")
        tally.top("critic/lr", rate)

    def judged(self, experience: Experience, tally: Tally) -> Mapping[str, float]:
        """What its values were worth before the update. A collective."""
        tally_values(tally, experience)
        return {"critic/vf_explained_var": explained_variance(experience, self.engine.ranks)}

    def save(self, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        """A plain Hugging Face body with the head beside it. A collective."""
        weights = self._adapters.merged(self.engine.weights_on_rank_0())
        if self.engine.ranks.rank == 0:
            save_scalar_head_model(self.config, weights, tokenizer, directory, self.engine.dtype)


class NoCritic:
    """Advantages that need no values: nothing is computed, kept or saved."""

    engines: Mapping[str, TrainEngine] = {}

    def values(self, batch: PackedBatch) -> list[np.ndarray]:
        return [np.zeros(length, np.float32) for length in batch.response_lengths]

    def gradient(self, *_: object) -> None:
        """Nothing learns."""

    def step(self, rate: float, guardrails: GuardrailsConfig, tally: Tally) -> None:
        """Nothing moves."""

    def judged(self, experience: Experience, tally: Tally) -> Mapping[str, float]:
        return {}

    def save(self, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        """Nothing to keep."""
