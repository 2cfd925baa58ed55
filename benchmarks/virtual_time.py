"""An asyncio loop whose clock does not wait: where all are asleep it jumps to whoever wakes first. What this process
computes counts as it is, but for what is told to be somebody else's work."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Clock:
    """Seconds of CPU, by whose they are."""

    def __init__(self) -> None:
        self.others = 0.0
        self._began = time.process_time()

    @contextmanager
    def of_others(self) -> Iterator[None]:
        """Around what is computed here and would be computed elsewhere."""
        began = time.process_time()
        yield
        self.others += time.process_time() - began

    def own(self) -> float:
        return time.process_time() - self._began - self.others


class _Jumping(selectors.SelectSelector):
    """Nothing comes from outside, so that whoever waits waits for the clock alone."""

    jumped = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("everybody waits and nobody will wake")
        self.jumped += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()`: own CPU seconds, and the seconds that were jumped over."""

    def __init__(self, clock: Clock) -> None:
        self._jumping = _Jumping()
        self._clock = clock
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.jumped + self._clock.own()


def run(main: Coroutine[Any, Any, T], clock: Clock) -> T:
    """As `asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
        return runner.run(main)
