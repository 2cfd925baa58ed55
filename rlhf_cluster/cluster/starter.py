"""The workers of one attempt of a run: how they are made, placed, told to begin, and ended."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_cluster.cluster import worker_arguments
from rlhf_cluster.cluster.crew import Crew, Terms, note
from rlhf_cluster.cluster.delivery import WeightChannel
from rlhf_cluster.cluster.generation_host import GenerationHost
from rlhf_cluster.cluster.hosts import Host, spawn
from rlhf_cluster.cluster.pulse import Pulse
from rlhf_cluster.cluster.sampling import GenerationPool
from rlhf_cluster.cluster.waits import WorkerError
from rlhf_cluster.config import Resources, RunConfig
from rlhf_cluster.records import Pretraining
from rlhf_cluster.reference.worker import ReferenceWorker
from rlhf_cluster.scoring.worker import RewardWorker
from rlhf_cluster.telemetry.activity import Activity
from rlhf_cluster.telemetry.timer import Timeline
from rlhf_cluster.weights.snapshot import store_directory
from rlhf_cluster.weights.store import WeightStore, sweep

STORE = Resources(num_cpus=0.0)
STOP_S = 20.0  # what a vLLM engine has to end by itself


@dataclass(frozen=True)
class Attempt:
    """Which attempt of which run: what its workers, logs and shared memory are named after."""

    run: str
    number: int
    logs: Path
    timeline: Timeline = field(default_factory=Timeline)
    warn: Callable[[str], None] = note

    @property
    def state(self) -> Path:
        """Where the learner's state is kept from one iteration to the next."""
        return self.logs / "state"


@dataclass(frozen=True)
class PPOInputs:
    """What the workers of PPO begin with: plain Hugging Face directories, and text for a pretraining mix (empty: none).
    No reward model: a random or external reward."""

    policy: Path
    reference: Path
    reward_model: Path | None
    pretraining: Pretraining = field(default_factory=Pretraining.empty)


