"""Seeded choices that never change: orders and seeds made from hashes of names.

Not `random` or numpy: their streams may differ between versions, and a permutation of positions changes for every row
when one row is added to a file. An order by hash is the same for ever, and a row keeps its place whatever else comes.
"""

from __future__ import annotations

from collections.abc import Sequence

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
