"""Pools that change while a run goes on: as a person asks (`rlhf-cluster scale`), as the config schedules, and as a
policy sees fit that watches who waits for whom.

Changes are made one after the other, beside the loop: a joiner serves once it has the current weights, a leaver is done
first, and no batch waits for either.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import ray
from ray.autoscaler.sdk import request_resources

from rlhf_cluster.cluster.crew import Crew
from rlhf_cluster.cluster.hosts import reserved
from rlhf_cluster.cluster.waits import WorkerError
from rlhf_cluster.config import ClusterConfig, ConfigError, Resources, ScheduledPools
from rlhf_cluster.planning.autoscale import Autoscaler, Bounds
from rlhf_cluster.storage.requests import Answer, Requests
from rlhf_cluster.storage.run_directory import RunLayout
from rlhf_cluster.storage.run_lock import is_held

POLL_S = 1.0
POOLS = ("generation", "reward", "reference")
Counts = Mapping[str, int]


class Scaling:
    """Of the pools of one run. `resources`: of a worker of each, for Ray's autoscaler to provision by."""

    def __init__(
        self,
        crews: Mapping[str, Crew],
        resources: Mapping[str, Resources],
        cfg: ClusterConfig,
        requests: Requests,
        warn: Callable[[str], None],
    ) -> None:
        self._crews, self._resources, self._cfg = crews, resources, cfg
        self._requests, self._warn = requests, warn
        self._due: asyncio.Queue[tuple[Counts, str]] = asyncio.Queue()
        auto = cfg.autoscale
        bounds = Bounds(auto.least, auto.most, auto.learner_idle, auto.generation_idle, auto.cooldown)
        self._autoscaler = Autoscaler(bounds) if auto.most else None

    def begin(self, number: int) -> None:
        """Of a run that goes on with this iteration, what the schedule had for those before, and has for this one."""
        so_far = sorted((one for one in self._cfg.schedule if one.iteration <= number), key=lambda one: one.iteration)
        if counts := {role: count for entry in so_far for role, count in scheduled(entry).items()}:
            self._due.put_nowait((counts, "the schedule so far"))

    def iteration(self, number: int, metrics: Mapping[str, float]) -> None:
        """Said after each, from 1: what the schedule has for the next one, and what the policy makes of this one."""
        for entry in self._cfg.schedule:
            if entry.iteration == number + 1:
                self._due.put_nowait((scheduled(entry), f"the schedule of iteration {entry.iteration}"))
        # A role of which nobody works at the moment is not said to be idle.
        if self._autoscaler is not None and {"idle/learner", "idle/generation"} <= metrics.keys():
            now = self._crews["generation"].wanted
            wanted = self._autoscaler.look(now, metrics["idle/learner"], metrics["idle/generation"])
            if wanted != now:
                self._due.put_nowait(({"generation": wanted}, "autoscaling"))

    async def follow(self) -> NoReturn:
        """Makes what is due and what is asked for, as long as the run goes on."""
        while True:
            for request in self._requests.waiting():
                self._requests.answer(request, await self._granted(request.asked, "rlhf-cluster scale"))
            while not self._due.empty():
                await self._granted(*self._due.get_nowait())
            await asyncio.sleep(POLL_S)

    async def _granted(self, counts: Counts, why: str) -> Answer:
        """Whatever comes of it, the run goes on."""
        try:
            check(counts, self._crews)
            began = time.monotonic()
            self._provision(counts)
            for role, count in counts.items():
                before = len(self._crews[role].serving)
                await self._crews[role].scale(count)
                told = f"{role} {before} -> {count} workers in {time.monotonic() - began:.1f} s ({why})"
                self._warn(told)
        except (ConfigError, WorkerError) as error:
            self._warn(f"{why}: {error}")
            return Answer(False, str(error))
        return Answer(True, ", ".join(f"{role}={count}" for role, count in counts.items()))

    def _provision(self, counts: Counts) -> None:
        """What the run then needs, for Ray's autoscaler, where there is a cluster to grow. One such request stands for
        a whole cluster: of two runs that scale on one, the later one's counts."""
        if self._cfg.address != "local":
            wanted = {role: crew.wanted for role, crew in self._crews.items()} | dict(counts)
            request_resources(bundles=[reserved(self._resources[role]) for role, n in wanted.items() for _ in range(n)])

    def end(self) -> None:
        """Nothing more is provisioned for it."""
        if self._cfg.address != "local" and ray.is_initialized():
            request_resources(bundles=[])


def scheduled(entry: ScheduledPools) -> Counts:
    """Of the pools that it names."""
    return {role: count for role in POOLS if (count := getattr(entry, role))}


def check(counts: Counts, crews: Mapping[str, Crew]) -> None:
    """Raises ConfigError for what cannot be."""
    for role, count in counts.items():
        if role not in crews:
            raise ConfigError(f"{role}={count}: this run has pools of {', '.join(sorted(crews))}")
        if count < 1:
            raise ConfigError(f"{role}={count}: at least 1 worker is needed")
        if crews[role].fixed:
            raise ConfigError(
                f"{role}={count}: its workers met the learner at the start, for weights that come straight from it "
                "(weights.transport); pools change with weights.transport=shm"
            )


def ask(run: Path, counts: Counts, wait_s: float) -> str:
    """`counts` workers by pool, of the run in this directory; returns what its driver answers. Raises ConfigError where
    it refuses, or where there is no run that goes on, WorkerError where no answer comes."""
    layout = RunLayout(run)
    if not layout.holds_run:
        raise ConfigError(f"{run} is not the directory of a run that has begun")
    if not is_held(layout.lock):
        raise ConfigError(f"no driver runs {run}; the pools of a run that is not under way are set by its config")
    requests = Requests(layout.requests)
    request = requests.ask(counts)
    end = time.monotonic() + wait_s
    while (answer := requests.answer_to(request)) is None:
        if time.monotonic() > end:
            raise WorkerError(f"the driver of {run} has not answered within {wait_s:g} s; it may not be at PPO yet")
        if not is_held(layout.lock):
            raise WorkerError(f"the driver of {run} ended before it answered")
        time.sleep(POLL_S / 4)
    if not answer.granted:
        raise ConfigError(answer.said)
    return answer.said


def parse(words: list[str]) -> dict[str, int]:
    """`generation=4 reward=1`. Raises ConfigError."""
    counts = {}
    for word in words:
        role, _, count = word.partition("=")
        if role not in POOLS or not count.isdigit():
            raise ConfigError(f"{word}: it must be POOL=NUMBER, with a pool of {', '.join(POOLS)}")
        counts[role] = int(count)
    return counts
