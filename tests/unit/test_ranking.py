"""Rankings that a labeler makes of the policy's samples."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest

from rlhf_cluster.ranking import rank_samples, split_comparisons
from rlhf_cluster.records import Comparisons, Members, Rollouts

# prompt -> its samples; the judge likes the number that the token is
SAMPLES = {"a": [3, 9, 3], "b": [5, 5, 5], "c": [1, 2, 4]}


class Canned:
    """Generation that gives the samples above, one table per row, in an order of its own."""

    def __init__(self, order: Sequence[int]) -> None:
        self.order = order

    async def sample(self, members: Members) -> AsyncIterator[Rollouts]:
        for row in self.order:
            one = members.take([row])
            name, index = one.prompt_id[0], int(one.sample_index[0])
            yield one.extend(
                Rollouts,
                {
                    "response_ids": [[SAMPLES[name][index]]],
                    "rollout_logprobs": [[-1.0]],
                    "weight_versions": [[0]],
                    "finish_reason": ["stop"],
                    "temperature": [1.0],
                    "incarnation": ["test"],
                },
            )

    async def receive(self, version: int) -> None:
        raise AssertionError("rankings are of one policy")


def numbers(rollouts: Rollouts) -> list[float]:
    return [float(ids[0]) for ids in rollouts.response_ids]


def members() -> Members:
    rows = [(name, index) for name in SAMPLES for index in range(3)]
    return Members.of(
        {
            "prompt_id": [name for name, _ in rows],
            "prompt_ids": [[ord(name)] for name, _ in rows],
            "step": [0] * 9,
            "sample_index": [index for _, index in rows],
            "sample_id": [f"0/{name}/{index}" for name, index in rows],
            "seed": list(range(9)),
        }
    )


def ranked(order: Sequence[int], margin: float) -> Comparisons:
    return asyncio.run(rank_samples(Canned(order), members(), numbers, margin))


def test_rankings_by_hand() -> None:
    comparisons = ranked(range(9), 0.0)
    assert comparisons.prompt_id == ["a", "c"]  # all samples of b tie: nothing can be learnt from them
    assert [row.tolist() for row in comparisons.prompt_ids] == [[ord("a")], [ord("c")]]
    assert [[r.tolist() for r in row] for row in comparisons.responses] == [[[3], [9], [3]], [[1], [2], [4]]]
    assert [row.tolist() for row in comparisons.ranks] == [[2, 1, 2], [3, 2, 1]]


def test_the_margin_makes_ties() -> None:
    assert [row.tolist() for row in ranked(range(9), 1.0).ranks] == [[2, 1, 2], [2, 2, 1]]
    assert len(ranked(range(9), 10.0)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_arrival_order_changes_nothing(seed: int) -> None:
    order = np.random.default_rng(seed).permutation(9).tolist()
    assert ranked(order, 0.0).table.equals(ranked(range(9), 0.0).table)


@pytest.mark.parametrize(("rows", "fraction", "heldout"), [(10, 0.2, 2), (11, 0.2, 3), (2, 0.2, 1), (10, 0.0, 0)])
def test_the_split_parts_prompts_and_loses_none(rows: int, fraction: float, heldout: int) -> None:
    names = [f"{row:02}" for row in range(rows)]
    whole = Comparisons.of(
        {"prompt_id": names, "prompt_ids": [[1]] * rows, "responses": [[[1], [2]]] * rows, "ranks": [[1, 2]] * rows}
    )
    train, held = split_comparisons(whole, fraction)
    assert (held.prompt_id, train.prompt_id) == (names[:heldout], names[heldout:])
