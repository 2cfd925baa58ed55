"""Starts the workers of a stage, waits until they serve, hands out their clients, and ends them.

All workers of a stage start at once; the slowest decides. Leaving ends every one of them, whatever happened.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from rlhf_cluster.cluster import worker_arguments
from rlhf_cluster.cluster.clients import GenerationPool, LearnerGroup, ReferencePool, RewardPool
from rlhf_cluster.cluster.delivery import WeightChannel
from rlhf_cluster.cluster.generation_host import GenerationHost
from rlhf_cluster.cluster.hosts import Host, reserved, set_apart, spawn
from rlhf_cluster.cluster.learner_host import LearnerHost
from rlhf_cluster.cluster.waits import Call, answer
from rlhf_cluster.config import Resources, RunConfig
from rlhf_cluster.records import Pretraining
from rlhf_cluster.reference.worker import ReferenceWorker
from rlhf_cluster.rooms import NoReference, Rooms
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


@dataclass(frozen=True)
class PPOInputs:
    """What the workers of PPO begin with: plain Hugging Face directories, and text for a pretraining mix (empty: none).
    No reward model: a random or external reward."""

    policy: Path
    reference: Path
    reward_model: Path | None
    pretraining: Pretraining = field(default_factory=Pretraining.empty)


@dataclass(frozen=True)
class OpenRooms:
    """The rooms of a PPO run, with what only the wiring needs."""

    rooms: Rooms
    learner: LearnerGroup
    hosts: list[Host]
    activity: Activity

    async def peak_memory(self) -> Mapping[str, int]:
        """Bytes by worker, the processes that it started included."""
        asked = [host.ask("peak_memory", deadline_s=60) for host in self.hosts]
        return dict(zip((host.name for host in self.hosts), await asyncio.gather(*asked), strict=True))


class Starter:
    """Spawns hosts of one attempt and remembers them."""

    def __init__(self, cfg: RunConfig, attempt: Attempt) -> None:
        self.cfg, self.attempt = cfg, attempt
        self.hosts: list[Host] = []
        self.activity = Activity(attempt.timeline)
        self._groups: list[Any] = []

    def start(self, worker: type, role: str, resources: Resources, args: tuple[Any, ...]) -> list[Host]:
        """`resources.workers` workers of one role, each placed for itself, so that any of them may go alone."""
        return [self._spawn(worker, role, index, resources, args) for index in range(resources.workers)]

    def start_generation(self, policy: Path, version: int, adapter_rank: int = 0) -> tuple[list[Host], list[Any]]:
        cfg = self.cfg
        hosts = []
        for index in range(cfg.generation.resources.workers):
            incarnation = f"generation-{index}.{self.attempt.number}"
            args = worker_arguments.of_generation(cfg, policy, incarnation, adapter_rank)
            hosts.append(self._spawn(GenerationHost, "generation", index, cfg.generation.resources, args))
        return hosts, [self._ask(host, "start", version) for host in hosts]

    async def generation_alone(self, policy: Path) -> GenerationPool:
        """Generation workers that no learner publishes to."""
        channel = await self.open_channel()
        hosts, starting = self.start_generation(policy, 0)
        await asyncio.gather(*starting)
        return self.generation_pool(hosts, channel)

    def generation_pool(self, hosts: list[Host], channel: WeightChannel) -> GenerationPool:
        cfg = self.cfg.generation
        return GenerationPool(hosts, channel, self.cfg.cluster.call_timeout_s, cfg.max_num_seqs, cfg.flush_ms)

    def start_reward(self, policy: Path, reward_model: Path | None) -> list[Host]:
        """`policy`: whose tokens are read; `reward_model`: stage 2's, where there is one."""
        args = worker_arguments.of_reward(self.cfg, policy, reward_model)
        return self.start(RewardWorker, "reward", self.cfg.reward.resources, args)

    async def start_learner(self, inputs: PPOInputs) -> tuple[list[Host], WeightChannel]:
        """All ranks in one placement group, so that they start together or not at all, and the weight store beside
        rank 0."""
        cfg, resources = self.cfg, self.cfg.learner.resources
        group = placement_group([reserved(resources) | set_apart("learner")] * resources.workers, strategy="PACK")
        self._groups.append(group)
        await answer(group.ready(), Call("learner", "placement"), cfg.cluster.start_timeout_s)
        args = worker_arguments.of_learner(cfg)
        hosts = [
            self._spawn(LearnerHost, "learner", index, resources, args, group, index)
            for index in range(resources.workers)
        ]
        endpoint = await self._ask(hosts[0], "endpoint")
        text = ray.put(inputs.pretraining)  # once for all ranks
        starting = (len(hosts), endpoint, cfg.cluster.call_timeout_s, inputs.policy, inputs.reward_model, text)
        channel, *_ = await asyncio.gather(
            self.open_channel(group),
            *(self._ask(host, "start", rank, *starting) for rank, host in enumerate(hosts)),
        )
        return hosts, channel

    async def open_channel(self, group: Any = None) -> WeightChannel:
        """The weight store, where `group` says on rank 0's node, in shared memory named after the attempt."""
        attempt = self.attempt
        directory = str(store_directory(attempt.run, attempt.number))
        store = self._spawn(WeightStore, "store", 0, STORE, (attempt.run, attempt.number, self.cfg.weights.keep), group)
        node = await self._ask(store, "ready")
        return WeightChannel(store, node, directory, attempt.run, attempt.number, self.cfg.weights)

    def _spawn(
        self,
        worker: type,
        role: str,
        index: int,
        resources: Resources,
        args: tuple[Any, ...],
        group: Any = None,
        bundle: int = 0,
    ) -> Host:
        log = self.attempt.logs / f"{role}-{index}.log"
        host = spawn(worker, f"{role} {index}", log, resources, args, group, bundle, role, self.activity)
        self.hosts.append(host)
        return host

    async def _ask(self, host: Host, verb: str, *args: Any) -> Any:
        return await host.ask(verb, *args, deadline_s=self.cfg.cluster.start_timeout_s)

    async def ready(self, hosts: list[Host]) -> None:
        await asyncio.gather(*(self._ask(host, "ready") for host in hosts))

    async def end(self) -> None:
        """Ends every worker. Those that hold more than their process are asked first: vLLM's own processes and
        semaphores, and shared memory on whatever node it is."""
        asked = [
            host.ask("stop", deadline_s=STOP_S) for host in self.hosts if host.name.startswith(("generation", "store"))
        ]
        for result in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(result, BaseException):
                logging.getLogger(__name__).warning("while ending: %s", result)
        for host in self.hosts:
            ray.kill(host.actor)
        for group in self._groups:
            remove_placement_group(group)
        sweep(self.attempt.run)


