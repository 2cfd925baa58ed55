"""The workers of one role, of which any may come, go and die.

    hired -> prepared -> welcomed -> serves -> is lost: another is hired in its place, as far as the budget goes
                                            -> leaves: gets no more work, and is released once what it has is done

A worker's name is never given twice, so nothing that an earlier one still answers is taken for another's.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.waits import WorkerError, WorkerLost, brief

LONGEST_PAUSE_S = 60.0  # before another try


class Hiring(Protocol):
    """How a worker of a role comes to be, and ends."""

    def spawn(self, number: int) -> Host:
        """Its process, which starts meanwhile."""
        ...

    async def prepare(self, host: Host) -> None:
        """Returns once it could serve. Raises WorkerError where it cannot."""
        ...

    async def follow(self, host: Host) -> NoReturn:
        """As long as it lives. Raises WorkerLost."""
        ...

    async def release(self, host: Host) -> None:
        """Ends one that answers. Does not raise."""
        ...

    def abandon(self, host: Host) -> None:
        """Ends one that is lost, at once."""
        ...


class Nobody:
    """Hires nobody, and ends nobody: the workers are somebody else's."""

    def spawn(self, number: int) -> Host:
        raise WorkerError("nobody is hired here")

    async def prepare(self, host: Host) -> None:
        """It serves already."""

    async def follow(self, host: Host) -> NoReturn:
        raise WorkerError("nobody is followed here")

    async def release(self, host: Host) -> None:
        """It is ended by whoever started it."""

    def abandon(self, host: Host) -> None:
        """So is that."""


def note(sentence: str) -> None:
    logging.getLogger(__name__).warning("%s", sentence)


@dataclass(frozen=True)
class Terms:
    """`restarts`: how many may be hired in the place of others, one more every `refill_s`; `backoff_s`: before the
    first, twice as long before each further one; `drain_s`: what a leaver has to finish; `warn` hears of losses."""

    restarts: int = 0
    refill_s: float = 600.0
    backoff_s: float = 1.0
    drain_s: float = 60.0
    warn: Callable[[str], None] = note


