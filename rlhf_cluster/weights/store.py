"""The versioned store: it outlives the learner's ranks, serves other nodes in chunks, and forgets old versions."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlhf_cluster.weights.snapshot import CHUNK, SHARED_MEMORY, Snapshot, SnapshotError, store_directory


class WeightStore:
    """Keeps the last `keep` snapshots of one node's shared memory, which it was told of by `add`.

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
            Path(self._snapshots.pop(version).path).unlink(missing_ok=True)

    def snapshot(self, version: int) -> Snapshot:
        if version not in self._snapshots:
            raise SnapshotError(f"the store has versions {sorted(self._snapshots)}, not {version}")
        return self._snapshots[version]

    def chunk(self, version: int, index: int) -> bytes:
        """Bytes `index * CHUNK` to `(index + 1) * CHUNK` of a version; empty past its end."""
        with open(self.snapshot(version).path, "rb") as file:
            file.seek(index * CHUNK)
            return file.read(CHUNK)

    def stop(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


def sweep(run: str) -> list[str]:
    """Removes what earlier attempts of this run left in shared memory; returns the folders removed."""
    left = [path for path in SHARED_MEMORY.glob(f"rlhf-cluster-{run}-*") if path.is_dir()]
    for path in left:
        shutil.rmtree(path)
    return [str(path) for path in left]
