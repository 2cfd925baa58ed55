"""The generation worker as an actor: apart from `hosts`, so that other processes need not load vLLM to name it."""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from rlhf_cluster.cluster.hosts import Hosted
from rlhf_cluster.cluster.waits import Call, answer
from rlhf_cluster.generation.worker import GenerationWorker
from rlhf_cluster.weights.snapshot import Snapshot, store_directory

FETCH, FETCH_DEADLINE_S = Call("weight store", "chunk"), 60.0


class GenerationHost(Hosted, GenerationWorker):
    """A generation worker that fetches a snapshot from the store where its node does not have it."""

    _fetched: Path | None = None

    async def receive_from(self, store: Any, snapshot: Snapshot, node: str, run: str, attempt: int) -> None:
        if ray.get_runtime_context().get_node_id() != node:
            self._fetched = store_directory(f"{run}-{os.getpid()}", attempt)
            snapshot = await self._fetch(store, snapshot, self._fetched)
        await self.receive(snapshot)

    async def _fetch(self, store: Any, snapshot: Snapshot, directory: Path) -> Snapshot:
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("*.safetensors"):
            old.unlink()
        path = directory / f"v{snapshot.version}.safetensors"
        with open(path, "wb") as file:
            index = 0
            while chunk := await answer(store.chunk.remote(snapshot.version, index), FETCH, FETCH_DEADLINE_S):
                await asyncio.to_thread(file.write, chunk)  # rollouts go on leaving meanwhile
                index += 1
        return replace(snapshot, path=str(path))

    def stop(self) -> None:
        super().stop()
        if self._fetched is not None:
            shutil.rmtree(self._fetched, ignore_errors=True)
