"""Every wait on another process, each with a deadline; one that passes says who, in what, and the last lines of its
log."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rlhf_cluster.interrupts import first_cause

LOG_LINES = 12
LAST_LINES = "; the last lines of "
ENGINE_DEAD = "EngineDeadError"  # vLLM's; the worker's own process lives
LOW_ON_MEMORY = re.compile(r"low on memory.*? was ([\d.]+ ?GB) used / ([\d.]+ ?GB)", re.DOTALL)  # in Ray's words


class WorkerError(RuntimeError):
    """A worker failed, died or did not answer in time; the message names it."""


class WorkerLost(WorkerError):
    """Nothing more is to be had of the worker: what was asked of it may be asked of another."""


class WorkerDied(WorkerLost):
    """The worker's process is gone, or the engine that it samples with."""


class WorkerSilent(WorkerLost):
    """The worker did not answer in time."""


def brief(error: WorkerError) -> str:
    """Its log is named, not quoted."""
    said, _, log = str(error).partition(LAST_LINES)
    return f"{said} (its log: {log.partition(':')[0]})" if log else said


def out_of_memory(error: BaseException) -> str:
    """Why Ray ended a process, where that was for want of memory on its node; else nothing."""
    found = LOW_ON_MEMORY.search(str(error))
    if found is None:
        return ""
    return (
        f"its node's memory was nearly full ({found[1]} of {found[2]} used), and Ray ended it; lower "
        "tokens_per_micro_batch or the number of workers, end what else runs there, or use a larger machine"
    )


@dataclass(frozen=True)
class Call:
    """What is being waited for: a verb of a worker, and where that worker logs."""

    worker: str
    verb: str
    log: Path | None = None

    def failed(self, error: BaseException, deadline_s: float) -> WorkerError:
        """The error to raise instead of Ray's."""
        if isinstance(error, GetTimeoutError | asyncio.TimeoutError) and not isinstance(error, RayTaskError):
            return WorkerSilent(f"{self.worker} did not answer `{self.verb}` within {deadline_s:g} s{self._tail()}")
        if memory := out_of_memory(error):
            return WorkerDied(f"{self.worker} died during `{self.verb}`: {memory}")
        if isinstance(error, RayActorError):
            return WorkerDied(f"{self.worker} died during `{self.verb}`{self._tail()}")
        cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
        cause = first_cause(cause)
        if type(cause).__name__ == ENGINE_DEAD:
            return WorkerDied(f"{self.worker}'s engine died during `{self.verb}`{self._tail()}")
        its_log = f" (its log: {self.log})" if self.log else ""
        return WorkerError(f"{self.worker} failed in `{self.verb}`: {type(cause).__name__}: {cause}{its_log}")

    def _tail(self) -> str:
        return last_lines(self.log)


def last_lines(log: Path | None) -> str:
    """As the end of a sentence; nothing where there is no log."""
    if log is None or not log.is_file():
        return ""
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return f"{LAST_LINES}{log}:\n" + "\n".join(f"  {line}" for line in lines)


def get(reference: Any, call: Call, deadline_s: float) -> Any:
    """Waits, in a thread that may block."""
    try:
        return ray.get(reference, timeout=deadline_s)
    except RayError as error:
        raise call.failed(error, deadline_s) from error


async def answer(reference: Any, call: Call, deadline_s: float) -> Any:
    """Waits, in a coroutine."""
    try:
        return await asyncio.wait_for(_awaited(reference), deadline_s)
    except (TimeoutError, RayError) as error:
        raise call.failed(error, deadline_s) from error


async def _awaited(reference: Any) -> Any:
    return await reference


async def _next(stream: AsyncIterator[Any]) -> Any:
    return await (await anext(stream))


async def answers(references: AsyncIterator[Any], call: Call, deadline_s: float) -> AsyncIterator[Any]:
    """Items of a streaming call as they come, each within the deadline."""
    stream = aiter(references)
    while True:
        try:
            item = await asyncio.wait_for(_next(stream), deadline_s)
        except StopAsyncIteration:
            return
        except (TimeoutError, RayError) as error:
            raise call.failed(error, deadline_s) from error
        yield item
