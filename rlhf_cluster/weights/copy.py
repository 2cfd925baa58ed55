"""A worker's own copy of the newest snapshot, where its node is not the store's: patched with what changed where it has
the version before, and compared bucket by bucket with what was published."""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from rlhf_cluster.weights.delta import Piece
from rlhf_cluster.weights.snapshot import Bucket, Snapshot, SnapshotError, digest, layout, units

# (version, number of the bucket, version that changes are counted from or None) -> the bucket
Ask = Callable[[int, int, int | None], Awaitable[Piece]]


class SnapshotCopy:
    """Below `directory`, which is its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: Snapshot | None = None
        self.received = 0  # bytes that came, of all versions

    async def bring(self, wanted: Snapshot, ask: Ask) -> Snapshot:
        """The copy as a snapshot of its own, each bucket of which has the digest that was published.

        A bucket that has not is asked for once more, whole. Raises SnapshotError where that is damaged as well; what
        is held is forgotten then, and the next version comes whole.
        """
        base, self._held = self._held, None  # half patched it is good for nothing
        if base is not None and layout(base) != layout(wanted):
            base = None
        path = self._place(wanted, base)
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            async for number, piece in self._pieces(wanted, base, ask):
                bucket = wanted.buckets[number]
                if not await asyncio.to_thread(self._put, piece, memory, bucket):
                    again = await ask(wanted.version, number, None)
                    if not await asyncio.to_thread(self._put, again, memory, bucket):
                        raise SnapshotError(
                            f"weights of version {wanted.version} came damaged twice: bucket {number} of "
                            f"{len(wanted.buckets)} ({bucket.holds}) is not what was published"
                        )
        self._held = replace(wanted, path=str(path))
        return self._held

    def _place(self, wanted: Snapshot, base: Snapshot | None) -> Path:
        """The file to fill: the one that is held, or a new one, for which there must be room."""
        path = self._directory / f"v{wanted.version}.safetensors"
        if base is not None:
            os.replace(base.path, path)
            return path
        self.forget()
        self._directory.mkdir(parents=True)
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, wanted.bytes)
        return path

    async def _pieces(self, wanted: Snapshot, base: Snapshot | None, ask: Ask) -> AsyncIterator[tuple[int, Piece]]:
        """Each is asked for before the one before it is put in its place."""
        version = None if base is None else base.version
        coming = asyncio.ensure_future(ask(wanted.version, 0, version))
        try:
            for number in range(len(wanted.buckets)):
                piece = await coming
                if number + 1 < len(wanted.buckets):
                    coming = asyncio.ensure_future(ask(wanted.version, number + 1, version))
                yield number, piece
        finally:
            coming.cancel()

    def _put(self, piece: Piece, memory: mmap.mmap, bucket: Bucket) -> bool:
        self.received += piece.bytes
        piece.put(units(memory, bucket))
        return digest(memory, bucket.start, bucket.stop) == bucket.digest

    def forget(self) -> None:
        self._held = None
        shutil.rmtree(self._directory, ignore_errors=True)
