"""What a person, the schedule or the policy asks of the pools, and what comes of it. The crews here count; real ones
stand in `tests/cluster/`."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.cluster import scaling
from rlhf_cluster.cluster.scaling import Scaling
from rlhf_cluster.cluster.waits import WorkerError
from rlhf_cluster.config import AutoscaleConfig, ClusterConfig, ConfigError, Resources, ScheduledPools
from rlhf_cluster.storage.requests import Answer, Requests
from rlhf_cluster.storage.run_directory import RunDirectory


@dataclass
class Counted:
    """A crew as far as scaling sees it."""

    wanted: int = 1
    fixed: bool = False
    fails: str = ""
    asked: list[int] = field(default_factory=list)

    @property
    def serving(self) -> list[int]:
        return list(range(self.wanted))

    async def scale(self, count: int) -> None:
        if self.fails:
            raise WorkerError(self.fails)
        self.asked.append(count)
        self.wanted = count


def made(directory: Path, said: list[str], cfg: ClusterConfig, **crews: Any) -> Scaling:
    return Scaling(crews, dict.fromkeys(crews, Resources()), cfg, Requests(directory), said.append)


async def turn(scaling_of: Scaling) -> None:
    following = asyncio.ensure_future(scaling_of.follow())
    await asyncio.sleep(0.05)
    following.cancel()


def test_a_request_is_granted_and_answered_once(tmp_path: Path) -> None:
    requests, said = Requests(tmp_path), list[str]()
    crew = Counted()
    request = requests.ask({"generation": 3})
    assert requests.answer_to(request) is None
    asyncio.run(turn(made(tmp_path, said, ClusterConfig(), generation=crew, reward=Counted())))
    assert requests.answer_to(request) == Answer(True, "generation=3") and crew.asked == [3]
    assert requests.waiting() == [] and "generation 1 -> 3 workers in" in said[0]


@pytest.mark.parametrize(
    ("counts", "crews", "why"),
    [
        ({"reference": 1}, {"generation": Counted()}, r"reference=1: this run has pools of generation"),
        ({"generation": 0}, {"generation": Counted()}, r"generation=0: at least 1 worker is needed"),
        ({"generation": 2}, {"generation": Counted(fixed=True)}, r"generation=2: its workers met the learner at"),
        ({"generation": 2}, {"generation": Counted(fails="generation 1 cannot start")}, "generation 1 cannot start"),
    ],
)
def test_what_cannot_be_is_answered_with_why_and_the_run_goes_on(
    tmp_path: Path, counts: dict[str, int], crews: dict[str, Counted], why: str
) -> None:
    request = Requests(tmp_path).ask(counts)
    asyncio.run(turn(made(tmp_path, [], ClusterConfig(), **crews)))
    answer = Requests(tmp_path).answer_to(request)
    assert answer is not None and not answer.granted and answer.said.startswith(why)


SCHEDULE = [ScheduledPools(3, generation=2), ScheduledPools(5, generation=1, reward=2)]


@pytest.mark.parametrize(("begins", "generation", "reward"), [(1, [2, 1], [2]), (4, [2, 1], [2]), (9, [1], [2])])
def test_a_schedule_is_kept_also_by_a_run_that_goes_on(
    tmp_path: Path, begins: int, generation: list[int], reward: list[int]
) -> None:
    crews = {"generation": Counted(), "reward": Counted()}
    scaler = made(tmp_path, [], ClusterConfig(schedule=SCHEDULE), **crews)

    async def iterations() -> None:
        scaler.begin(begins)
        await turn(scaler)
        for iteration in range(begins, 7):
            scaler.iteration(iteration, {})
            await turn(scaler)

    asyncio.run(iterations())
    assert (crews["generation"].asked, crews["reward"].asked) == (generation, reward)


def test_the_policy_looks_at_who_waited(tmp_path: Path) -> None:
    crew = Counted()
    scaler = made(tmp_path, [], ClusterConfig(autoscale=AutoscaleConfig(most=2)), generation=crew)

    async def iterations() -> None:
        scaler.iteration(1, {"idle/learner": 0.8, "idle/generation": 0.0})
        await turn(scaler)

    asyncio.run(iterations())
    assert crew.asked == [2]


def test_the_policy_waits_while_nobody_works(tmp_path: Path) -> None:
    """A role all of whose workers are lost at the moment is not said to be idle."""
    crew = Counted()
    scaler = made(tmp_path, [], ClusterConfig(autoscale=AutoscaleConfig(most=2)), generation=crew)
    scaler.iteration(1, {"idle/learner": 0.8})
    assert crew.asked == []


def test_what_a_person_types() -> None:
    assert scaling.parse(["generation=4", "reward=1"]) == {"generation": 4, "reward": 1}
    for word in ("generation", "learners=2", "generation=-1", "generation=two"):
        with pytest.raises(ConfigError, match=f"{word}: it must be POOL=NUMBER"):
            scaling.parse([word])


def test_a_person_waits_for_the_driver_s_answer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the directory of a run that has begun"):
        scaling.ask(tmp_path, {"generation": 2}, 1)
    with RunDirectory(tmp_path / "run") as directory:
        directory.write_config("{}", [])
        requests = Requests(directory.requests)

        def driver() -> None:
            while not (waiting := requests.waiting()):
                answered.wait(0.01)
            requests.answer(waiting[0], Answer(True, "generation=2"))

        answered = threading.Event()
        driving = threading.Thread(target=driver)
        driving.start()
        assert scaling.ask(directory.path, {"generation": 2}, 20) == "generation=2"
        driving.join()
        with pytest.raises(WorkerError, match=r"has not answered within 0\.1 s"):
            scaling.ask(directory.path, {"generation": 2}, 0.1)
    with pytest.raises(ConfigError, match="no driver runs"):
        scaling.ask(tmp_path / "run", {"generation": 2}, 1)