@asynccontextmanager
async def open_generation(cfg: RunConfig, attempt: Attempt, policy: Path) -> AsyncIterator[GenerationPool]:
    """The generation workers alone: to sample what a labeler ranks, or to answer prompts from a file."""
    starter = Starter(cfg, attempt)
    try:
        yield await starter.generation_alone(policy)
    finally:
        await starter.end()


@asynccontextmanager
async def open_judges(
    cfg: RunConfig, attempt: Attempt, policy: Path
) -> AsyncIterator[tuple[GenerationPool, RewardPool]]:
    """Generation and reward workers: to see what a policy's samples are worth."""
    starter = Starter(cfg, attempt)
    try:
        reward = starter.start_reward(policy, None)
        generation, _ = await asyncio.gather(starter.generation_alone(policy), starter.ready(reward))
        yield generation, RewardPool(reward, cfg.cluster.call_timeout_s)
    finally:
        await starter.end()


@asynccontextmanager
async def open_rooms(cfg: RunConfig, attempt: Attempt, inputs: PPOInputs) -> AsyncIterator[OpenRooms]:
    """All rooms of PPO, started side by side."""
    starter, deadline = Starter(cfg, attempt), cfg.cluster.call_timeout_s
    adapter_rank = cfg.learner.lora.rank if cfg.learner.lora.publish == "adapter" else 0
    try:
        generation, starting = starter.start_generation(inputs.policy, 0, adapter_rank)
        reward = starter.start_reward(inputs.policy, inputs.reward_model)
        reference: list[Host] = []
        if cfg.ppo.kl.kind != "none":
            args = worker_arguments.of_reference(cfg, inputs.reference)
            reference = starter.start(ReferenceWorker, "reference", cfg.reference.resources, args)
        (learner, channel), *_ = await asyncio.gather(
            starter.start_learner(inputs), starter.ready([*reward, *reference]), *starting
        )
        group = LearnerGroup(learner, channel, deadline)
        if cfg.weights.is_direct:
            await group.open_direct(generation, cfg.generation.tensor_parallel)
        rooms = Rooms(
            starter.generation_pool(generation, channel),
            RewardPool(reward, deadline),
            ReferencePool(reference, deadline) if reference else NoReference(),
            group,
        )
        if adapter_rank:  # running requests follow an adapter that they name, so they name one from the first
            await group.publish(0)
            await rooms.generation.receive(0)
        yield OpenRooms(rooms, group, starter.hosts, starter.activity)
    finally:
        await starter.end()
