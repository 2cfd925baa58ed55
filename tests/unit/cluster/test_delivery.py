"""When a worker may sample from a version: what others compute with, what the learner says, and a second try. The
workers here answer what a test lays down; real ones stand in `tests/cluster/`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from rlhf_cluster.cluster.delivery import Delivery, WeightChannel
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.waits import WorkerError
from rlhf_cluster.config import WeightsConfig
from rlhf_cluster.weights.probe import Probe
from rlhf_cluster.weights.snapshot import Snapshot, SnapshotError

PROBE = Probe((1, 2), (3, 4), (-1.0, -2.0))
AGAIN = ["pause", "fetch again", "load"]
GOOD, BAD = {"0:a": "1", "0:b": "2"}, {"0:a": "1", "0:b": "9"}


@dataclass
class Worker:
    """A generation worker that has these digests after each load and is so far from the learner at each probe."""

    name: str
    loads: list[dict[str, str]] = field(default_factory=lambda: [GOOD])
    probes: list[float] = field(default_factory=lambda: [0.01])
    called: list[str] = field(default_factory=list)
    held: dict[str, str] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)  # what its next fetches fail with
    dies_in: str = ""

    @property
    def host(self) -> Host:
        verbs = {"fetch": self._fetch, "load": self._load, "pause": self._pause}
        verbs |= {"digests": self._digests, "resume": self._resume, "probe": self._probe}
        verbs |= {self.dies_in: self._die} if self.dies_in else {}
        actor = SimpleNamespace(**{verb: SimpleNamespace(remote=called) for verb, called in verbs.items()})
        return Host(self.name, actor, Path("its.log"))

    async def _fetch(self, store: Any, snapshot: Snapshot, place: tuple[str, str, int], again: bool) -> int:
        assert place == ("node", "run", 1)
        self.called.append("fetch again" if again else "fetch")
        if self.damaged:
            raise RayTaskError("fetch", "", SnapshotError(self.damaged.pop(0)))
        return 100

    async def _die(self, *args: Any) -> None:
        raise ActorDiedError()

    async def _pause(self) -> None:
        self.called.append("pause")

    async def _load(self) -> None:
        self.called.append("load")
        self.held = self.loads.pop(0)

    async def _digests(self) -> dict[str, str]:
        return self.held

    async def _resume(self) -> float:
        self.called.append("resume")
        return 0.5

    async def _probe(self, probe: Probe) -> float:
        assert probe == PROBE
        self.called.append("probe")
        return self.probes.pop(0)


@dataclass
class Delivered:
    metrics: dict[str, float]
    lost: dict[str, str]

    def __getitem__(self, name: str) -> float:
        return self.metrics[name]


def delivered(*workers: Worker, probe: Probe | None = None, witness: Worker | None = None) -> Delivered:
    channel = WeightChannel(Host("store", SimpleNamespace(), Path()), "node", "/", "run", 1, WeightsConfig())
    seen = None if witness is None else witness.host
    delivery = Delivery(channel, Snapshot(7, "/", (), probe), deadline_s=10, witness=seen)
    metrics = asyncio.run(delivery.to([worker.host for worker in workers]))
    return Delivered(metrics, {host.name: str(error) for host, error in delivery.lost})


def deliver(*workers: Worker, probe: Probe | None = None) -> dict[str, float]:
    found = delivered(*workers, probe=probe)
    assert not found.lost
    return found.metrics


def test_workers_that_hold_alike_sample_on() -> None:
    workers = [Worker("generation 0"), Worker("generation 1")]
    found = deliver(*workers)
    assert [worker.called for worker in workers] == [["fetch", "load", "resume"]] * 2
    assert found.pop("sync/seconds") > 0
    assert found == {"sync/bytes": 200, "sync/paused_s": 0.5, "sync/loaded_again": 0}


def test_one_that_differs_loads_again_before_it_samples() -> None:
    other = Worker("generation 1", [BAD, GOOD])
    found = deliver(Worker("generation 0", [GOOD, GOOD]), other)  # of two, nobody knows which is wrong
    assert other.called == ["fetch", "load", *AGAIN, "resume"]
    assert found["sync/loaded_again"] == 2 and found["sync/bytes"] == 400


@pytest.mark.parametrize("wrong", range(3))
def test_of_three_the_one_that_differs_is_the_wrong_one_though_it_be_the_first(wrong: int) -> None:
    """And nobody samples before it is right."""
    workers = [Worker(f"generation {i}", [BAD, GOOD] if i == wrong else [GOOD]) for i in range(3)]
    found = deliver(*workers)
    for i, worker in enumerate(workers):
        assert worker.called == ["fetch", "load", *(AGAIN if i == wrong else []), "resume"]
    assert found["sync/loaded_again"] == 1


def test_what_comes_damaged_is_brought_once_more_before_anything_is_loaded() -> None:
    one, other = Worker("generation 0"), Worker("generation 1", damaged=["bucket 3 is not what was published"])
    deliver(one, other)
    assert one.called == ["fetch", "load", "resume"] and other.called == ["fetch", "fetch again", "load", "resume"]
    twice = Worker("generation 1", damaged=["bucket 3 is not what was published"] * 2)
    with pytest.raises(WorkerError, match=r"generation 1 failed in `fetch`: SnapshotError: bucket 3 is not what was"):
        deliver(Worker("generation 0"), twice)
    assert "load" not in twice.called, "the old weights still serve"


DIFFERS = (
    "generation 1 computes with other weights of version 7 than generation 0 does in 1 modules (0:b); "
    "loading them once more did not mend it (its log: its.log)"
)


def test_one_that_differs_twice_is_lost_and_never_samples() -> None:
    other, right = Worker("generation 1", [BAD, BAD]), [Worker("generation 0"), Worker("generation 2")]
    assert delivered(*right, other).lost == {"generation 1": DIFFERS}
    assert "resume" not in other.called and [worker.called[-1] for worker in right] == ["resume", "resume"]


def test_where_nobody_can_be_told_right_from_wrong_the_run_ends() -> None:
    with pytest.raises(WorkerError, match="computes with other weights of version 7 than"):
        deliver(Worker("generation 0", [GOOD, GOOD]), Worker("generation 1", [BAD, BAD]))


def test_a_joiner_is_compared_with_one_that_serves() -> None:
    witness = Worker("generation 0", held=GOOD)
    assert delivered(Worker("generation 2"), witness=witness).lost == {}
    assert delivered(joiner := Worker("generation 1", [BAD, GOOD]), witness=witness).lost == {}
    assert joiner.called == ["fetch", "load", *AGAIN, "resume"]
    assert delivered(Worker("generation 1", [BAD, BAD]), witness=witness).lost == {"generation 1": DIFFERS}
    assert witness.called == []


@pytest.mark.parametrize("verb", ["fetch", "load", "digests", "resume", "probe"])
def test_one_that_dies_on_the_way_is_left_behind(verb: str) -> None:
    workers = [Worker(f"generation {i}") for i in range(3)]
    workers[1].dies_in = verb
    found = delivered(*workers, probe=PROBE)
    assert list(found.lost) == ["generation 1"] and f"generation 1 died during `{verb}`" in found.lost["generation 1"]
    for survivor in workers[::2]:
        assert survivor.called == ["fetch", "load", "resume", "probe"]


def test_where_all_die_nothing_is_said_of_them() -> None:
    worker = Worker("generation 0", dies_in="load")
    found = delivered(worker)
    assert list(found.lost) == ["generation 0"] and found["sync/paused_s"] == 0


def test_a_probe_is_compared_with_the_learner() -> None:
    workers = [Worker("generation 0", probes=[0.02]), Worker("generation 1", probes=[0.05])]
    found = deliver(*workers, probe=PROBE)
    assert [worker.called for worker in workers] == [["fetch", "load", "resume", "probe"]] * 2
    assert found["sync/probe"] == 0.05


def test_one_that_is_far_from_the_learner_loads_again() -> None:
    worker = Worker("generation 0", [GOOD, GOOD], [float("nan"), 0.02])
    found = deliver(worker, probe=PROBE)
    assert worker.called == ["fetch", "load", "resume", "probe", *AGAIN, "resume", "probe"]
    assert (found["sync/probe"], found["sync/paused_s"], found["sync/loaded_again"]) == (0.02, 1.0, 1)


def test_engines_of_unlike_hardware_need_not_be_compared() -> None:
    channel = WeightChannel(Host("store", None, Path()), "node", "/", "run", 1, WeightsConfig(compare=False))
    workers = [Worker("generation 0"), Worker("generation 1", [BAD])]
    delivery = Delivery(channel, Snapshot(7, "/", (), None), deadline_s=10)
    found = asyncio.run(delivery.to([worker.host for worker in workers]))
    assert [worker.called for worker in workers] == [["fetch", "load", "resume"]] * 2 and found[
        "sync/loaded_again"
    ] == 0


def test_one_that_stays_far_ends_the_run() -> None:
    worker = Worker("generation 0", [GOOD, GOOD], [3.0, 2.5])
    said = (
        r"generation 0's logprobs are not the learner's with weights of version 7: 2.5 nats a token from them on a "
        r"response of 2, where weights.probe_tolerance=0.1; loading"
    )
    with pytest.raises(WorkerError, match=said):
        deliver(worker, probe=PROBE)


@pytest.mark.parametrize(("every", "probed"), [(0, []), (1, [1, 2, 3, 4]), (2, [2, 4])])
def test_every_so_many_versions_are_probed(every: int, probed: list[int]) -> None:
    channel = WeightChannel(Host("", None, Path()), "", "", "", 1, WeightsConfig(probe_every=every))
    assert [version for version in range(1, 5) if channel.is_probed(version)] == probed


def test_the_distance_is_the_mean_over_tokens() -> None:
    assert PROBE.distance([-1.5, -1.9]) == pytest.approx(0.3)
