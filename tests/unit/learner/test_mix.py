"""Which text belongs to which optimizer step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_cluster.learner.mix import PretrainingMix
from rlhf_cluster.records import Pretraining

OnRanks = Callable[[int, Callable[[Any], Any]], list[Any]]
BLOCKS = Pretraining.of({"token_ids": [[index, index] for index in range(10)]})


def shares(mix: PretrainingMix, number: int, world: int, on_ranks: OnRanks) -> list[int]:
    parts = on_ranks(world, lambda ranks: [int(block[0]) for block in mix.share(number, ranks)])
    return sorted(block for part in parts for block in part)


def test_every_block_once_before_any_twice_on_any_number_of_ranks(on_ranks: OnRanks) -> None:
    mix = PretrainingMix(BLOCKS, ratio=2, minibatch_size=2, seed=1)
    seen = [shares(mix, number, 1, on_ranks) for number in range(5)]
    assert [len(step) for step in seen] == [4] * 5
    assert Counter(block for step in seen for block in step) == dict.fromkeys(range(10), 2)
    for world in (2, 3):
        again = PretrainingMix(BLOCKS, ratio=2, minibatch_size=2, seed=1)
        assert [shares(again, number, world, on_ranks) for number in range(5)] == seen


def test_the_order_is_the_seed_s(on_ranks: OnRanks) -> None:
    orders = {seed: [shares(PretrainingMix(BLOCKS, 1, 5, seed), n, 1, on_ranks) for n in range(4)] for seed in (0, 1)}
    assert orders[0] != orders[1]
    assert not np.array_equal(orders[0][0], orders[0][2])  # and another in the next epoch
