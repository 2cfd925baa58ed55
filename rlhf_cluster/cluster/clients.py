"""Clients of the rooms: what `ppo.train` holds. Each keeps a Protocol of `rooms.py` over actors of its own."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rlhf_cluster.cluster.delivery import Delivery, WeightChannel
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.waits import WorkerDied, WorkerError
from rlhf_cluster.learner.plan import Deal
from rlhf_cluster.records import Controls, Members, RefLogprobs, Rollouts, ScoredRollouts, Scores, UpdateStats
from rlhf_cluster.weights.snapshot import Snapshot

TOGETHER = 64  # rows of a table on its way to scorers and learner
AHEAD = 4  # a worker has a queue of a fourth of what it samples at once, and is given more when that is gone
ROWS_OF_A_RANK = 4  # of a table on its way to several ranks of the learner, at least
CALLS_AHEAD = 2  # of a worker of a pool: the one that it is at, and one that it finds when that is done


@dataclass(eq=False)
class Lease:
    """A piece of work handed to a worker: its id, who holds it, the samples it is for, and those that it still owes."""

    lease_id: int
    holder: str
    sample_ids: frozenset[str]
    outstanding: set[str]


@dataclass(eq=False)
class Asked:
    """Members that are being sampled: where their rollouts arrive, and the leases that they went out with."""

    members: Members
    arrived: asyncio.Queue[Rollouts | Exception] = field(default_factory=asyncio.Queue)
    leases: list[asyncio.Task[None]] = field(default_factory=list)

    def pieces(self) -> list[Piece]:
        """Neighbours of one prompt together."""
        prompts, steps = np.array(self.members.prompt_id), self.members.step
        others = np.flatnonzero(prompts[1:] != prompts[:-1]) + 1
        groups = np.split(np.arange(len(prompts)), others)
        return [Piece(int(steps[rows[0]]), rows, self) for rows in groups if len(rows)]


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of the members that were asked for, which go to one worker."""

    step: int
    rows: np.ndarray
    asked: Asked


