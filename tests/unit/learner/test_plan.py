"""Minibatches and owners are decided by the members alone."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cluster.learner.plan import BatchPlan, plan_batch

IDS = [f"0/p{i}/{j}" for i in range(8) for j in range(3)]


def flat(plan: BatchPlan) -> list[str]:
    return list(itertools.chain.from_iterable(plan.minibatches))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_order_of_arrival_and_number_of_ranks_change_no_minibatch(world: int, seed: int) -> None:
    expected = plan_batch(IDS, 6, 1, seed)
    arrived = [IDS[i] for i in np.random.default_rng(9).permutation(len(IDS))]
    plan = plan_batch(arrived, 6, world, seed)
    assert plan.minibatches == expected.minibatches
    assert plan == plan_batch(IDS, 6, world, seed)


def test_minibatches_part_the_members() -> None:
    plan = plan_batch(IDS, 6, 2, 0)
    assert [len(minibatch) for minibatch in plan.minibatches] == [6] * 4
    assert sorted(flat(plan)) == sorted(IDS)
    assert plan.minibatches != plan_batch(IDS, 6, 2, 1).minibatches  # the seed matters
    assert flat(plan) != sorted(IDS)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_minibatch_is_dealt_evenly(world: int) -> None:
    plan = plan_batch(IDS, 6, world, 0)
    for minibatch in plan.minibatches:
        assert Counter(plan.owners[sample_id] for sample_id in minibatch) == dict.fromkeys(range(world), 6 // world)


def test_a_short_batch_keeps_a_last_short_minibatch() -> None:
    plan = plan_batch(IDS[:20], 6, 2, 0)
    assert [len(minibatch) for minibatch in plan.minibatches] == [6, 6, 6, 2]
    assert plan.owners.keys() == set(IDS[:20])


def test_epochs_go_through_all_minibatches_in_seeded_orders() -> None:
    plan = plan_batch(IDS, 2, 1, 0)
    orders = plan.orders(3, seed=5)
    assert orders[0] == list(range(12))  # as planned: the permutation of the rows was a shuffle already
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert orders == plan.orders(3, seed=5) != plan.orders(3, seed=6)


def test_members_take_the_places_of_others_in_order_and_the_rest_falls_out() -> None:
    plan = plan_batch(IDS, 6, 2, 0)
    first, second, third = plan.minibatches[0][0], plan.minibatches[0][3], plan.minibatches[1][2]
    found = plan.replaced([first, third, second], ["new-1", "new-2"])
    assert [len(minibatch) for minibatch in found.minibatches][:2] == [5, 6]
    assert len(found.minibatches) == len(plan.minibatches)
    assert found.minibatches[0][0] == "new-1" and found.minibatches[1][2] == "new-2"
    assert found.owners["new-1"] == plan.owners[first] and found.owners["new-2"] == plan.owners[third]
    assert not {first, second, third} & found.owners.keys()
    untouched = [i for i in IDS if i not in (first, second, third)]
    assert all(found.owners[i] == plan.owners[i] for i in untouched)
    assert found.replaced([first, third, second], ["new-1", "new-2"]) == found  # repeated


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 5), st.integers(0, 99), st.data())
def test_replacing_any_members_moves_no_other(
    count: int, minibatch_size: int, world: int, seed: int, data: st.DataObject
) -> None:
    ids = [f"0/p{i}" for i in range(count)]
    plan = plan_batch(ids, minibatch_size, world, seed)
    gone = data.draw(st.lists(st.sampled_from([*ids, "0/never"]), unique=True))
    come = [f"0+1/q{i}" for i in range(data.draw(st.integers(0, len(gone))))]
    found = plan.replaced(gone, come)
    stayed = [sample_id for sample_id in ids if sample_id not in gone]
    arrived = come[: count - len(stayed)]
    assert sorted(flat(found)) == sorted(found.owners) == sorted([*stayed, *arrived])
    assert all(found.owners[sample_id] == plan.owners[sample_id] for sample_id in stayed)
    for before, after in zip(plan.minibatches, found.minibatches, strict=True):
        assert [i for i in after if i in stayed] == [i for i in before if i in stayed]
        assert len(after) <= len(before)
