"""One suite per Protocol of `rooms.py`, against the fakes of the loop's tests and against the real rooms in process.

The real generation worker, which needs vLLM, keeps the same laws in `tests/cluster/test_generation.py`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import laws
import pytest
from fakes import FakeGeneration, FakeLearner, FakeReference, FakeReward, shuffled

from rlhf_cluster.rooms import Generation, Learner, Reference, RewardModel


@pytest.fixture
def fake_generation() -> Generation:
    return FakeGeneration(order=shuffled(1), chunk=4)


@pytest.fixture
def fake_reward() -> RewardModel:
    return FakeReward()


@pytest.fixture
def fake_reference() -> Reference:
    return FakeReference()


@pytest.fixture
def fake_learner() -> Learner:
    return FakeLearner()


generations = pytest.mark.parametrize("room", ["fake_generation"], indirect=True)
rewards = pytest.mark.parametrize("room", ["fake_reward", "random_reward", "real_reward"], indirect=True)
references = pytest.mark.parametrize("room", ["fake_reference", "real_reference"], indirect=True)
learners = pytest.mark.parametrize("room", ["fake_learner", "real_learner"], indirect=True)


@generations
def test_generation_answers_every_member_once(room: Generation) -> None:
    asyncio.run(laws.every_member_is_answered_once(room, max_tokens=6))


@generations
def test_generation_gives_a_seed_its_response_in_any_company(room: Generation) -> None:
    asyncio.run(laws.a_seed_gives_its_response_in_any_company(room))


@generations
def test_generation_marks_tokens_with_the_version_received(room: Generation) -> None:
    asyncio.run(laws.received_versions_stand_on_later_tokens(room, [1, 2, 7]))


@rewards
def test_reward_scores_each_rollout_once(room: RewardModel) -> None:
    asyncio.run(laws.each_rollout_has_one_finite_score(room))


@rewards
def test_reward_does_not_depend_on_company(room: RewardModel) -> None:
    asyncio.run(laws.a_score_does_not_depend_on_company(room))


@rewards
def test_reward_says_nothing_of_failure_where_there_is_none(room: RewardModel) -> None:
    assert not any(asyncio.run(room.score(laws.rollouts())).failure)


@references
def test_reference_speaks_of_each_token(room: Reference) -> None:
    asyncio.run(laws.each_token_has_one_reference_logprob(room))


@references
def test_reference_does_not_depend_on_company(room: Reference) -> None:
    asyncio.run(laws.a_reference_does_not_depend_on_company(room))


@learners
def test_learner_counts_the_versions(room: Learner) -> None:
    asyncio.run(laws.updates_count_the_versions(room))


@learners
def test_learner_holds_two_open_batches(room: Learner) -> None:
    asyncio.run(laws.two_batches_may_be_open(room))


@learners
def test_learner_takes_repeated_calls(room: Learner) -> None:
    asyncio.run(laws.what_was_applied_may_be_repeated(room))


@learners
def test_learner_takes_other_members(room: Learner) -> None:
    asyncio.run(laws.members_may_be_replaced(room))


@learners
def test_learner_refuses_verbs_out_of_turn(room: Learner) -> None:
    asyncio.run(laws.verbs_out_of_turn_are_refused(room))


@learners
def test_learner_leaves_a_checkpoint(room: Learner, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    asyncio.run(laws.a_checkpoint_has_its_three_parts(room, tmp_path / "checkpoint"))
