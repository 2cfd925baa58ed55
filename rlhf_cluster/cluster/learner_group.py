"""The learner's ranks as one room: what `ppo.train` holds of them.

Where a rank is lost, all of them begin anew, as many as before or fewer, from the state that was kept last; what was
asked of them since is in the journal, and is asked again. Nobody else hears of it, but that it took longer.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import ray

from rlhf_cluster.cluster.delivery import WeightChannel
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.waits import WorkerError, WorkerLost
from rlhf_cluster.learner.plan import Deal
from rlhf_cluster.records import Controls, ScoredRollouts, UpdateStats
from rlhf_cluster.weights.snapshot import Snapshot

T = TypeVar("T")

ROWS_OF_A_RANK = 4  # of a table on its way to several ranks, at least


class Gang(Protocol):
    """The ranks, which meet once and cannot do without each other."""

    @property
    def hosts(self) -> Sequence[Host]: ...

    async def follow(self) -> NoReturn:
        """As long as all of them live. Raises WorkerLost."""
        ...

    async def lost(self) -> WorkerLost | None:
        """Why, where one of them is; asked when something failed, whose reason that may be."""
        ...

    async def anew(self, error: WorkerError, ranks: int = 0) -> bool:
        """Other `hosts`, as they began, in the place of all; `ranks` of them, or as many as there is room for. Returns
        whether the weight store is another too, and empty. Raises WorkerError where it cannot be."""
        ...


@dataclass(frozen=True)
class Settled:
    """Ranks in whose place nobody comes."""

    hosts: Sequence[Host]

    async def follow(self) -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError

    async def lost(self) -> WorkerLost | None:
        return None

    async def anew(self, error: WorkerError, ranks: int = 0) -> bool:
        raise error


@dataclass(frozen=True)
class Keeping:
    """The state of every `every`-th version is kept below `directory`, one at a time; 0: of none, and no rank can be
    replaced."""

    directory: Path = Path()
    every: int = 0


@dataclass(eq=False)
class Entry:
    """What was asked of the ranks about a batch: asked again, they are where they were."""

    step: int
    play: Callable[[], Awaitable[Any]]
    result: Any = field(default=None)

    async def played(self) -> None:
        self.result = await self.play()


class LearnerGroup:
    """Keeps `rooms.Learner` over all ranks: every verb is sent to all of them in one go, so they enter together. `put`
    lays a table where all of them can take it.

    As each `add` takes a call of every rank, and all of them into it, rows wait here until there are `ROWS_OF_A_RANK`
    for each, or the update is due.
    """

    def __init__(
        self,
        gang: Gang,
        channel: WeightChannel,
        deadline_s: float,
        put: Callable[[ScoredRollouts], Any] = ray.put,
        keeping: Keeping | None = None,
    ) -> None:
        self._gang, self._channel, self._deadline_s, self._put = gang, channel, deadline_s, put
        self._keeping = keeping or Keeping()
        self._deals: dict[int, Deal] = {}
        self._waiting: dict[int, list[ScoredRollouts]] = defaultdict(list)
        self._journal: list[Entry] = []
        self._kept: tuple[Path, int] | None = None  # the state that ranks begin anew from; None: as they are started
        self._keeps: asyncio.Task[None] | None = None
        self._version = self._published = 0  # of the policy now, and of what is in the store
        self._life = 0
        self._whole = asyncio.Event()  # no rank is being replaced
        self._whole.set()
        self.losses = 0

    # What is asked of the ranks

    async def _all(self, verb: str, *args: Any) -> list[Any]:
        return await self._each(verb, [args] * len(self._gang.hosts))

    async def _each(self, verb: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Raises WorkerLost where a rank is lost; the others then fail too, or wait in vain for it."""
        hosts = self._gang.hosts
        asked: asyncio.Future[list[Any]] = asyncio.gather(
            *(host.ask(verb, *own, deadline_s=self._deadline_s) for host, own in zip(hosts, args, strict=True))
        )
        following: asyncio.Future[list[Any]] = asyncio.ensure_future(self._gang.follow())
        try:
            await asyncio.wait((asked, following), return_when=asyncio.FIRST_COMPLETED)
            return await (asked if asked.done() else following)
        except WorkerLost:
            raise
        except WorkerError as error:
            raise await self._gang.lost() or error from error
        finally:
            for one in (asked, following):
                one.cancel()
            await asyncio.gather(asked, following, return_exceptions=True)

    async def _lasting(self, ask: Callable[[], Awaitable[T]]) -> T:
        """The answer, of those that have come in the place of lost ranks where need be."""
        while True:
            await self._whole.wait()
            life = self._life
            try:
                return await ask()
            except WorkerLost as error:
                await self._begin_anew(life, error)

    async def _journaled(self, step: int, play: Callable[[], Awaitable[Any]]) -> Any:
        """As `_lasting`; where ranks begin anew it is among what they are asked again."""
        await self._whole.wait()
        entry, life = Entry(step, play), self._life
        self._journal.append(entry)
        try:
            await entry.played()
        except WorkerLost as error:
            await self._begin_anew(life, error)
        return entry.result

    # How they begin anew

    async def rescale(self, ranks: int) -> None:
        """So many ranks from now on, from the same state."""
        await self._whole.wait()
        await self._begin_anew(self._life, WorkerLost(f"{ranks} ranks are asked for"), ranks)

    async def _begin_anew(self, life: int, error: WorkerError, ranks: int = 0) -> None:
        """Whoever hears of a loss first sees to it; all others wait."""
        if life != self._life or not self._whole.is_set():
            await self._whole.wait()
            return
        if not self._keeping.every:
            raise error  # what came before is in no journal
        self._whole.clear()
        self.losses += not ranks
        try:
            await self._forget_keeping()
            while True:
                empty = await self._gang.anew(error, ranks)
                try:
                    await self._play()
                    if empty and self._published == self._version:
                        await self._publish_once("publish", self._published, False)
                    break
                except WorkerLost as again:
                    error, ranks = again, 0
        finally:
            self._life += 1
            self._whole.set()

    async def _play(self) -> None:
        """To where the ranks were that are gone."""
        if self._kept is not None:
            directory, version = self._kept
            await self._all("load", str(directory), version)
        for entry in list(self._journal):
            await entry.played()

    async def _forget_keeping(self) -> None:
        if self._keeps is not None:
            self._keeps.cancel()
            await asyncio.gather(self._keeps, return_exceptions=True)
            self._keeps = None

    def _keep_where_due(self, version: int) -> None:
        """Not while an earlier one is being kept: it is soon."""
        every, kept = self._keeping.every, self._kept[1] if self._kept else 0
        own = self._kept is None or self._kept[0].parent == self._keeping.directory  # and no checkpoint, which may go
        if every and (version >= kept + every or not own) and (self._keeps is None or self._keeps.done()):
            place = self._keeping.directory / f"version-{version}"
            # Asked before anything else is: it is the state of this version.
            asked = asyncio.gather(
                *(host.ask("keep", str(place), version, deadline_s=self._deadline_s) for host in self._gang.hosts)
            )
            self._keeps = asyncio.ensure_future(self._keep(version, place, asked))

    async def _keep(self, version: int, place: Path, asked: Awaitable[Any]) -> None:
        """The ranks write it while generation has the new weights to begin with; nobody waits for it."""
        try:
            await asked
        except WorkerError as error:
            logging.getLogger(__name__).warning("the state of version %d is not kept: %s", version, error)
            await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
            return
        before, self._kept = self._kept, (place, version)
        self._journal = [entry for entry in self._journal if entry.step >= version]
        if before is not None and before[0].parent == self._keeping.directory:
            await asyncio.to_thread(shutil.rmtree, before[0], ignore_errors=True)

    # The verbs of `rooms.Learner`

    async def begin(self, step: int, sample_ids: Sequence[str]) -> None:
        async def play() -> None:
            places = await self._all("begin", step, list(sample_ids))
            self._deals[step] = Deal(places[0], len(self._gang.hosts))

        await self._journaled(step, play)

    async def add(self, step: int, rows: ScoredRollouts) -> None:
        self._waiting[step].append(rows)
        ranks = len(self._gang.hosts)
        if ranks == 1 or sum(map(len, self._waiting[step])) >= ROWS_OF_A_RANK * ranks:
            await self._send(step)

    async def _send(self, step: int) -> None:
        rows = ScoredRollouts.concat(self._waiting.pop(step))
        await self._journaled(step, lambda: self._deal(step, rows))

    async def _deal(self, step: int, rows: ScoredRollouts) -> None:
        """A rank's share travels as (table, start, stop): rows are sorted by the rank that gets them, and put once
        where there are several."""
        ranks = len(self._gang.hosts)
        owners = self._deals[step].owners(rows)
        stops = np.cumsum(np.bincount(owners, minlength=ranks)).tolist()
        ordered = rows.take(np.argsort(owners, kind="stable"))
        table = ordered if ranks == 1 else self._put(ordered)
        spans = zip([0, *stops[:-1]], stops, strict=True)
        await self._each("add", [(step, table, start, stop) for start, stop in spans])

    async def replace(self, step: int, gone: Sequence[str], come: Sequence[str]) -> None:
        async def play() -> None:
            places = await self._all("replace", step, list(gone), list(come))
            self._deals[step].places = places[0]

        await self._journaled(step, play)

    async def update(self, step: int, controls: Controls) -> UpdateStats:
        if step in self._waiting:
            await self._send(step)

        async def play() -> UpdateStats:
            stats = await self._all("update", step, controls)
            self._deals.pop(step, None)
            self._version = step + 1
            return stats[0]

        found = await self._journaled(step, play)
        if not self._keeping.every:  # nobody will ask it again
            self._journal = [entry for entry in self._journal if entry.step > step]
        return found

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
        self._keep_where_due(version)

    async def publish_average(self, version: int) -> None:
        """The policy's average as `version`, which no policy has."""
        await self._publish("publish_average", version)

    async def _publish(self, verb: str, version: int, *args: Any) -> None:
        await self._lasting(lambda: self._publish_once(verb, version, *args))
        self._published = version

    async def _publish_once(self, verb: str, version: int, *args: Any) -> None:
        snapshots: list[Snapshot | None] = await self._all(verb, version, self._channel.directory, *args)
        await self._channel.store.ask("add", snapshots[0], deadline_s=self._deadline_s)

    async def save(self, directory: Path) -> None:
        """Raises WorkerError where a rank wrote what cannot be seen from here: such a checkpoint would not open."""
        found = await self._lasting(lambda: self._all("save", str(directory)))
        for host, names in zip(self._gang.hosts, found, strict=True):
            if missing := [name for name in names if not (directory / name).is_file()]:
                raise WorkerError(
                    f"{host.name} wrote {missing[0]} to {directory} on its node, where the driver does not see it; "
                    "the run's directory (dir) must be on storage that all nodes share"
                )

    async def load(self, directory: Path, version: int) -> None:
        await self._lasting(lambda: self._all("load", str(directory), version))
        await self._forget_keeping()
        self._kept, self._version = (directory, version), version
        self._journal = [entry for entry in self._journal if entry.step >= version]

    async def close(self) -> None:
        """Nothing is kept any more."""
        await self._forget_keeping()
        if self._keeping.every:
            shutil.rmtree(self._keeping.directory, ignore_errors=True)
