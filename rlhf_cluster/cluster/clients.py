"""Clients of the rooms: what `ppo.train` holds. Each keeps a Protocol of `rooms.py` over actors of its own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rlhf_cluster.cluster.delivery import Delivery, WeightChannel
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.waits import Call, WorkerDied, WorkerError, answer, answers
from rlhf_cluster.records import Controls, Members, RefLogprobs, Rollouts, ScoredRollouts, Scores, UpdateStats
from rlhf_cluster.weights.snapshot import Snapshot

CALLS_AHEAD = 2  # of a worker of a pool: the one that it is at, and one that it finds when that is done


@dataclass(frozen=True)
class Lease:
    """A piece of work handed to a worker: its id, who holds it, and the samples it is for."""

    lease_id: int
    holder: str
    sample_ids: frozenset[str]


class GenerationPool:
    """Keeps `rooms.Generation`: deals members out by lease, streams what ends, passes published weights on."""

    def __init__(self, hosts: Sequence[Host], channel: WeightChannel, deadline_s: float) -> None:
        self._hosts, self._channel, self._deadline_s = hosts, channel, deadline_s
        self._leases = itertools.count()
        self.held: dict[int, Lease] = {}

    async def sample(self, members: Members) -> AsyncIterator[Rollouts]:
        arrived: asyncio.Queue[Rollouts | None] = asyncio.Queue()
        shares = [np.arange(i, len(members), len(self._hosts)) for i in range(len(self._hosts))]
        async with asyncio.TaskGroup() as workers:
            holders = [
                workers.create_task(self._lease(host, members.take(share), arrived))
                for host, share in zip(self._hosts, shares, strict=True)
                if len(share)
            ]
            running = len(holders)
            while running:
                rollouts = await self._next(arrived, holders)
                if rollouts is None:
                    running -= 1
                else:
                    yield rollouts

    async def _next(
        self, arrived: asyncio.Queue[Rollouts | None], holders: Sequence[asyncio.Task[None]]
    ) -> Rollouts | None:
        """The next table, or the failure of a holder: a queue alone would wait for ever on a worker that failed."""
        taking = asyncio.ensure_future(arrived.get())
        while True:
            failed = [task for task in holders if task.done() and task.exception() is not None]
            if failed:
                taking.cancel()
                failed[0].result()
            pending = [task for task in holders if not task.done()]
            await asyncio.wait([taking, *pending], return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                return taking.result()

    async def _lease(self, host: Host, share: Members, arrived: asyncio.Queue[Rollouts | None]) -> None:
        lease = Lease(next(self._leases), host.name, frozenset(share.sample_id))
        self.held[lease.lease_id] = lease
        outstanding = set(lease.sample_ids)
        stream = host.actor.sample.options(num_returns="streaming").remote(share)
        async for rollouts in answers(stream, Call(host.name, "sample", host.log), self._deadline_s):
            outstanding -= set(rollouts.sample_id)
            arrived.put_nowait(rollouts)
        del self.held[lease.lease_id]
        if outstanding:
            raise WorkerDied(f"{host.name} ended lease {lease.lease_id} without {len(outstanding)} of its samples")
        arrived.put_nowait(None)

    async def receive(self, version: int) -> dict[str, float]:
        store = self._channel.store
        call = Call(store.name, "snapshot", store.log)
        snapshot = await answer(store.actor.snapshot.remote(version), call, self._deadline_s)
        return await Delivery(self._channel, snapshot, self._deadline_s).to(self._hosts)


class Pool:
    """Workers that are all alike. Each call goes to the one with the fewest rows outstanding; where all have
    `CALLS_AHEAD` calls it waits here, and its deadline has not begun."""

    def __init__(self, hosts: Sequence[Host], deadline_s: float) -> None:
        self._hosts, self._deadline_s = hosts, deadline_s
        self._outstanding: dict[str, list[int]] = {host.name: [] for host in hosts}  # rows of each call
        self._free = asyncio.Semaphore(CALLS_AHEAD * len(hosts))

    async def call(self, verb: str, rollouts: Rollouts) -> Any:
        async with self._free:
            free = [host for host in self._hosts if len(self._outstanding[host.name]) < CALLS_AHEAD]
            host = min(free, key=lambda host: sum(self._outstanding[host.name]))
            self._outstanding[host.name].append(len(rollouts))
            try:
                reference = getattr(host.actor, verb).remote(rollouts)
                return await answer(reference, Call(host.name, verb, host.log), self._deadline_s)
            finally:
                self._outstanding[host.name].remove(len(rollouts))


class RewardPool(Pool):
    """Keeps `rooms.RewardModel`."""

    async def score(self, rollouts: Rollouts) -> Scores:
        return await self.call("score", rollouts)


class ReferencePool(Pool):
    """Keeps `rooms.Reference`."""

    async def logprobs(self, rollouts: Rollouts) -> RefLogprobs:
        return await self.call("logprobs", rollouts)


class LearnerGroup:
    """Keeps `rooms.Learner` over all ranks: every verb is sent to all of them in one go, so they enter together."""

    def __init__(self, hosts: Sequence[Host], channel: WeightChannel, deadline_s: float) -> None:
        self._hosts, self._channel, self._deadline_s = hosts, channel, deadline_s
        self._owners: dict[int, dict[str, int]] = {}

    async def _all(self, verb: str, *args: Any) -> list[Any]:
        return await self._each(verb, [args] * len(self._hosts))

    async def _each(self, verb: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        waiting = [
            answer(getattr(host.actor, verb).remote(*own), Call(host.name, verb, host.log), self._deadline_s)
            for host, own in zip(self._hosts, args, strict=True)
        ]
        return await asyncio.gather(*waiting)

    async def begin(self, step: int, sample_ids: Sequence[str]) -> None:
        plans = await self._all("begin", step, list(sample_ids))
        self._owners[step] = plans[0]

    async def add(self, step: int, rows: ScoredRollouts) -> None:
        """A rank's share travels as (reference, start, stop): rows are put once, sorted by the rank that owns them."""
        owners = np.array([self._owners[step][sample_id] for sample_id in rows.sample_id])
        stops = np.cumsum(np.bincount(owners, minlength=len(self._hosts))).tolist()
        reference = ray.put(rows.take(np.argsort(owners, kind="stable")))
        spans = zip([0, *stops[:-1]], stops, strict=True)
        await self._each("add", [(step, reference, start, stop) for start, stop in spans])

    async def replace(self, step: int, gone: Sequence[str], come: Sequence[str]) -> None:
        owners = await self._all("replace", step, list(gone), list(come))
        self._owners[step] = owners[0]

    async def update(self, step: int, controls: Controls) -> UpdateStats:
        stats = await self._all("update", step, controls)
        self._owners.pop(step, None)
        return stats[0]

    async def publish(self, version: int) -> None:
        await self._publish("publish", version, self._channel.is_probed(version))

    async def publish_average(self, version: int) -> None:
        """The policy's average as `version`, which no policy has."""
        await self._publish("publish_average", version)

    async def _publish(self, verb: str, version: int, *args: Any) -> None:
        snapshots: list[Snapshot | None] = await self._all(verb, version, self._channel.directory, *args)
        store = self._channel.store
        await answer(store.actor.add.remote(snapshots[0]), Call(store.name, "add", store.log), self._deadline_s)

    async def save(self, directory: Path) -> None:
        """Raises WorkerError where a rank wrote what cannot be seen from here: such a checkpoint would not open."""
        for host, names in zip(self._hosts, await self._all("save", str(directory)), strict=True):
            if missing := [name for name in names if not (directory / name).is_file()]:
                raise WorkerError(
                    f"{host.name} wrote {missing[0]} to {directory} on its node, where the driver does not see it; "
                    "the run's directory (dir) must be on storage that all nodes share"
                )

    async def load(self, directory: Path, version: int) -> None:
        await self._all("load", str(directory), version)
