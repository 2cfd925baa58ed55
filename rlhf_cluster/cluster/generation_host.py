"""The generation worker as an actor: apart from `hosts`, so that other processes need not load vLLM to name it."""

from __future__ import annotations

import os
from typing import Any

import ray

from rlhf_cluster.cluster.hosts import Hosted
from rlhf_cluster.cluster.waits import Call, answer
from rlhf_cluster.generation.worker import GenerationWorker
from rlhf_cluster.weights.copy import SnapshotCopy
from rlhf_cluster.weights.delta import Piece
from rlhf_cluster.weights.snapshot import Snapshot, store_directory

PIECE, PIECE_DEADLINE_S = Call("weight store", "piece"), 60.0


class GenerationHost(Hosted, GenerationWorker):
    """A generation worker that keeps a copy of the newest snapshot where its node is not the store's."""

    _copy: SnapshotCopy | None = None

    async def fetch(self, store: Any, snapshot: Snapshot, place: tuple[str, str, int], again: bool) -> int:
        """Brings a version here and prepares it; it samples meanwhile. Returns the bytes that it took. `place`: the
        store's node, its run and attempt. `again`: nothing that is here already is trusted."""
        node, run, attempt = place
        taken = snapshot.bytes
        if not again and self.holds(snapshot.version):
            taken = self.came()
        elif ray.get_runtime_context().get_node_id() != node:
            if self._copy is None:
                self._copy = SnapshotCopy(store_directory(f"{run}-{os.getpid()}", attempt))
            if again:
                self._copy.forget()
            before = self._copy.received
            snapshot = await self._copied(self._copy, store, snapshot)
            taken = self._copy.received - before
        await self.prepare(snapshot, again)
        return taken

    async def _copied(self, copy: SnapshotCopy, store: Any, snapshot: Snapshot) -> Snapshot:
        async def ask(version: int, number: int, base: int | None) -> Piece:
            return await answer(store.piece.remote(version, number, base), PIECE, PIECE_DEADLINE_S)

        return await copy.bring(snapshot, ask)

    def stop(self) -> None:
        super().stop()
        if self._copy is not None:
            self._copy.forget()
