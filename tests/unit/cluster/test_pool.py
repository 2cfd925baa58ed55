"""How calls are dealt out to workers that are all alike. The workers here answer when the test says so; real ones stand
in `tests/cluster/`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_cluster.cluster.clients import CALLS_AHEAD, Pool
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.waits import WorkerError


@dataclass
class Worker:
    """A host whose calls end when they are ended."""

    name: str
    calls: list[asyncio.Future[Any]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    @property
    def host(self) -> Host:
        return Host(self.name, SimpleNamespace(score=SimpleNamespace(remote=self._begin)), Path())

    def _begin(self, rows: list[int]) -> Awaitable[Any]:
        self.calls.append(asyncio.get_running_loop().create_future())
        self.rows.append(len(rows))
        return self.calls[-1]


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def asked(pool: Pool, *sizes: int) -> list[asyncio.Task[Any]]:
    calls = [asyncio.ensure_future(pool.call("score", [0] * size)) for size in sizes]
    await settled()
    return calls


def test_a_worker_has_one_call_ahead_and_the_rest_wait_here() -> None:
    async def scenario() -> None:
        workers = [Worker("reward 0"), Worker("reward 1")]
        calls = await asked(Pool([worker.host for worker in workers], 60.0), *[1] * 7)
        assert [len(worker.calls) for worker in workers] == [CALLS_AHEAD, CALLS_AHEAD]
        workers[1].calls[0].set_result("done")
        await settled()
        assert [len(worker.calls) for worker in workers] == [CALLS_AHEAD, CALLS_AHEAD + 1]
        for _ in range(2):
            for worker in workers:
                for call in worker.calls:
                    if not call.done():
                        call.set_result("done")
            await settled()
        assert [call.result() for call in calls] == ["done"] * 7

    asyncio.run(scenario())


def test_a_call_goes_to_the_worker_with_the_fewest_rows() -> None:
    async def scenario() -> None:
        workers = [Worker("reward 0"), Worker("reward 1")]
        calls = await asked(Pool([worker.host for worker in workers], 60.0), 5, 2, 2)
        assert [worker.rows for worker in workers] == [[5], [2, 2]]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(scenario())


def test_a_deadline_begins_when_a_worker_is_asked_and_a_place_is_given_back_where_it_passes() -> None:
    async def scenario() -> None:
        worker = Worker("reward 0")
        pool = Pool([worker.host], 0.2)
        calls = await asked(pool, *[1] * (CALLS_AHEAD + 1))
        with pytest.raises(WorkerError, match=r"reward 0 did not answer `score` within 0\.2 s"):
            await calls[0]
        await settled()
        assert len(worker.calls) == CALLS_AHEAD + 1  # only now
        worker.calls[-1].set_result("done")
        assert await calls[-1] == "done"
        await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(scenario())
