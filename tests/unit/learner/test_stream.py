"""Gradients that are computed as groups arrive: the same step, up to rounding, as that of a batch that is whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from real import COUNT, TEXT, Start, distance, give, numbers, rows

from rlhf_cluster.config import (
    AdvantageConfig,
    GuardrailsConfig,
    KLConfig,
    LoRAConfig,
    OffPolicyConfig,
    PPOConfig,
    PTXConfig,
    RailConfig,
)
from rlhf_cluster.learner.worker import LearnerError, LearnerWorker
from rlhf_cluster.records import Controls, ReferencedRollouts

GROUP, GROUPS = 4, COUNT // 4
GRPO: dict[str, Any] = {
    "advantage": AdvantageConfig("grpo", whiten=False),
    "kl": KLConfig(coef=0.0),
    "minibatch_size": COUNT,
    "samples_per_prompt": GROUP,
}
ROUNDING = 2e-4  # of a weight, after a step of 1e-3: Adam makes much of gradients that are nearly 0


def groups(step: int = 0) -> ReferencedRollouts:
    """Two prompts, four responses to each."""
    batch = rows(step)
    prompts = [batch.prompt_ids[i - i % GROUP].tolist() for i in range(COUNT)]
    columns = {
        "prompt_id": [f"p{i // GROUP}" for i in range(COUNT)],
        "prompt_ids": prompts,
        "sample_index": [i % GROUP for i in range(COUNT)],
        "sample_id": [f"{step}/p{i // GROUP}/{i % GROUP}" for i in range(COUNT)],
    }
    table = batch.table
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    return ReferencedRollouts(table)


def whole(monkeypatch: pytest.MonkeyPatch, start: Start, **changed: Any) -> LearnerWorker:
    """A learner of the same configuration that evaluates a batch first and updates then."""
    with monkeypatch.context() as patch:
        patch.setattr(PPOConfig, "streams_gradients", property(lambda self: False))
        worker = start(**GRPO | changed)
        train(worker, Controls(0.0, kl_loss_coef=worker._ppo.kl.loss_coef))
        return worker


def gradient(worker: LearnerWorker) -> torch.Tensor:
    """Of the first step, as AdamW's first moment keeps it: all numbers of it."""
    return torch.cat([state["exp_avg"].flatten() for _, state in worker._models.policy.full_state()])


def apart(some: LearnerWorker, other: LearnerWorker) -> float:
    """How far two gradients are from each other, as a share of their length."""
    one, two = gradient(some), gradient(other)
    return float((one - two).norm() / two.norm())


