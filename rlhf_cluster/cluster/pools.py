"""Pools of workers that are all alike and keep nothing between calls: scorers and references."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

from rlhf_cluster.cluster.crew import Crew
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.waits import WorkerError, WorkerLost, brief
from rlhf_cluster.records import QUARANTINED, RefLogprobs, Rollouts, Scores

CALLS_AHEAD = 2  # of a worker: the one that it is at, and one that it finds when that is done
PATIENCE = (
    2  # workers that may be lost over a table before it is halved, and over one of its rows before that is given up
)


class Pool:
    """Each call goes to the worker with the fewest rows outstanding; where all have `CALLS_AHEAD` calls it waits here,
    and its deadline has not begun. Where a worker is lost, another is asked."""

    def __init__(self, crew: Crew, deadline_s: float) -> None:
        self._crew, self._deadline_s = crew, deadline_s
        self._outstanding: dict[str, list[int]] = defaultdict(list)  # rows of each call, by worker
        self._changed = asyncio.Event()
        crew.busy = lambda host: len(self._outstanding[host.name])
        crew.on_change(self._changed.set)

    async def call(self, verb: str, rollouts: Rollouts, lost: int = 0) -> Any:
        """`lost`: workers that were, while they had it. What one row did to them is not known of a table: after
        `PATIENCE` of them it is asked about in halves, until a row stands alone."""
        error = await self._ask(verb, rollouts)
        if not isinstance(error, WorkerLost):
            return error
        if lost + 1 < PATIENCE or (len(rollouts) == 1 and lost + 1 < 2 * PATIENCE):
            return await self.call(verb, rollouts, lost + 1)
        if len(rollouts) == 1:
            return self.given_up(rollouts, error)
        middle = len(rollouts) // 2
        halves = [rollouts.slice(0, middle), rollouts.slice(middle, len(rollouts))]
        answers = await asyncio.gather(*(self.call(verb, half, PATIENCE - 1) for half in halves))
        return type(answers[0]).concat(answers)

    async def _ask(self, verb: str, rollouts: Rollouts) -> Any:
        """The answer, or what the worker was lost by."""
        host = await self._free()
        calls = self._outstanding[host.name]
        calls.append(len(rollouts))
        try:
            return await host.ask(verb, rollouts, deadline_s=self._deadline_s)
        except WorkerLost as error:
            self._crew.lost(host, error)
            return error
        finally:
            calls.remove(len(rollouts))
            self._changed.set()
            self._crew.work_done()

    async def _free(self) -> Host:
        while True:
            self._crew.require()
            free = [host for host in self._crew.serving if len(self._outstanding[host.name]) < CALLS_AHEAD]
            if free:
                return min(free, key=lambda host: sum(self._outstanding[host.name]))
            self._changed.clear()
            await self._changed.wait()

    def given_up(self, rollouts: Rollouts, error: WorkerLost) -> Any:
        """The answer about a row that worker after worker was lost over."""
        raise WorkerError(
            f"sample {rollouts.sample_id[0]}: {2 * PATIENCE} workers were lost over it; the last: {error}"
        )


class RewardPool(Pool):
    """Keeps `rooms.RewardModel`."""

    async def score(self, rollouts: Rollouts) -> Scores:
        return await self.call("score", rollouts)

    def given_up(self, rollouts: Rollouts, error: WorkerLost) -> Scores:
        why = f"{QUARANTINED}: scorers were lost over it, the last: {brief(error)}"
        return Scores.of({"sample_id": rollouts.sample_id, "score": [0.0], "failure": [why]})


class ReferencePool(Pool):
    """Keeps `rooms.Reference`."""

    async def logprobs(self, rollouts: Rollouts) -> RefLogprobs:
        return await self.call("logprobs", rollouts)
