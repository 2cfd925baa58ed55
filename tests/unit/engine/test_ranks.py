"""A gang of one: every collective gives back what went in. Gangs of two stand in `tests/cluster/test_engine.py`."""

from __future__ import annotations

import torch

from rlhf_cluster.engine.ranks import Ranks, adopt_ranks


def test_collectives_of_one_rank(one_rank: Ranks) -> None:
    values = torch.tensor([1.0, 2.0])
    total = one_rank.sum(values)
    assert total.tolist() == [1.0, 2.0]
    total += 1
    assert values.tolist() == [1.0, 2.0]  # the sum is a tensor of its own
    assert one_rank.max(3.5) == 3.5
    assert one_rank.gather({"a": 1}) == [{"a": 1}]


def test_a_group_that_somebody_made_is_adopted(one_rank: Ranks) -> None:
    assert adopt_ranks() == one_rank == Ranks(0, 1)