class Budget:
    """Of restarts: a bucket that fills again, one by one."""

    def __init__(self, most: int, refill_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._refill_s, self._clock = most, refill_s, clock
        self._spent: list[float] = []  # when each of those that are not filled again yet was taken

    def take(self) -> int:
        """How many are spent now, this one with them; 0: there was none left."""
        now = self._clock()
        # One comes back `refill_s` after it was taken, or after the one before it came back.
        while self._spent and now - self._spent[0] >= self._refill_s:
            back = self._spent.pop(0) + self._refill_s
            if self._spent:
                self._spent[0] = max(self._spent[0], back)
        if len(self._spent) >= self._most:
            return 0
        self._spent.append(now)
        return len(self._spent)


class Crew:
    """`serving` are those that work goes to, by number. Whoever deals work says by `busy` how much a worker has, and by
    `welcome` how one that is prepared comes to serve, which ends with `join`."""

    def __init__(self, role: str, hiring: Hiring, terms: Terms | None = None) -> None:
        self.role, self._hiring, self._terms = role, hiring, terms or Terms()
        self.serving: list[Host] = []
        self.welcome: Callable[[Host], Awaitable[None]] = self._join_at_once
        self.busy: Callable[[Host], int] = lambda host: 0
        self.losses = 0
        self._budget = Budget(self._terms.restarts, self._terms.refill_s)
        self._numbers = itertools.count()
        self.wanted = 0  # workers that are to serve
        self._coming = 0
        self._failure: WorkerError | None = None
        self._told: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._done = asyncio.Event()

    @classmethod
    def of(cls, hosts: Sequence[Host]) -> Crew:
        """Workers that serve already, and that nobody replaces."""
        crew = cls(hosts[0].name.rpartition(" ")[0] if hosts else "", Nobody())
        crew.serving, crew.wanted = list(hosts), len(hosts)
        return crew

    def on_change(self, tell: Callable[[], None]) -> None:
        """`tell` is called whenever another worker serves, or one no longer does."""
        self._told.append(tell)

    def require(self) -> None:
        """Raises what the last of them was lost by, where none is left and none will come."""
        if self._failure is not None:
            raise self._failure

    @property
    def _is_short(self) -> bool:
        """Whether fewer serve and come than are wanted."""
        return len(self.serving) + self._coming < self.wanted

    @property
    def fixed(self) -> bool:
        """Whether it stays as it began."""
        return self._terms.restarts == 0

    async def start(self, count: int) -> None:
        """Returns once all of them serve. Raises WorkerError where one cannot."""
        self.wanted = count
        hosts = [self._hiring.spawn(next(self._numbers)) for _ in range(count)]
        await asyncio.gather(*map(self._come, hosts))

    async def _come(self, host: Host) -> None:
        self._coming += 1
        try:
            await self._ready(host)
        finally:
            self._coming -= 1

    async def _ready(self, host: Host) -> None:
        await self._hiring.prepare(host)
        if len(self.serving) < self.wanted:
            await self.welcome(host)
        else:
            await self._hiring.release(host)  # fewer are wanted by now

    async def _join_at_once(self, host: Host) -> None:
        self.join(host)

    def join(self, host: Host) -> None:
        if len(self.serving) >= self.wanted:  # fewer are wanted since it was welcomed
            self._soon(self._hiring.release(host))
            return
        self.serving.append(host)
        self.serving.sort(key=_number)
        self._soon(self._follow(host))
        self._tell()

    async def _follow(self, host: Host) -> None:
        try:
            await self._hiring.follow(host)
        except WorkerLost as error:
            self.lost(host, error)

    def _tell(self) -> None:
        for tell in self._told:
            tell()

    def lost(self, host: Host, error: WorkerLost) -> None:
        """It gets no more work and is ended; another comes in its place. Said once of each, however often it is
        heard."""
        if host in self.serving:
            self.losses += 1
            self.serving.remove(host)
            self._hiring.abandon(host)
            if self._is_short:
                self._replace(error)
            self._tell()

    def _replace(self, error: WorkerError) -> None:
        """One more, or what is to be said where there is none."""
        if spent := self._budget.take():
            pause = min(self._terms.backoff_s * 2 ** (spent - 1), LONGEST_PAUSE_S)
            most = self._terms.restarts
            self._terms.warn(f"{brief(error)}; another {self.role} worker takes its place (restart {spent} of {most})")
            self._hire_soon(pause)
            return
        most, left = self._terms.restarts, len(self.serving) + self._coming
        budget = f"the {most} restarts of its role (cluster.restarts) are used up" if most else "nobody takes its place"
        if left:
            self._terms.warn(
                f"{brief(error)}; {budget}: the run goes on with {left} {self.role} worker{'s' * (left > 1)}"
            )
            if most:
                self._soon(self._refill())
        else:
            self._failure = type(error)(f"no {self.role} worker is left, and {budget}: {error}" if most else str(error))
            self._tell()

    async def _refill(self) -> None:
        """As long as one is missing, each restart that comes back is made."""
        while self._is_short:
            await asyncio.sleep(self._terms.refill_s)
            if self._is_short and self._budget.take():
                self._hire_soon(0.0)

    def _hire_soon(self, pause_s: float) -> None:
        self._coming += 1
        self._soon(self._hire(pause_s))

    async def _hire(self, pause_s: float) -> None:
        """One of those that are counted as coming."""
        failure: WorkerError | None = None
        try:
            await asyncio.sleep(pause_s)
            host = self._hiring.spawn(next(self._numbers))
            try:
                await self._ready(host)
            except WorkerError as error:
                self._hiring.abandon(host)
                failure = error
        finally:
            self._coming -= 1
        if failure is not None and self._is_short:
            self._replace(failure)

    async def scale(self, count: int) -> None:
        """Returns once so many serve, and those that are too many are gone: the youngest first, each when what it has
        is done. Raises WorkerError where one cannot come; the others serve."""
        self.wanted = count
        missing = count - len(self.serving) - self._coming
        leaving, self.serving = self.serving[count:], self.serving[:count]
        self._tell()
        hosts = [self._hiring.spawn(next(self._numbers)) for _ in range(missing)]
        found = await asyncio.gather(*map(self._come_or_go, hosts), *map(self._leave, leaving), return_exceptions=True)
        for error in found:
            if isinstance(error, BaseException):
                self.wanted = len(self.serving) + self._coming
                raise error

    async def _come_or_go(self, host: Host) -> None:
        try:
            await self._come(host)
        except WorkerError:
            self._hiring.abandon(host)
            raise

    async def _leave(self, host: Host) -> None:
        """What it has not finished by `drain_s` goes back to the others."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._terms.drain_s):
                while self.busy(host):
                    self._done.clear()
                    await self._done.wait()
        await self._hiring.release(host)

    def work_done(self) -> None:
        """Said by whoever deals work, whenever some is done."""
        self._done.set()

    def _soon(self, doing: Any) -> None:
        task = asyncio.ensure_future(doing)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error if isinstance(error, WorkerError) else WorkerError(f"{self.role}: {error!r}")
            self._tell()

    async def close(self) -> None:
        """Nobody comes any more."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _number(host: Host) -> int:
    return int(host.name.rpartition(" ")[2])