def train(worker: LearnerWorker, controls: Controls, step: int = 0, order: list[int] | None = None) -> dict[str, float]:
    give(worker, groups(step), order, chunk=GROUP)
    return numbers(worker.update(step, controls).metrics)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"loss_mean": "response"},
        {"loss_mean": "constant"},
        {"advantage": AdvantageConfig("rloo", whiten=False)},
        {"advantage": AdvantageConfig("dr_grpo", whiten=False), "ratio": "response"},
        {"kl": KLConfig(coef=0.0, loss_coef=0.5)},
        {"entropy_coef": 0.3},
        {"off_policy": OffPolicyConfig(weights="token", mask="response_mean")},
        {"text": TEXT, "ptx": PTXConfig(coef=0.7, ratio=1, tokens=12)},
        {"tokens_per_micro_batch": 20},
        {"tokens_per_micro_batch": 4096},
        {"share_prompts": False},
        {"lora": LoRAConfig(rank=2)},
        {"stage": 1},
        {"stage": 2},
        {"stage": 3},
    ],
    ids=lambda changed: " ".join(changed) or "grpo",
)
def test_it_is_the_step_of_the_whole_batch(
    start: Start, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    streamed, other = start(**GRPO | changed), whole(monkeypatch, start, **changed)
    before = distance(streamed, other)
    controls = Controls(0.0, kl_loss_coef=streamed._ppo.kl.loss_coef)
    found, expected = train(streamed, controls), other._last.metrics
    assert streamed._ppo.streams_gradients and streamed._stream is not None and other._stream is None
    assert before > 5e-4 and distance(streamed, other) < ROUNDING and apart(streamed, other) < 1e-5
    assert found.keys() == numbers(dict(expected)).keys()
    assert found == pytest.approx(numbers(dict(expected)), rel=2e-4, abs=1e-5)


def test_arrival_changes_nothing_but_rounding(start: Start) -> None:
    one, other = (start(tokens_per_micro_batch=20, **GRPO) for _ in range(2))
    train(one, Controls(0.0))
    train(other, Controls(0.0), order=[*range(GROUP, COUNT), *range(GROUP)])
    assert apart(one, other) < 1e-5


def test_a_batch_that_runs_short_is_put_right_by_its_real_size(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the responses that were counted on are gone, so each counts for twice as much."""

    def short(worker: LearnerWorker) -> LearnerWorker:
        batch = groups()
        worker.begin(0, batch.sample_id)
        worker.add(0, batch.slice(0, GROUP), 0, GROUP)
        worker.replace(0, batch.sample_id[GROUP:], [])
        worker.update(0, Controls(0.0))
        return worker

    streamed = short(start(**GRPO))
    with monkeypatch.context() as patch:
        patch.setattr(PPOConfig, "streams_gradients", property(lambda self: False))
        other = short(start(**GRPO))
    assert apart(streamed, other) < 1e-5
    norm = numbers(dict(streamed._last.metrics))["actor/grad_norm"]
    assert norm == pytest.approx(other._last.metrics["actor/grad_norm"], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_update_that_is_not_to_learn_forgets_the_gradient(start: Start, stage: int) -> None:
    worker, untouched, other = (start(stage=stage, **GRPO) for _ in range(3))
    train(worker, Controls(0.0, learn=False))
    assert distance(worker, untouched) == 0.0
    for one in (worker, other):
        if one is other:
            one.begin(0, groups().sample_id)
            one._open.pop(0)
            one._version = 1
        train(one, Controls(0.0), step=1)
    assert distance(worker, untouched) > 5e-4 and distance(worker, other) < 1e-6


def test_what_a_policy_that_is_gone_said_is_forgotten(start: Start, tmp_path: Path) -> None:
    """Rows that came between an update and the way back to a checkpoint are computed anew, by what is loaded."""
    worker, other = (start(tokens_per_micro_batch=20, **GRPO) for _ in range(2))
    worker.save(str(tmp_path))
    train(worker, Controls(0.0))
    worker.publish(1, str(tmp_path / "store"))
    give(worker, groups(1), chunk=GROUP)
    assert worker._open[1].rows  # with a gradient of the policy that is about to go
    worker.load(str(tmp_path), 1)
    worker.update(1, Controls(0.0))
    other._version = 1
    train(other, Controls(0.0), step=1)
    assert distance(worker, other) < ROUNDING


def test_a_gradient_beyond_its_rail_moves_nothing(start: Start) -> None:
    worker, untouched = start(guardrails=GuardrailsConfig(grad_norm=RailConfig(1e-6, "skip")), **GRPO), start(**GRPO)
    found = train(worker, Controls(0.0))
    assert distance(worker, untouched) == 0.0 and found["actor/grad_norm"] > 1e-6


def test_a_member_whose_gradient_is_there_cannot_leave(start: Start) -> None:
    worker, batch = start(tokens_per_micro_batch=20, **GRPO), groups()
    worker.begin(0, batch.sample_id)
    worker.add(0, batch.slice(0, GROUP), 0, GROUP)
    with pytest.raises(LearnerError, match="members of batch 0 are to leave, but their gradient is computed already"):
        worker.replace(0, batch.sample_id[:1], [])


def test_rows_wait_until_they_fill_a_micro_batch(start: Start) -> None:
    worker, batch = start(tokens_per_micro_batch=4096, **GRPO), groups()
    worker.begin(0, batch.sample_id)
    worker.add(0, batch, 0, COUNT)
    assert not worker._open[0].rows
    worker.update(0, Controls(0.0))
    assert worker.add(0, batch, 0, COUNT) is None  # repeated, it changes nothing


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 2},
        {"minibatch_size": GROUP},
        {"advantage": AdvantageConfig("grpo", whiten=True)},
        {"advantage": AdvantageConfig("grpo", whiten=False, whiten_rewards=True)},
        {"advantage": AdvantageConfig("reinforce_plus_plus", whiten=False)},
        {"advantage": AdvantageConfig("gae", whiten=False)},
        {"kl": KLConfig(coef=0.1)},
        {"kl": KLConfig(kind="adaptive", coef=0.0, loss_coef=0.1)},
        {"score_norm": True},
    ],
    ids=lambda changed: " ".join(changed),
)
def test_what_waits_for_the_whole_batch_does_not_stream(changed: dict[str, Any]) -> None:
    cfg = PPOConfig(batch_size=COUNT, **GRPO)
    assert cfg.streams_gradients and not replace(cfg, **changed).streams_gradients
    assert replace(cfg, kl=KLConfig(kind="none", coef=0.0)).streams_gradients


def test_a_response_is_computed_as_if_it_stood_alone(start: Start) -> None:
    """Its own logprobs, whether or not the prompt is shared."""
    said = []
    for shares in (True, False):
        worker = start(share_prompts=shares, **GRPO)
        batch = groups()
        give(worker, batch, chunk=GROUP)
        worker._evaluate(worker._open[0])
        said.append(np.concatenate([worker._open[0].rows[sample_id].old_logprobs for sample_id in batch.sample_id]))
    alone = worker._models.evaluate(batch.prompt_ids, batch.response_ids, 0.7).logprobs
    for one in said:
        assert one == pytest.approx(np.concatenate(alone), abs=2e-5)


def test_with_a_critic_a_prompt_is_computed_once_too(start: Start) -> None:
    """Policy and critic, evaluation and gradients: the same update, of fewer tokens."""
    one, other = (start(1 << 12, share_prompts=shares) for shares in (True, False))
    batch = groups()
    for worker in (one, other):
        give(worker, batch)
    mine, theirs = (numbers(worker.update(0, Controls(0.02)).metrics) for worker in (one, other))
    assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-4)
    assert distance(one, other) < ROUNDING
    shared, apart = (
        sum(one.padded_tokens for one in worker._models.micro_batches(batch.prompt_ids, batch.response_ids))
        for worker in (one, other)
    )
    assert shared < apart
