"""Seeded choices that never change: orders and seeds made from hashes of names.

Not `random` or numpy: their streams may differ between versions, and a permutation of positions changes for every row
when one row is added to a file. An order by hash is the same for ever, and a row keeps its place whatever else comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import xxhash


def stable_hash(*parts: object) -> int:
    """64 bits from the text of the parts; Python's `hash` is salted anew in each process."""
    return xxhash.xxh3_64_intdigest("\x1f".join(str(part) for part in parts).encode())


def stable_seed(*parts: object) -> int:
    """A sampling seed in [0, 2**31), which every engine accepts."""
    return stable_hash(*parts) >> 33


def seeded_order(names: Sequence[str], *key: object) -> list[int]:
    """Positions of `names` in an order fixed by `key` and the names; equal names keep the order they came in."""
    return sorted(range(len(names)), key=lambda position: stable_hash(*key, names[position]))


class EndlessOrder:
    """Positions of `names` without end, in an order of its own in every epoch, which has each name exactly once."""

    def __init__(self, names: Sequence[str], *key: object) -> None:
        self._names, self._key = names, key
        # Two epochs suffice: a batch rarely spans more, and the order of an epoch can always be made again.
        self._epoch = lru_cache(maxsize=2)(self._order_of_epoch)

    def __getitem__(self, position: int) -> int:
        """The name at `position`, counted from 0 over all epochs."""
        epoch, offset = divmod(position, len(self._names))
        return self._epoch(epoch)[offset]

    def _order_of_epoch(self, epoch: int) -> list[int]:
        return seeded_order(self._names, *self._key, epoch)
