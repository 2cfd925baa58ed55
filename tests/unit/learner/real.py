"""Batches for the real learner on one rank with the tiny model, and what is asked of it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rlhf_cluster.config import LoRAConfig, ModelConfig
from rlhf_cluster.learner.worker import LearnerWorker
from rlhf_cluster.records import Controls, Pretraining, ReferencedRollouts, ScoredRollouts

EOS, COUNT = 258, 8
LONGEST = 13  # response tokens
MODEL = ModelConfig(source="tiny", dtype="float32", attention="eager")
Start = Callable[..., LearnerWorker]
CONTROLS = Controls(0.02)
NO_TEXT, NO_ADAPTERS = Pretraining.empty(), LoRAConfig()
TEXT = Pretraining.of({"token_ids": np.random.default_rng(9).integers(0, 256, (6, 12)).tolist()})


def rows(step: int = 0) -> ReferencedRollouts:
    """A batch of `COUNT` rollouts of different lengths, half of them ended."""
    rng = np.random.default_rng(step)
    responses = [rng.integers(0, 256, rng.integers(1, 14)).tolist() for _ in range(COUNT)]
    for response in responses[::2]:
        response[-1] = EOS
    noise = [rng.normal(-5.5, 0.3, len(response)).tolist() for response in responses]
    return ReferencedRollouts.of(
        {
            "prompt_id": [f"p{i}" for i in range(COUNT)],
            "prompt_ids": [rng.integers(0, 256, rng.integers(1, 10)).tolist() for _ in range(COUNT)],
            "step": [step] * COUNT,
            "sample_index": [0] * COUNT,
            "sample_id": [f"{step}/p{i}/0" for i in range(COUNT)],
            "seed": list(range(COUNT)),
            "response_ids": responses,
            "rollout_logprobs": noise,
            "weight_versions": [[step] * len(response) for response in responses],
            "finish_reason": ["stop" if response[-1] == EOS else "length" for response in responses],
            "temperature": [0.7] * COUNT,
            "incarnation": ["test"] * COUNT,
            "score": rng.normal(size=COUNT).tolist(),
            "failure": [""] * COUNT,
            "ref_logprobs": noise,
        }
    )


def with_column(batch: ReferencedRollouts, name: str, values: Any) -> ReferencedRollouts:
    place, field = batch.table.column_names.index(name), batch.table.schema.field(name)
    return ReferencedRollouts(batch.table.set_column(place, field, pa.array(values, field.type)))


def give(worker: LearnerWorker, batch: ScoredRollouts, order: list[int] | None = None, chunk: int = 3) -> None:
    """`begin`, then `add` in tables of `chunk` rows."""
    step = int(batch.step[0])
    worker.begin(step, batch.sample_id)
    arrived = batch.take(order or range(len(batch)))
    for first in range(0, len(arrived), chunk):
        part = arrived.slice(first, min(first + chunk, len(arrived)))
        worker.add(step, part, 0, len(part))


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("learner_s/")}


def weights(worker: LearnerWorker) -> dict[str, torch.Tensor]:
    return {
        f"{model}/{n}": t.clone()
        for model, engine in worker._models.engines.items()
        for n, t in engine.full_parameters()
    }


def distance(some: LearnerWorker, other: LearnerWorker) -> float:
    others = weights(other)
    return max(float((tensor - others[name]).abs().max()) for name, tensor in weights(some).items())


def updated(worker: LearnerWorker, controls: Controls = CONTROLS, step: int = 0) -> dict[str, float]:
    give(worker, rows(step))
    return dict(worker.update(step, controls).metrics)
