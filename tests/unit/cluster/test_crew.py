"""Workers that come, go and are lost. They are made of nothing here; real ones stand in `tests/cluster/`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from rlhf_cluster.cluster.crew import Budget, Crew, Terms
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.waits import WorkerDied, WorkerError


@dataclass
class Hall:
    """Where workers of a test are hired: which of them cannot be prepared, and what became of them."""

    broken: set[int] = field(default_factory=set)
    told: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)
    hangs: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    slow: asyncio.Event | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def spawn(self, number: int) -> Host:
        return Host(f"reward {number}", SimpleNamespace(), Path())

    async def prepare(self, host: Host) -> None:
        if self.slow is not None:
            await self.slow.wait()
        if int(host.name[7:]) in self.broken:
            raise WorkerError(f"{host.name} cannot start")

    async def follow(self, host: Host) -> NoReturn:
        self.hangs[host.name] = asyncio.get_running_loop().create_future()
        await self.hangs[host.name]
        raise WorkerDied(f"{host.name} hangs")

    async def release(self, host: Host) -> None:
        self.released.append(host.name)
        self.gone.set()

    def abandon(self, host: Host) -> None:
        self.abandoned.append(host.name)

    def crew(self, restarts: int = 3, drain_s: float = 5.0) -> Crew:
        return Crew("reward", self, Terms(restarts, 1000.0, 0.001, drain_s, self.told.append))


def names(crew: Crew) -> list[str]:
    return [host.name for host in crew.serving]


async def until(crew: Crew, *wanted: str) -> None:
    changed = asyncio.Event()
    crew.on_change(changed.set)
    while names(crew) != list(wanted):
        changed.clear()
        await changed.wait()


def scenario(steps: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(steps, 10))


def lost(crew: Crew, name: str) -> None:
    crew.lost(next(host for host in crew.serving if host.name == name), WorkerDied(f"{name} died"))


def test_another_takes_the_place_of_one_that_is_lost_under_a_name_of_its_own() -> None:
    async def steps() -> None:
        hall = Hall()
        crew = hall.crew()
        heard: list[list[str]] = []
        await crew.start(2)
        crew.on_change(lambda: heard.append(names(crew)))
        host = crew.serving[0]
        crew.lost(host, WorkerDied("reward 0 died"))
        crew.lost(host, WorkerDied("reward 0 died"))  # all that it was asked says so
        assert names(crew) == ["reward 1"] and hall.abandoned == ["reward 0"]
        await until(crew, "reward 1", "reward 2")
        assert heard == [["reward 1"], ["reward 1", "reward 2"]] and crew.losses == 1
        assert hall.told == ["reward 0 died; another reward worker takes its place (restart 1 of 3)"]
        await crew.close()

    scenario(steps())


def test_one_that_cannot_start_is_tried_again_as_far_as_the_budget_goes() -> None:
    async def steps() -> None:
        hall = Hall(broken={2, 3})
        crew = hall.crew()
        await crew.start(2)
        lost(crew, "reward 0")
        await until(crew, "reward 1", "reward 4")
        assert [sentence.partition(";")[0] for sentence in hall.told] == [
            "reward 0 died",
            "reward 2 cannot start",
            "reward 3 cannot start",
        ]
        lost(crew, "reward 4")
        assert hall.told[-1] == (
            "reward 4 died; the 3 restarts of its role (cluster.restarts) are used up: the run goes on with 1 reward "
            "worker"
        )
        crew.require()
        lost(crew, "reward 1")
        with pytest.raises(WorkerDied, match=r"no reward worker is left, and the 3 restarts .* used up: reward 1 died"):
            crew.require()
        await crew.close()

    scenario(steps())


def test_two_that_are_lost_at_once_are_not_the_last_while_one_is_on_its_way() -> None:
    async def steps() -> None:
        hall = Hall()
        crew = hall.crew(restarts=1)
        await crew.start(2)
        for name in ("reward 0", "reward 1"):
            lost(crew, name)
        crew.require()
        await until(crew, "reward 2")
        await crew.close()

    scenario(steps())


def test_one_that_hangs_is_lost_without_being_asked_anything() -> None:
    async def steps() -> None:
        hall = Hall()
        crew = hall.crew()
        await crew.start(1)
        await asyncio.sleep(0)
        hall.hangs["reward 0"].set_result(None)
        await until(crew, "reward 1")
        assert hall.abandoned == ["reward 0"] and "reward 0 hangs" in hall.told[0]
        await crew.close()

    scenario(steps())


def test_more_and_fewer() -> None:
    async def steps() -> None:
        hall = Hall()
        crew = hall.crew()
        await crew.start(1)
        await crew.scale(3)
        assert names(crew) == ["reward 0", "reward 1", "reward 2"]
        busy = {"reward 2": 1}
        crew.busy = lambda host: busy.get(host.name, 0)
        leaving = asyncio.ensure_future(crew.scale(1))
        await asyncio.sleep(0.01)
        assert names(crew) == ["reward 0"] and hall.released == ["reward 1"] and not leaving.done()
        busy.clear()
        crew.work_done()
        await leaving
        assert hall.released == ["reward 1", "reward 2"] and hall.abandoned == [] and hall.told == []
        await crew.close()

    scenario(steps())


def test_a_leaver_that_is_never_done_leaves_all_the_same() -> None:
    async def steps() -> None:
        hall = Hall()
        crew = hall.crew(drain_s=0.01)
        await crew.start(2)
        crew.busy = lambda host: 1
        await crew.scale(1)
        assert hall.released == ["reward 1"]
        await crew.close()

    scenario(steps())


def test_one_that_cannot_come_is_said_and_the_others_serve() -> None:
    async def steps() -> None:
        hall = Hall(broken={2})
        crew = hall.crew()
        await crew.start(1)
        with pytest.raises(WorkerError, match="reward 2 cannot start"):
            await crew.scale(3)
        assert names(crew) == ["reward 0", "reward 1"] and crew.wanted == 2
        assert hall.abandoned == ["reward 2"]
        await crew.close()

    scenario(steps())


def test_one_that_is_no_longer_wanted_when_it_is_ready_goes_again() -> None:
    async def steps() -> None:
        hall = Hall()
        crew = hall.crew()
        await crew.start(2)
        hall.slow = asyncio.Event()
        lost(crew, "reward 1")
        await asyncio.sleep(0.01)
        await crew.scale(1)
        hall.slow.set()
        await hall.gone.wait()
        assert names(crew) == ["reward 0"] and hall.released == ["reward 2"]
        await crew.close()

    scenario(steps())


def test_a_start_that_fails_is_an_error() -> None:
    async def steps() -> None:
        with pytest.raises(WorkerError, match="reward 1 cannot start"):
            await Hall(broken={1}).crew().start(2)

    scenario(steps())


def test_a_budget_fills_again_one_by_one() -> None:
    now = [0.0]
    budget = Budget(2, 100.0, lambda: now[0])
    assert [budget.take(), budget.take(), budget.take()] == [1, 2, 0]
    now[0] = 99.0
    assert budget.take() == 0
    now[0] = 100.0
    assert [budget.take(), budget.take()] == [2, 0]
    now[0] = 300.0
    assert [budget.take(), budget.take(), budget.take()] == [1, 2, 0]
