"""One reward worker around one scorer, chosen once from the config."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import xxhash

from rlhf_cluster.config import RewardConfig
from rlhf_cluster.models.batching import in_order, micro_batches, singles
from rlhf_cluster.models.load import resolve_attention, resolve_dtype
from rlhf_cluster.models.score_head import ScalarHeadModel
from rlhf_cluster.records import Rollouts, Scores


class Scorer(Protocol):
    """f32 [B], one finite score per rollout."""

    def __call__(self, rollouts: Rollouts) -> np.ndarray: ...


class ModelScorer:
    """A reward model: the scalar at the true last token of prompt and response (InstructGPT section 3.5)."""

    def __init__(self, path: str, dtype: str, attention: str, tokens_per_micro_batch: int) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = ScalarHeadModel.from_directory(Path(path), resolve_dtype(dtype), resolve_attention(attention))
        self._model = model.to(self._device)
        self._tokens_per_micro_batch = tokens_per_micro_batch

    @torch.no_grad()
    def __call__(self, rollouts: Rollouts) -> np.ndarray:
        batches = micro_batches(
            rollouts.prompt_ids, rollouts.response_ids, singles(len(rollouts)), self._tokens_per_micro_batch
        )
        parts = [list(self._model(*b.to(self._device).score_arguments()).float().cpu().numpy()) for b in batches]
        return np.array(in_order(batches, parts, len(rollouts)), np.float32)


class RandomScorer:
    """Standard normal noise from the sample's id: a control that must teach nothing, the same on every worker."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, rollouts: Rollouts) -> np.ndarray:
        seeds = [xxhash.xxh3_64_intdigest(sample_id.encode(), self._seed) for sample_id in rollouts.sample_id]
        return np.array([np.random.default_rng(seed).standard_normal() for seed in seeds], np.float32)


def make_scorer(cfg: RewardConfig, path: str, dtype: str, attention: str, seed: int) -> Scorer:
    if cfg.kind == "random":
        return RandomScorer(seed)
    return ModelScorer(path, dtype, attention, cfg.tokens_per_micro_batch)


class RewardWorker:
    """Scores what it is sent. Raises ValueError, naming the samples, where a score is not finite."""

    def __init__(self, cfg: RewardConfig, path: str, dtype: str, attention: str, seed: int) -> None:
        self._scorer = make_scorer(cfg, path, dtype, attention, seed)

    def score(self, rollouts: Rollouts) -> Scores:
        scores = self._scorer(rollouts)
        bad = [i for i, ok in zip(rollouts.sample_id, np.isfinite(scores), strict=True) if not ok]
        if bad:
            raise ValueError(f"the reward gave no finite score for {len(bad)} of {len(scores)} samples, first {bad[0]}")
        return Scores.of({"sample_id": rollouts.sample_id, "score": scores.tolist()})