class GenerationPool:
    """Keeps `rooms.Generation`: deals members out by lease, streams what ends, passes published weights on.

    A worker is given about as many responses as it samples at once (`at_once`), and more as they end; the rest waits
    here, older batches first, so that no worker is idle while others have a queue. Responses to one prompt stay
    together, for a worker computes it once.
    """

    def __init__(
        self, hosts: Sequence[Host], channel: WeightChannel, deadline_s: float, at_once: int = 64, flush_ms: int = 0
    ) -> None:
        self._hosts, self._channel, self._deadline_s = hosts, channel, deadline_s
        self._most, self._refill = at_once + at_once // AHEAD, max(1, at_once // AHEAD)
        self._flush_s = flush_ms / 1000
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, int, Piece]] = []  # a heap by step and number
        self._outstanding = [0] * len(hosts)  # responses that each worker owes
        self.held: dict[int, Lease] = {}

    async def sample(self, members: Members) -> AsyncIterator[Rollouts]:
        """What came within `flush_ms` leaves as one table of about `TOGETHER` rows, since each of them costs the driver
        a millisecond; the last `TOGETHER` responses leave at once."""
        asked = Asked(members)
        for piece in asked.pieces():
            heapq.heappush(self._waiting, (piece.step, next(self._numbers), piece))
        self._deal(range(len(self._hosts)))
        remaining = len(members)
        try:
            while remaining:
                rollouts = await self._ready(asked.arrived, remaining > TOGETHER)
                remaining -= len(rollouts)
                yield rollouts
        finally:
            self._waiting = [one for one in self._waiting if one[2].asked is not asked]
            heapq.heapify(self._waiting)
            for lease in asked.leases:
                lease.cancel()
            self._deal(range(len(self._hosts)))

    async def _ready(self, arrived: asyncio.Queue[Rollouts | Exception], patient: bool) -> Rollouts:
        """What has arrived. Raises what a lease failed with."""
        ready = [await arrived.get()]
        if patient and len(self._hosts) > 1:
            await asyncio.sleep(self._flush_s)
        while not arrived.empty() and sum(len(one) for one in ready if isinstance(one, Rollouts)) < TOGETHER:
            ready.append(arrived.get_nowait())
        for failure in (one for one in ready if isinstance(one, Exception)):
            raise failure
        return Rollouts.concat([one for one in ready if isinstance(one, Rollouts)])

    def _deal(self, indices: Iterable[int]) -> None:
        """Waiting pieces to whichever of these workers has fewest responses outstanding, as long as one has room for
        `_refill` and until it has `_most`."""
        if not self._waiting:
            return
        counts = [(self._outstanding[index], index) for index in indices]
        free = [(count, index) for count, index in counts if self._most - count >= self._refill]
        heapq.heapify(free)
        dealt: dict[tuple[int, Asked], list[Piece]] = defaultdict(list)
        while self._waiting and free:
            count, index = heapq.heappop(free)
            *_, piece = heapq.heappop(self._waiting)
            dealt[index, piece.asked].append(piece)
            count += len(piece.rows)
            self._outstanding[index] = count
            if count < self._most:
                heapq.heappush(free, (count, index))
        for (index, asked), pieces in dealt.items():
            share = asked.members.take(np.concatenate([piece.rows for piece in pieces]))
            lease = Lease(
                next(self._numbers), self._hosts[index].name, frozenset(share.sample_id), set(share.sample_id)
            )
            self.held[lease.lease_id] = lease
            task = asyncio.ensure_future(self._hold(index, share, lease, asked))
            task.add_done_callback(partial(self._end, index, lease))
            asked.leases.append(task)

    async def _hold(self, index: int, share: Members, lease: Lease, asked: Asked) -> None:
        """Passes on what comes of a lease of a worker, and its failure."""
        host = self._hosts[index]
        try:
            async for rollouts in host.stream("sample", share, deadline_s=self._deadline_s):
                lease.outstanding.difference_update(rollouts.sample_id)
                self._outstanding[index] -= len(rollouts)
                asked.arrived.put_nowait(rollouts)
                self._deal([index])
            if missing := len(lease.outstanding):
                raise WorkerDied(f"{host.name} ended lease {lease.lease_id} without {missing} of its samples")
        except Exception as error:
            asked.arrived.put_nowait(error)

    def _end(self, index: int, lease: Lease, task: asyncio.Task[None]) -> None:
        """However it ended, also before it began."""
        self._outstanding[index] -= len(lease.outstanding)
        del self.held[lease.lease_id]
        self._deal([index])

    async def receive(self, version: int) -> dict[str, float]:
        snapshot = await self._channel.store.ask("snapshot", version, deadline_s=self._deadline_s)
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
                return await host.ask(verb, rollouts, deadline_s=self._deadline_s)
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
    """Keeps `rooms.Learner` over all ranks: every verb is sent to all of them in one go, so they enter together. `put`
    lays a table where all of them can take it.

    As each `add` takes a call of every rank, and all of them into it, rows wait here until there are `ROWS_OF_A_RANK`
    for each, or the update is due.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        channel: WeightChannel,
        deadline_s: float,
        put: Callable[[ScoredRollouts], Any] = ray.put,
    ) -> None:
        self._hosts, self._channel, self._deadline_s, self._put = hosts, channel, deadline_s, put
        self._least = ROWS_OF_A_RANK * len(hosts) if len(hosts) > 1 else 1
        self._deals: dict[int, Deal] = {}
        self._waiting: dict[int, list[ScoredRollouts]] = defaultdict(list)

    async def _all(self, verb: str, *args: Any) -> list[Any]:
        return await self._each(verb, [args] * len(self._hosts))

    async def _each(self, verb: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        waiting = [
            host.ask(verb, *own, deadline_s=self._deadline_s) for host, own in zip(self._hosts, args, strict=True)
        ]
        return await asyncio.gather(*waiting)

    async def begin(self, step: int, sample_ids: Sequence[str]) -> None:
        places = await self._all("begin", step, list(sample_ids))
        self._deals[step] = Deal(places[0], len(self._hosts))

    async def add(self, step: int, rows: ScoredRollouts) -> None:
        self._waiting[step].append(rows)
        if sum(map(len, self._waiting[step])) >= self._least:
            await self._send(step)

    async def _send(self, step: int) -> None:
        """A rank's share travels as (table, start, stop): rows are sorted by the rank that gets them, and put once
        where there are several."""
        rows = ScoredRollouts.concat(self._waiting.pop(step))
        owners = self._deals[step].owners(rows)
        stops = np.cumsum(np.bincount(owners, minlength=len(self._hosts))).tolist()
        ordered = rows.take(np.argsort(owners, kind="stable"))
        table = ordered if len(self._hosts) == 1 else self._put(ordered)
        spans = zip([0, *stops[:-1]], stops, strict=True)
        await self._each("add", [(step, table, start, stop) for start, stop in spans])

    async def replace(self, step: int, gone: Sequence[str], come: Sequence[str]) -> None:
        places = await self._all("replace", step, list(gone), list(come))
        self._deals[step].places = places[0]

    async def update(self, step: int, controls: Controls) -> UpdateStats:
        if step in self._waiting:
            await self._send(step)
        stats = await self._all("update", step, controls)
        self._deals.pop(step, None)
        return stats[0]

    async def open_direct(self, generation: Sequence[Host], processes: int) -> None:
        """Lets all ranks meet the engines of these workers, of so many processes each."""
        alone = [Host(host.name, host.actor, host.log) for host in generation]
        await self._all("open_direct", self._channel.cfg.transport, alone, processes, self._deadline_s)

    async def publish(self, version: int) -> None:
        """In the store and, where that is the transport, straight to the engines; the store's is then for those that
        have to load once more."""
        await self._publish("publish", version, self._channel.is_probed(version))
        if self._channel.cfg.is_direct:
            await self._all("send", version)

    async def publish_average(self, version: int) -> None:
        """The policy's average as `version`, which no policy has."""
        await self._publish("publish_average", version)

    async def _publish(self, verb: str, version: int, *args: Any) -> None:
        snapshots: list[Snapshot | None] = await self._all(verb, version, self._channel.directory, *args)
        await self._channel.store.ask("add", snapshots[0], deadline_s=self._deadline_s)

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
