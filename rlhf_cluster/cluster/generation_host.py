"""The generation worker as an actor: apart from `hosts`, so that other processes need not load vLLM to name it."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import ray

from rlhf_cluster.cluster.hosts import Hosted
from rlhf_cluster.cluster.waits import Call, answer
from rlhf_cluster.generation.worker import GenerationWorker
from rlhf_cluster.weights.copy import SnapshotCopy
from rlhf_cluster.weights.delta import Piece
from rlhf_cluster.weights.snapshot import Snapshot, check, store_directory

PIECE, PIECE_DEADLINE_S = Call("weight store", "piece"), 60.0


class GenerationHost(Hosted, GenerationWorker):
    """A generation worker that keeps a copy of the newest snapshot where its node is not the store's."""

    _copy: SnapshotCopy | None = None
    _at_hand: Snapshot | None = None  # that waits to be loaded

    async def fetch(self, store: Any, snapshot: Snapshot, place: tuple[str, str, int], again: bool) -> int:
        """What `load` then loads is at hand, and is what was published; it samples meanwhile. Returns the bytes that it
        took. `place`: the store's node, its run and attempt. `again`: nothing that is here already is trusted."""
        self._at_hand = None
        if not again and self.holds(snapshot.version):
            return self.came()
        node, run, attempt = place
        taken = snapshot.bytes
        if ray.get_runtime_context().get_node_id() != node:
            if self._copy is None:
                self._copy = SnapshotCopy(store_directory(f"{run}-{os.getpid()}", attempt))
            if again:
                self._copy.forget()
            before = self._copy.received
            snapshot = await self._copied(self._copy, store, snapshot)
            taken = self._copy.received - before
        await asyncio.to_thread(check, snapshot)
        self._at_hand = snapshot
        return taken

    async def load(self) -> None:
        """What was fetched, unless it serves already; samples no more until `resume`."""
        if self._at_hand is not None:
            await self.change_to(self._at_hand)

    async def _copied(self, copy: SnapshotCopy, store: Any, snapshot: Snapshot) -> Snapshot:
        async def ask(version: int, number: int, base: int | None) -> Piece:
            return await answer(store.piece.remote(version, number, base), PIECE, PIECE_DEADLINE_S)

        return await copy.bring(snapshot, ask)

    def stop(self) -> None:
        super().stop()
        if self._copy is not None:
            self._copy.forget()
