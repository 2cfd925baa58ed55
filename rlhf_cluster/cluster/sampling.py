"""The generation workers as one room: what `ppo.train` holds of them."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from rlhf_cluster.cluster.crew import Crew
from rlhf_cluster.cluster.delivery import Delivery, WeightChannel
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.waits import WorkerDied, WorkerError, WorkerLost, brief
from rlhf_cluster.records import QUARANTINED, Members, Rollouts

TOGETHER = 64  # rows of a table on its way to scorers and learner
AHEAD = 4  # a worker has a queue of a fourth of what it samples at once, and is given more when that is gone
SUSPECT, ALONE = 2, 2  # workers that may be lost over a sample before it is sampled alone, and then


@dataclass(eq=False)
class Lease:
    """A piece of work handed to a worker: its id, who holds it, the samples it is for, and those that it still owes."""

    lease_id: int
    holder: str
    rows: np.ndarray  # of the members that were asked for
    sample_ids: frozenset[str]
    outstanding: set[str]


@dataclass(eq=False)
class Asked:
    """Members that are being sampled: where their rollouts arrive, and the leases that they went out with."""

    members: Members
    arrived: asyncio.Queue[Rollouts | Exception] = field(default_factory=asyncio.Queue)
    leases: list[asyncio.Task[None]] = field(default_factory=list)

    def pieces(self, rows: np.ndarray) -> list[Piece]:
        """Of these rows, neighbours of one prompt together."""
        prompts, steps = np.array(self.members.prompt_id)[rows], self.members.step
        others = np.flatnonzero(prompts[1:] != prompts[:-1]) + 1
        return [Piece(int(steps[group[0]]), group, self) for group in np.split(rows, others) if len(group)]


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of the members that were asked for, which go to one worker; `alone`: which has nothing else then."""

    step: int
    rows: np.ndarray
    asked: Asked
    alone: bool = False


