"""What `rooms.py` promises, as checks that the fakes and the real rooms both pass. One coroutine per promise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rlhf_cluster.records import Controls, Members, RefLogprobs, Rollouts, ScoredRollouts, Scores
from rlhf_cluster.rooms import Generation, Learner, Reference, RewardModel

EOS = 258


def members(count: int = 6, step: int = 0, seed: int = 0) -> Members:
    """Prompts of bytes, of different lengths, with an answer column of their own."""
    rng = np.random.default_rng(seed)
    return Members.of(
        {
            "prompt_id": [f"p{i}" for i in range(count)],
            "prompt_ids": [rng.integers(32, 127, rng.integers(1, 12)).tolist() for _ in range(count)],
            "step": [step] * count,
            "sample_index": [0] * count,
            "sample_id": [f"{step}/p{i}/0" for i in range(count)],
            "seed": [1000 * step + i for i in range(count)],
            "answer": [str(i) for i in range(count)],
        }
    )


def rollouts(count: int = 6, step: int = 0) -> Rollouts:
    rng = np.random.default_rng(step)
    responses = [rng.integers(0, 256, rng.integers(1, 14)).tolist() for _ in range(count)]
    for response in responses[::2]:
        response[-1] = EOS
    return members(count, step).extend(
        Rollouts,
        {
            "response_ids": responses,
            "rollout_logprobs": [rng.normal(-5.5, 0.1, len(response)).tolist() for response in responses],
            "weight_versions": [[step] * len(response) for response in responses],
            "finish_reason": ["stop" if response[-1] == EOS else "length" for response in responses],
            "temperature": [1.0] * count,
            "incarnation": ["test"] * count,
        },
    )


def scored(step: int = 0) -> ScoredRollouts:
    return rollouts(step=step).extend(ScoredRollouts, {"score": [0.5 * i for i in range(6)], "failure": [""] * 6})


async def collected(generation: Generation, asked: Members) -> Rollouts:
    return Rollouts.concat([part async for part in generation.sample(asked)]).sort_by("sample_id")


# --- generation


async def every_member_is_answered_once(generation: Generation, max_tokens: int) -> None:
    asked = members()
    found = await collected(generation, asked)
    assert found.sample_id == asked.sample_id
    own = asked.table.column_names
    assert found.table.select(own).equals(asked.table.select(own))  # also the row's own columns
    for ids, logprobs, reason in zip(found.response_ids, found.rollout_logprobs, found.finish_reason, strict=True):
        assert 1 <= len(ids) <= max_tokens and EOS not in ids[:-1]
        assert (reason == "stop") == (ids[-1] == EOS)
        assert reason == "stop" or len(ids) == max_tokens
        assert np.isfinite(logprobs).all() and (logprobs <= 0).all()


async def a_seed_gives_its_response_in_any_company(generation: Generation) -> None:
    asked = members()
    whole = await collected(generation, asked)
    part = await collected(generation, asked.take([4, 1]))
    same = [row.tolist() for i, row in enumerate(whole.response_ids) if i in (1, 4)]
    assert [row.tolist() for row in part.response_ids] == same
    other = await collected(generation, members(step=7))
    assert [row.tolist() for row in other.response_ids] != [row.tolist() for row in whole.response_ids]


async def received_versions_stand_on_later_tokens(generation: Generation, versions: Sequence[int]) -> None:
    for version in versions:
        for _ in range(2):  # repeating one that was applied changes nothing
            await generation.receive(version)
        found = await collected(generation, members(2))
        assert {int(v) for row in found.weight_versions for v in row} == {version}


# --- reward model and reference


async def each_rollout_has_one_finite_score(reward: RewardModel) -> None:
    asked = rollouts()
    found = await reward.score(asked)
    assert type(found) is Scores
    assert sorted(found.sample_id) == asked.sample_id
    assert np.isfinite(found.score).all() and np.std(found.score) > 0


async def a_score_does_not_depend_on_company(reward: RewardModel) -> None:
    asked = rollouts()
    whole = await reward.score(asked)
    part = await reward.score(asked.take([5, 0, 2]))
    scores = dict(zip(whole.sample_id, whole.score.tolist(), strict=True))
    assert [scores[sample_id] for sample_id in part.sample_id] == pytest.approx(part.score.tolist(), abs=1e-5)


async def each_token_has_one_reference_logprob(reference: Reference) -> None:
    asked = rollouts()
    found = await reference.logprobs(asked)
    assert type(found) is RefLogprobs
    by_id = dict(zip(found.sample_id, found.ref_logprobs, strict=True))
    assert sorted(by_id) == asked.sample_id
    for sample_id, ids in zip(asked.sample_id, asked.response_ids, strict=True):
        assert len(by_id[sample_id]) == len(ids)
        assert np.isfinite(by_id[sample_id]).all() and (by_id[sample_id] <= 0).all()


async def a_reference_does_not_depend_on_company(reference: Reference) -> None:
    asked = rollouts()
    whole, part = await reference.logprobs(asked), await reference.logprobs(asked.take([5, 0, 2]))
    by_id = dict(zip(whole.sample_id, whole.ref_logprobs, strict=True))
    for sample_id, found in zip(part.sample_id, part.ref_logprobs, strict=True):
        np.testing.assert_allclose(found, by_id[sample_id], atol=1e-5)


# --- learner


async def take_in(learner: Learner, step: int) -> None:
    rows = scored(step)
    await learner.begin(step, rows.sample_id)
    await learner.add(step, rows.slice(0, 2))
    await learner.add(step, rows.slice(2, 6))


async def updates_count_the_versions(learner: Learner) -> None:
    for step in range(2):
        await take_in(learner, step)
        stats = await learner.update(step, Controls(0.02))
        assert (stats.step, stats.weight_version) == (step, step + 1)
        assert np.isfinite(list(stats.metrics.values())).all()
        assert "objective/kl" in stats.metrics  # what the loop's KL object is told
        await learner.publish(stats.weight_version)


async def two_batches_may_be_open(learner: Learner) -> None:
    await take_in(learner, 0)
    await take_in(learner, 1)
    assert [(await learner.update(step, Controls(0.02))).weight_version for step in range(2)] == [1, 2]


async def what_was_applied_may_be_repeated(learner: Learner) -> None:
    await take_in(learner, 0)
    await learner.begin(0, scored().sample_id)
    await learner.add(0, scored().slice(1, 4))
    first = await learner.update(0, Controls(0.02))
    assert await learner.update(0, Controls(0.02)) == first
    await learner.publish(1)
    await learner.publish(1)


async def verbs_out_of_turn_are_refused(learner: Learner) -> None:
    with pytest.raises(RuntimeError, match="rows of batch 3 arrived"):
        await learner.add(3, scored(3))
    with pytest.raises(RuntimeError, match="update of batch 3"):
        await learner.update(3, Controls(0.02))


async def a_checkpoint_has_its_three_parts(learner: Learner, directory: Path) -> None:
    await take_in(learner, 0)
    await learner.update(0, Controls(0.02))
    await learner.save(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["critic", "policy", "state"]
    assert all(any(part.iterdir()) for part in directory.iterdir())


async def members_may_be_replaced(learner: Learner) -> None:
    """One that was evaluated already, one that never came; the third place stays empty."""
    rows = scored()
    names = rows.sample_id
    await learner.begin(0, names)
    await learner.add(0, rows.slice(0, 3))
    others = rows.table.slice(3, 1).drop_columns(["sample_id"]).append_column("sample_id", [["0+1/q/0"]])
    newcomer = ScoredRollouts(others)
    for _ in range(2):  # repeating it changes nothing
        await learner.replace(0, [names[0], names[4], names[5]], newcomer.sample_id)
    await learner.add(0, newcomer)
    await learner.add(0, rows.slice(3, 4))
    stats = await learner.update(0, Controls(0.02))
    assert stats.metrics["critic/score/mean"] == pytest.approx(np.mean([0.5, 1.0, 1.5, 1.5]))
    with pytest.raises(RuntimeError, match="members of batch 7 are to change"):
        await learner.replace(7, [names[0]], [])