class Starter:
    """Spawns hosts of one attempt, remembers them, and ends them."""

    def __init__(self, cfg: RunConfig, attempt: Attempt) -> None:
        self.cfg, self.attempt = cfg, attempt
        self.hosts: list[Host] = []
        self.activity = Activity(attempt.timeline)
        self.crews: dict[str, Crew] = {}
        self.pulse = Pulse(cfg.cluster.pulse_s, cfg.cluster.silence_s)
        self.groups: list[Any] = []
        self._stores = itertools.count()

    def crew(self, role: str, resources: Resources, making: Making) -> Crew:
        """Of workers that are each placed for themselves, so that any of them may come and go alone."""
        cluster = self.cfg.cluster
        fixed = role == "generation" and self.cfg.weights.is_direct  # its engines met the learner at the start
        terms = Terms(
            0 if fixed else cluster.restarts,
            *(cluster.restart_refill_s, cluster.restart_backoff_s, cluster.drain_s),
            self.attempt.warn,
        )
        crew = self.crews[role] = Crew(role, Hired(self, role, resources, making), terms)
        return crew

    def generation_crew(self, policy: Path, version: int, adapter_rank: int = 0) -> Crew:
        def arguments(number: int) -> tuple[Any, ...]:
            incarnation = f"generation-{number}.{self.attempt.number}"
            return worker_arguments.of_generation(self.cfg, policy, incarnation, adapter_rank)

        making = Making(GenerationHost, arguments, ("start", version))
        return self.crew("generation", self.cfg.generation.resources, making)

    def reward_crew(self, policy: Path, reward_model: Path | None) -> Crew:
        """`policy`: whose tokens are read; `reward_model`: stage 2's, where there is one."""
        args = worker_arguments.of_reward(self.cfg, policy, reward_model)
        return self.crew("reward", self.cfg.reward.resources, Making(RewardWorker, lambda number: args))

    def reference_crew(self, policy: Path) -> Crew:
        args = worker_arguments.of_reference(self.cfg, policy)
        return self.crew("reference", self.cfg.reference.resources, Making(ReferenceWorker, lambda number: args))

    async def generation_alone(self, policy: Path) -> GenerationPool:
        """Generation workers that no learner publishes to."""
        channel, crew = await self.open_channel(), self.generation_crew(policy, 0)
        await crew.start(self.cfg.generation.resources.workers)
        return self.generation_pool(crew, channel)

    def generation_pool(self, crew: Crew, channel: WeightChannel) -> GenerationPool:
        cfg = self.cfg.generation
        return GenerationPool(crew, channel, self.cfg.cluster.call_timeout_s, cfg.max_num_seqs, cfg.flush_ms)

    async def open_channel(self, node: str = "") -> WeightChannel:
        """The weight store, on this node where one is named, in shared memory named after the attempt."""
        attempt = self.attempt
        directory = str(store_directory(attempt.run, attempt.number))
        place = NodeAffinitySchedulingStrategy(node, soft=False) if node else None
        args = (attempt.run, attempt.number, self.cfg.weights.keep)
        store = self.spawn(WeightStore, "store", next(self._stores), STORE, args, place)
        return WeightChannel(
            store, await self.ask(store, "ready"), directory, attempt.run, attempt.number, self.cfg.weights
        )

    def remove(self, group: Any) -> None:
        self.groups.remove(group)
        remove_placement_group(group)

    def spawn(
        self,
        worker: type,
        role: str,
        index: int,
        resources: Resources,
        args: tuple[Any, ...],
        place: Any = None,
    ) -> Host:
        log = self.attempt.logs / f"{role}-{index}.log"
        host = spawn(worker, f"{role} {index}", log, resources, args, place, role, self.activity)
        self.hosts.append(host)
        return host

    async def ask(self, host: Host, verb: str, *args: Any) -> Any:
        return await host.ask(verb, *args, deadline_s=self.cfg.cluster.start_timeout_s)

    async def end_one(self, host: Host) -> None:
        """A worker that holds more than its process is asked first: vLLM's own processes and semaphores, and shared
        memory on whatever node it is."""
        self.forget(host)
        await self._stop(host)
        ray.kill(host.actor)

    def kill(self, host: Host) -> None:
        """At once: it is lost. Ray asks a process to end, which one that hangs does not hear."""
        self.forget(host)
        ray.kill(host.actor)
        self.pulse.kill(host)

    def forget(self, host: Host) -> None:
        self.hosts.remove(host)
        self.activity.forget(host.name)

    async def _stop(self, host: Host) -> None:
        if host.name.startswith(("generation", "store")):
            try:
                await host.ask("stop", deadline_s=STOP_S)
            except WorkerError as error:
                logging.getLogger(__name__).warning("while ending: %s", error)

    async def end(self) -> None:
        """Ends every worker."""
        for crew in self.crews.values():
            await crew.close()
        await asyncio.gather(*map(self._stop, self.hosts))
        for host in self.hosts:
            ray.kill(host.actor)
        for group in self.groups:
            remove_placement_group(group)
        sweep(self.attempt.run)


@dataclass(frozen=True)
class Making:
    """What a worker of a role is made with, by its number, and what it is told before it serves."""

    worker: type
    arguments: Callable[[int], tuple[Any, ...]]
    begin: tuple[Any, ...] = ("ready",)


@dataclass(frozen=True)
class Hired:
    """Keeps `crew.Hiring` for a role of an attempt."""

    starter: Starter
    role: str
    resources: Resources
    of: Making

    def spawn(self, number: int) -> Host:
        return self.starter.spawn(self.of.worker, self.role, number, self.resources, self.of.arguments(number))

    async def prepare(self, host: Host) -> None:
        await self.starter.ask(host, *self.of.begin)

    async def follow(self, host: Host) -> NoReturn:
        await self.starter.pulse.follow(host)

    async def release(self, host: Host) -> None:
        await self.starter.end_one(host)

    def abandon(self, host: Host) -> None:
        self.starter.kill(host)