class GenerationPool:
    """Keeps `rooms.Generation`: deals members out by lease, streams what ends, passes published weights on.

    A worker is given about as many responses as it samples at once (`at_once`), and more as they end; the rest waits
    here, older batches first, so that no worker is idle while others have a queue. Responses to one prompt stay
    together, for a worker computes it once. What a lost worker still owed goes to the others before all that waits.
    """

    def __init__(
        self, crew: Crew, channel: WeightChannel, deadline_s: float, at_once: int = 64, flush_ms: int = 0
    ) -> None:
        self._crew, self._channel, self._deadline_s = crew, channel, deadline_s
        self._most, self._refill = at_once + at_once // AHEAD, max(1, at_once // AHEAD)
        self._flush_s = flush_ms / 1000
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, int, Piece]] = []  # a heap by step and number
        self._outstanding: dict[str, int] = defaultdict(int)  # responses that each worker owes
        self._lost_over: Counter[str] = Counter()  # by sample, workers
        self._version: int | None = None  # that was published last; None: as the workers began
        self._joining = asyncio.Lock()  # a worker joins between two publishes, never in one
        self.held: dict[int, Lease] = {}
        self.requeued = 0
        crew.busy = lambda host: self._outstanding[host.name]
        crew.welcome = self._welcome
        crew.on_change(self._redeal)

    async def sample(self, members: Members) -> AsyncIterator[Rollouts]:
        """What came within `flush_ms` leaves as one table of about `TOGETHER` rows, since each of them costs the driver
        a millisecond; the last `TOGETHER` responses leave at once."""
        asked = Asked(members)
        self._put(asked.pieces(np.arange(len(members))))
        self._redeal()
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
            self._redeal()

    def _put(self, pieces: Iterable[Piece], first: bool = False) -> None:
        """Among those that wait, behind those of their batch or before them."""
        for piece in pieces:
            number = next(self._numbers)
            heapq.heappush(self._waiting, (piece.step, -number if first else number, piece))

    async def _ready(self, arrived: asyncio.Queue[Rollouts | Exception], patient: bool) -> Rollouts:
        """What has arrived. Raises what a lease failed with."""
        ready = [await arrived.get()]
        if patient and len(self._crew.serving) > 1:
            await asyncio.sleep(self._flush_s)
        while not arrived.empty() and sum(len(one) for one in ready if isinstance(one, Rollouts)) < TOGETHER:
            ready.append(arrived.get_nowait())
        for failure in (one for one in ready if isinstance(one, Exception)):
            raise failure
        return Rollouts.concat([one for one in ready if isinstance(one, Rollouts)])

    def _redeal(self) -> None:
        """To all; where nobody is left to deal to, whoever waits hears of it."""
        try:
            self._crew.require()
        except WorkerError as error:
            for asked in {piece.asked for *_, piece in self._waiting}:
                asked.arrived.put_nowait(error)
        self._deal(self._crew.serving)

    def _deal(self, hosts: Iterable[Host]) -> None:
        """Waiting pieces to whichever of these workers has fewest responses outstanding, as long as one has room for
        `_refill` and until it has `_most`. While one waits that is to be alone, nothing passes it."""
        if not self._waiting:
            return
        hosts = list(hosts)
        counts = [(self._outstanding[host.name], number) for number, host in enumerate(hosts)]
        free = [one for one in counts if self._most - one[0] >= self._refill]
        heapq.heapify(free)
        dealt: dict[tuple[int, Asked], list[Piece]] = defaultdict(list)
        while self._waiting and free:
            count, number = heapq.heappop(free)
            alone = self._waiting[0][2].alone
            if alone and count:
                break
            *_, piece = heapq.heappop(self._waiting)
            dealt[number, piece.asked].append(piece)
            count = self._most if alone else count + len(piece.rows)
            self._outstanding[hosts[number].name] = count
            if count < self._most:
                heapq.heappush(free, (count, number))
        for (number, asked), pieces in dealt.items():
            self._hand_out(hosts[number], asked, pieces)

    def _hand_out(self, host: Host, asked: Asked, pieces: list[Piece]) -> None:
        rows = np.concatenate([piece.rows for piece in pieces])
        share = asked.members.take(rows)
        ids = share.sample_id
        lease = Lease(next(self._numbers), host.name, rows, frozenset(ids), set(ids))
        self.held[lease.lease_id] = lease
        task = asyncio.ensure_future(self._hold(host, share, lease, asked))
        task.add_done_callback(partial(self._end, host, lease, self._most - len(rows) if pieces[0].alone else 0))
        asked.leases.append(task)

    async def _hold(self, host: Host, share: Members, lease: Lease, asked: Asked) -> None:
        """Passes on what comes of a lease of a worker, and its failure; of a worker that is lost, what it still owed
        waits for another."""
        try:
            async for rollouts in host.stream("sample", share, deadline_s=self._deadline_s):
                lease.outstanding.difference_update(rollouts.sample_id)
                self._outstanding[host.name] -= len(rollouts)
                asked.arrived.put_nowait(rollouts)
                self._deal([host] if host in self._crew.serving else [])
            if missing := len(lease.outstanding):
                raise WorkerDied(f"{host.name} ended lease {lease.lease_id} without {missing} of its samples")
        except WorkerLost as error:
            self._take_back(lease, asked, error)
            self._crew.lost(host, error)
        except Exception as error:
            asked.arrived.put_nowait(error)

    def _take_back(self, lease: Lease, asked: Asked, error: WorkerLost) -> None:
        """What is owed waits again, before all that waits. What worker after worker was lost over is sampled alone,
        since it may be the reason; and given up where that is so."""
        owed = [row for row in lease.rows.tolist() if asked.members.sample_id[row] in lease.outstanding]
        self.requeued += len(owed)
        by_losses: dict[int, list[int]] = {SUSPECT - 1: [], SUSPECT: [], SUSPECT + ALONE: []}
        for row in owed:
            self._lost_over[asked.members.sample_id[row]] += 1
            times = self._lost_over[asked.members.sample_id[row]]
            by_losses[next(level for level in reversed(by_losses) if times >= level)].append(row)
        again, alone, given_up = (np.array(rows, int) for rows in by_losses.values())
        self._put(
            [Piece(int(asked.members.step[row]), np.array([row]), asked, alone=True) for row in alone], first=True
        )
        self._put(asked.pieces(again), first=True)
        if len(given_up):
            asked.arrived.put_nowait(unsampled(asked.members.take(given_up), error))

    def _end(self, host: Host, lease: Lease, held_free: int, task: asyncio.Task[None]) -> None:
        """However it ended, also before it began. `held_free`: places that were kept for it to be alone."""
        self._outstanding[host.name] -= len(lease.outstanding) + held_free
        del self.held[lease.lease_id]
        self._crew.work_done()
        self._redeal()

    async def receive(self, version: int) -> dict[str, float]:
        """All that serve have it then; those that were lost on the way do not."""
        async with self._joining:
            delivery = await self._delivery(version)
            metrics = await delivery.to(self._crew.serving)
            self._version = version
        for host, error in delivery.lost:
            self._crew.lost(host, error)
        return metrics

    async def _delivery(self, version: int, witness: Host | None = None) -> Delivery:
        snapshot = await self._channel.store.ask("snapshot", version, deadline_s=self._deadline_s)
        return Delivery(self._channel, snapshot, self._deadline_s, witness)

    async def _welcome(self, host: Host) -> None:
        """It serves once it has the version that the others have, and computes with the same, which is looked at while
        no other is published. Raises WorkerLost."""
        while True:
            version = self._version
            if version is not None and not await self._bring(host, version):
                continue
            async with self._joining:
                others = self._crew.serving[:1]
                alike = version is None or not others or await self._bring(host, version, others[0])
                if self._version == version and alike:
                    self._crew.join(host)
                    return

    async def _bring(self, host: Host, version: int, witness: Host | None = None) -> bool:
        """Whether it has it. Of a version that is another by now, the store may have nothing left."""
        try:
            delivery = await self._delivery(version, witness)
        except WorkerLost:
            raise
        except WorkerError:
            if self._version == version:
                raise
            return False
        await delivery.to([host])
        for lost, error in delivery.lost:
            if lost is host:
                raise error
            self._crew.lost(lost, error)
        return not delivery.lost


def unsampled(members: Members, error: WorkerLost) -> Rollouts:
    """Rollouts that there are none of: what is said of samples that are given up."""
    count = len(members)
    nothing: list[list[int]] = [[]] * count
    return members.extend(
        Rollouts,
        {
            "response_ids": nothing,
            "rollout_logprobs": nothing,
            "weight_versions": nothing,
            "finish_reason": [f"{QUARANTINED}: generation workers were lost over it, the last: {brief(error)}"] * count,
            "temperature": [0.0] * count,
            "incarnation": [""] * count,
        },
    )
