"""What reference and reward model say of a response does not depend on what else they are shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_cluster.config import RewardConfig
from rlhf_cluster.models.batching import Layout
from rlhf_cluster.models.score_head import ScalarHeadModel
from rlhf_cluster.models.tokenizer import load_tokenizer
from rlhf_cluster.records import Rollouts
from rlhf_cluster.reference.worker import ReferenceWorker
from rlhf_cluster.scoring.worker import RewardWorker, ScorerInputs

LIMIT = 40  # tokens of a micro-batch: two or three of the responses below fit behind their prompt


def rollouts() -> Rollouts:
    """Four responses to each of three prompts, of which every one is another in length."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 256, 6 + i).astype(np.int32) for i in range(3)]
    responses = [rng.integers(0, 256, 2 + i).astype(np.int32) for i in range(12)]
    return Rollouts.of(
        {
            "prompt_id": [f"p{i % 3}" for i in range(12)],
            "prompt_ids": [prompts[i % 3] for i in range(12)],
            "step": [0] * 12,
            "sample_index": [i // 3 for i in range(12)],
            "sample_id": [f"0/p{i % 3}/{i // 3}" for i in range(12)],
            "seed": list(range(12)),
            "response_ids": responses,
            "rollout_logprobs": [np.zeros(len(ids), np.float32) for ids in responses],
            "weight_versions": [np.zeros(len(ids), np.int32) for ids in responses],
            "finish_reason": ["stop"] * 12,
            "temperature": [0.7] * 12,
            "incarnation": ["test"] * 12,
        }
    )


def of_reference(tiny: Path, tmp_path: Path) -> Callable[[Rollouts], list[np.ndarray]]:
    worker = ReferenceWorker(str(tiny), "float32", "eager", LIMIT)
    return lambda rows: list(worker.logprobs(rows).ref_logprobs)


def of_reward_model(tiny: Path, tmp_path: Path) -> Callable[[Rollouts], list[np.ndarray]]:
    model = ScalarHeadModel.from_policy(tiny, torch.float32, "eager", seed=7)
    model.save(tmp_path, load_tokenizer(tiny), torch.float32)
    inputs = ScorerInputs(str(tmp_path), "", "float32", "eager", 0, 60.0)
    worker = RewardWorker(RewardConfig(tokens_per_micro_batch=LIMIT), inputs)
    return lambda rows: list(worker.score(rows).score)


@pytest.mark.parametrize("make", [of_reference, of_reward_model])
def test_responses_to_one_prompt_are_judged_as_each_alone(
    make: Callable[[Path, Path], Callable[[Rollouts], list[np.ndarray]]], tiny: Path, tmp_path: Path
) -> None:
    rows, judge = rollouts(), make(tiny, tmp_path)
    together, alone = judge(rows), [judge(rows.slice(i, i + 1))[0] for i in range(len(rows))]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert len(np.unique(np.round([np.sum(one) for one in together], 3))) == len(rows)


def test_a_prompt_is_computed_once_for_as_many_responses_as_fit() -> None:
    ids = rollouts().prompt_ids, rollouts().response_ids
    layouts = Layout(LIMIT, LIMIT), Layout(LIMIT, 0)
    shared, apart = (sum(b.padded_tokens for b in one.batches(*ids, one.rows(*ids))) for one in layouts)
    assert shared < 0.9 * apart
