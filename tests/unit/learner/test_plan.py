"""Minibatches are decided by the members alone, and ranks by the lengths of what comes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cluster.learner.plan import BatchPlan, Deal, plan_batch
from rlhf_cluster.records import Rollouts

IDS = [f"0/p{i}/{j}" for i in range(8) for j in range(3)]


def flat(plan: BatchPlan) -> list[str]:
    return list(itertools.chain.from_iterable(plan.minibatches))


@pytest.mark.parametrize("seed", [0, 1])
def test_order_of_arrival_changes_no_minibatch(seed: int) -> None:
    arrived = [IDS[i] for i in np.random.default_rng(9).permutation(len(IDS))]
    assert plan_batch(arrived, 6, seed) == plan_batch(IDS, 6, seed)


def test_minibatches_part_the_members() -> None:
    plan = plan_batch(IDS, 6, 0)
    assert [len(minibatch) for minibatch in plan.minibatches] == [6] * 4
    assert sorted(flat(plan)) == sorted(IDS)
    assert plan.minibatches != plan_batch(IDS, 6, 1).minibatches  # the seed matters
    assert flat(plan) != sorted(IDS)
    assert all(sample_id in plan.minibatches[place] for sample_id, place in plan.places.items())


def test_a_short_batch_keeps_a_last_short_minibatch() -> None:
    plan = plan_batch(IDS[:20], 6, 0)
    assert [len(minibatch) for minibatch in plan.minibatches] == [6, 6, 6, 2]
    assert plan.places.keys() == set(IDS[:20])


def test_epochs_go_through_all_minibatches_in_seeded_orders() -> None:
    plan = plan_batch(IDS, 2, 0)
    orders = plan.orders(3, seed=5)
    assert orders[0] == list(range(12))  # as planned: the permutation of the rows was a shuffle already
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert orders == plan.orders(3, seed=5) != plan.orders(3, seed=6)


def test_members_take_the_places_of_others_in_order_and_the_rest_falls_out() -> None:
    plan = plan_batch(IDS, 6, 0)
    first, second, third = plan.minibatches[0][0], plan.minibatches[0][3], plan.minibatches[1][2]
    found = plan.replaced([first, third, second], ["new-1", "new-2"])
    assert [len(minibatch) for minibatch in found.minibatches][:2] == [5, 6]
    assert len(found.minibatches) == len(plan.minibatches)
    assert found.minibatches[0][0] == "new-1" and found.minibatches[1][2] == "new-2"
    assert not {first, second, third} & found.places.keys()
    assert found.replaced([first, third, second], ["new-1", "new-2"]) == found  # repeated


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 99), st.data())
def test_replacing_any_members_moves_no_other(count: int, minibatch_size: int, seed: int, data: st.DataObject) -> None:
    ids = [f"0/p{i}" for i in range(count)]
    gone = data.draw(st.lists(st.sampled_from(ids), unique=True))
    arrived = [f"0.0/q{i}" for i in range(data.draw(st.integers(0, len(gone))))]
    plan = plan_batch(ids, minibatch_size, seed)
    found = plan.replaced(gone, arrived)
    stayed = [sample_id for sample_id in ids if sample_id not in gone]
    assert sorted(flat(found)) == sorted(found.places) == sorted([*stayed, *arrived])
    assert all(found.places[sample_id] == plan.places[sample_id] for sample_id in stayed)


def rows(lengths: list[int], of_a_prompt: int = 1) -> Rollouts:
    """Responses of these lengths, `of_a_prompt` neighbours to each prompt of 5 tokens."""
    count = len(lengths)
    tokens = [np.zeros(length, np.int32) for length in lengths]
    return Rollouts.of(
        {
            "prompt_id": [f"p{i // of_a_prompt}" for i in range(count)],
            "prompt_ids": [[1] * 5] * count,
            "step": [0] * count,
            "sample_index": [i % of_a_prompt for i in range(count)],
            "sample_id": [f"s{i}" for i in range(count)],
            "seed": [0] * count,
            "response_ids": tokens,
            "rollout_logprobs": [one.astype(np.float32) for one in tokens],
            "weight_versions": tokens,
            "finish_reason": ["stop"] * count,
            "temperature": [1.0] * count,
            "incarnation": ["test"] * count,
        }
    )


def places(count: int, minibatch_size: int) -> dict[str, int]:
    return {f"s{i}": i // minibatch_size for i in range(count)}


def test_the_longest_goes_to_whoever_has_the_least_by_hand() -> None:
    """With the prompt's 5 tokens: 15 | 13 | 8 + 6 | the next table's 7 and 6 to those with 13 and 14."""
    deal = Deal(places(6, 6), 3)
    assert deal.owners(rows([8, 10, 1, 3]).slice(0, 4)).tolist() == [1, 0, 2, 2]
    later = rows([0, 0, 0, 0, 1, 2]).slice(4, 6)
    assert deal.owners(later).tolist() == [2, 1]


def test_each_minibatch_is_balanced_for_itself() -> None:
    lengths = [40, 40, 1, 1, 1, 1, 40, 40]
    owners = Deal(places(8, 4), 2).owners(rows(lengths))
    for minibatch in (slice(0, 4), slice(4, 8)):
        of_ranks = [sum(np.array(lengths)[minibatch][owners[minibatch] == rank]) for rank in (0, 1)]
        assert of_ranks == [41, 41]


def test_responses_to_a_prompt_stay_together_as_far_as_every_rank_gets_its_rows() -> None:
    owners = Deal(places(8, 8), 2).owners(rows([3] * 8, of_a_prompt=4))
    assert owners.tolist() in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)
    one_prompt = Deal(places(8, 8), 4).owners(rows([3] * 8, of_a_prompt=8))
    assert sorted(one_prompt.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 9))
def test_no_rank_has_more_than_its_share_and_one_piece(lengths: list[int], ranks: int, minibatch_size: int) -> None:
    """In pieces as they come: greedy dealing is within the largest of them."""
    deal, table = Deal(places(len(lengths), minibatch_size), ranks), rows(lengths)
    owners = np.concatenate([deal.owners(table.slice(i, min(i + 3, len(lengths)))) for i in range(0, len(lengths), 3)])
    tokens, minibatches = np.array(lengths) + 5, np.arange(len(lengths)) // minibatch_size
    for minibatch in range(int(minibatches.max()) + 1):
        own = minibatches == minibatch
        of_ranks = [int(tokens[own & (owners == rank)].sum()) for rank in range(ranks)]
        assert max(of_ranks) - min(of_ranks) <= tokens[own].max()
