"""What a bucket of weights is made of, given what it was made of before: at a learning rate of 1e-6 an optimizer step
changes 0.4 % of a bfloat16 model's elements, and the others need not travel.

Bytes are compared, two at a time, whatever numbers they stand for; so the copy that changes are put into is the
original bit for bit, which its digest then says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNIT = np.dtype("<u2")  # the size of a bfloat16 number; of a float32 number each half
PLACE = np.dtype("<u4")


@dataclass(frozen=True, eq=False)
class Piece:
    """A bucket on its way: the units that changed and their places in it, or, without `places`, all of its units."""

    places: np.ndarray | None  # u32 [n]
    units: np.ndarray  # u16 [n]

    @property
    def bytes(self) -> int:
        return self.units.nbytes + (0 if self.places is None else self.places.nbytes)

    def put(self, memory: np.ndarray) -> None:
        """Into the bucket's own u16 [N], which holds what the changes were counted from."""
        if self.places is None:
            memory[:] = self.units
        else:
            memory[self.places] = self.units


def difference(old: np.ndarray | None, new: np.ndarray) -> Piece:
    """The smaller of what changed from `old` to `new`, u16 [N] both, and all of `new`."""
    if old is None:
        return Piece(None, new.copy())
    places = np.flatnonzero(old != new)
    changed = Piece(places.astype(PLACE), new[places])
    return changed if changed.bytes < new.nbytes else Piece(None, new.copy())
