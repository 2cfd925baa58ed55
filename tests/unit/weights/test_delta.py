"""What changed between two buckets: never more than the whole, and in its place it gives the new one bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cluster.weights.delta import UNIT, difference

buckets = st.integers(0, 200).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 3), min_size=n, max_size=n)] * 2))


@given(buckets)
def test_changes_put_in_place_are_the_new_bucket(pair: tuple[list[int], list[int]]) -> None:
    old, new = (np.array(values, UNIT) for values in pair)
    piece = difference(old, new)
    assert piece.bytes <= new.nbytes
    memory = old.copy()
    piece.put(memory)
    assert memory.tobytes() == new.tobytes()


@given(buckets)
def test_without_an_old_one_it_is_whole(pair: tuple[list[int], list[int]]) -> None:
    old, new = (np.array(values, UNIT) for values in pair)
    piece = difference(None, new)
    assert piece.places is None and piece.bytes == new.nbytes
    piece.put(old)
    assert old.tobytes() == new.tobytes()


def test_one_number_takes_six_bytes() -> None:
    """bfloat16: a place of four and its value; -0 is another number than 0, and NaN the same as itself."""
    numbers = torch.tensor([0.0, 1.0, float("nan")] * 10, dtype=torch.bfloat16)
    other = numbers.clone()
    other[3] = -0.0
    old, new = (row.view(torch.int16).numpy().view(UNIT) for row in (numbers, other))
    piece = difference(old, new)
    assert piece.places is not None and piece.places.tolist() == [3] and piece.bytes == 6
    assert difference(old, old).bytes == 0
