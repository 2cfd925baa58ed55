"""The versioned store: it outlives the learner's ranks, serves other nodes by buckets, and forgets old versions."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_cluster.weights.delta import Piece, difference
from rlhf_cluster.weights.snapshot import SHARED_MEMORY, SPARE, Snapshot, SnapshotError, layout, store_directory, units


class WeightStore:
    """Keeps the last `keep` snapshots of one node's shared memory, which it was told of by `add`; the file of the one
    before them is there for the next to be written over.

    It begins by sweeping what earlier attempts of the run left on this node.
    """

    def __init__(self, run: str, attempt: int, keep: int) -> None:
        sweep(run)
        self._directory = store_directory(run, attempt)
        self._keep = keep
        self._snapshots: dict[int, Snapshot] = {}

    def add(self, snapshot: Snapshot) -> None:
        self._snapshots.pop(snapshot.version, None)
        self._snapshots[snapshot.version] = snapshot
        for version in list(self._snapshots)[: -self._keep]:
            gone = Path(self._snapshots.pop(version).path)
            if gone.exists():
                os.replace(gone, gone.parent / SPARE)

    def snapshot(self, version: int) -> Snapshot:
        if version not in self._snapshots:
            raise SnapshotError(f"the store has versions {sorted(self._snapshots)}, not {version}")
        return self._snapshots[version]

    def piece(self, version: int, number: int, base: int | None) -> Piece:
        """A bucket of a version: what changed since `base`, where that is kept, is laid out alike and it is less than
        the whole."""
        wanted, old = self.snapshot(version), self._snapshots.get(base) if base is not None else None
        if old is None or layout(old) != layout(wanted):
            with _opened(wanted) as memory:
                return difference(None, units(memory, wanted.buckets[number]))
        with _opened(wanted) as memory, _opened(old) as former:
            return difference(units(former, old.buckets[number]), units(memory, wanted.buckets[number]))

    def stop(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


@contextmanager
def _opened(snapshot: Snapshot) -> Iterator[mmap.mmap]:
    with open(snapshot.path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        yield memory


def sweep(run: str) -> list[str]:
    """Removes what earlier attempts of this run left in shared memory; returns the folders removed."""
    left = [path for path in SHARED_MEMORY.glob(f"rlhf-cluster-{run}-*") if path.is_dir()]
    for path in left:
        shutil.rmtree(path)
    return [str(path) for path in left]
