"""The model of an iteration by hand, and the best split of what there is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cluster.planning.split import Machines, Work, best, seconds

WORK = Work(generation=12.0, reward=2.0, reference=1.0, evaluation=4.0, update=6.0, publish=1.0)
ROLES = {"generation": 2, "reward": 1, "reference": 1, "learner": 2}
COSTS = dict.fromkeys(ROLES, 1.0)
GPUS = Machines(8, COSTS, own=True)
works = st.builds(Work, *[st.floats(0.1, 50)] * 5, st.floats(0, 2))


def test_synchronous_by_hand() -> None:
    """Sampling, 12 / 2, is longest of what goes side by side; then the update, 6 / 2, and the publish."""
    assert seconds(WORK, ROLES, GPUS, asynchronous=False) == 6 + 3 + 1


def test_asynchronous_by_hand() -> None:
    """Both take six seconds: 12 / 2, and 4 / 2 + 6 / 2 + 1."""
    assert seconds(WORK, ROLES, GPUS, asynchronous=True) == 6
    assert seconds(WORK, ROLES | {"generation": 3}, GPUS, asynchronous=True) == 6


def test_cores_that_are_shared_bound_what_overlaps() -> None:
    """25 seconds of computing on two cores take 12.5 at least, in whatever order."""
    two = Machines(2, COSTS, own=False)
    assert seconds(WORK, ROLES, two, asynchronous=True) == 25 / 2
    assert seconds(WORK, ROLES, two, asynchronous=False) == (12 + 2 + 1 + 4) / 2 + 3 + 1


def test_gpus_go_where_they_are_missing() -> None:
    found = best(WORK, ROLES, GPUS, asynchronous=True)
    assert found.seconds == pytest.approx(10 / 3 + 1) and found.workers == {**ROLES, "generation": 3, "learner": 3}
    assert sum(found.workers.values()) <= 8
    assert best(WORK, ROLES, Machines(4, COSTS, own=True), asynchronous=True).seconds < 12


def test_a_role_that_is_not_there_is_left_out() -> None:
    found = best(WORK, {"generation": 1, "learner": 1}, Machines(4, COSTS, own=True), asynchronous=False)
    assert set(found.workers) == {"generation", "learner"}


@given(works, st.booleans(), st.booleans(), st.integers(4, 9))
def test_the_best_is_never_worse_than_what_there_is(work: Work, late: bool, own: bool, amount: int) -> None:
    machines = Machines(amount, COSTS, own)
    found = best(work, ROLES, machines, late)
    assert found.seconds <= seconds(work, ROLES, machines, late) + 1e-6
    assert found.seconds == seconds(work, found.workers, machines, late)
    if found.workers != ROLES:
        assert (sum if own else max)(found.workers.values()) <= amount


@given(works, st.booleans())
def test_asynchronous_is_never_slower_where_gpus_are_their_own(work: Work, more: bool) -> None:
    machines = Machines(6 + 6 * more, COSTS, own=True)
    assert seconds(work, ROLES, machines, True) <= seconds(work, ROLES, machines, False) + 1e-9


def test_ranks_divide_a_minibatch() -> None:
    """Three would be better than two, and eight responses cannot be dealt out to three."""
    found = best(WORK, ROLES, GPUS, asynchronous=True, minibatch_size=8)
    assert found.workers["learner"] in (1, 2, 4)


def test_many_cores_are_looked_at_in_a_moment() -> None:
    """A few dozen numbers for each role, not all of a thousand."""
    found = best(WORK, ROLES, Machines(1000, COSTS, own=False), asynchronous=True)
    assert found.seconds < 2.5
