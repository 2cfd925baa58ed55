"""Starts the workers of a stage, waits until they serve, hands out their clients, and ends them.

All workers of a stage start at once; the slowest decides. Leaving ends every one of them, whatever happened.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlhf_cluster.cluster import worker_arguments
from rlhf_cluster.cluster.crew import Budget, Crew, Terms, note
from rlhf_cluster.cluster.delivery import WeightChannel
from rlhf_cluster.cluster.generation_host import GenerationHost
from rlhf_cluster.cluster.hosts import Host, reserved, set_apart, spawn
from rlhf_cluster.cluster.learner_group import Keeping, LearnerGroup
from rlhf_cluster.cluster.learner_host import LearnerHost
from rlhf_cluster.cluster.pools import ReferencePool, RewardPool
from rlhf_cluster.cluster.pulse import Pulse
from rlhf_cluster.cluster.sampling import GenerationPool
from rlhf_cluster.cluster.waits import Call, WorkerError, WorkerLost, answer
from rlhf_cluster.config import Resources, RunConfig, roles
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
LOST_S = 5.0  # within which a worker's death is known here, once others have felt it


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

    def crew(self, role: str, resources: Resources, hiring: Roles) -> Crew:
        """Of workers that are each placed for themselves, so that any of them may come and go alone."""
        cluster = self.cfg.cluster
        fixed = role == "generation" and self.cfg.weights.is_direct  # its engines met the learner at the start
        terms = Terms(
            0 if fixed else cluster.restarts,
            *(cluster.restart_refill_s, cluster.restart_backoff_s, cluster.drain_s),
            self.attempt.warn,
        )
        crew = self.crews[role] = Crew(role, Hired(self, role, resources, hiring), terms)
        return crew

    def generation_crew(self, policy: Path, version: int, adapter_rank: int = 0) -> Crew:
        def arguments(number: int) -> tuple[Any, ...]:
            incarnation = f"generation-{number}.{self.attempt.number}"
            return worker_arguments.of_generation(self.cfg, policy, incarnation, adapter_rank)

        hiring = Roles(GenerationHost, arguments, ("start", version))
        return self.crew("generation", self.cfg.generation.resources, hiring)

    def reward_crew(self, policy: Path, reward_model: Path | None) -> Crew:
        """`policy`: whose tokens are read; `reward_model`: stage 2's, where there is one."""
        args = worker_arguments.of_reward(self.cfg, policy, reward_model)
        return self.crew("reward", self.cfg.reward.resources, Roles(RewardWorker, lambda number: args))

    def reference_crew(self, policy: Path) -> Crew:
        args = worker_arguments.of_reference(self.cfg, policy)
        return self.crew("reference", self.cfg.reference.resources, Roles(ReferenceWorker, lambda number: args))

    async def generation_alone(self, policy: Path) -> GenerationPool:
        """Generation workers that no learner publishes to."""
        channel, crew = await self.open_channel(), self.generation_crew(policy, 0)
        await crew.start(self.cfg.generation.resources.workers)
        return self.generation_pool(crew, channel)

    def generation_pool(self, crew: Crew, channel: WeightChannel) -> GenerationPool:
        cfg = self.cfg.generation
        return GenerationPool(crew, channel, self.cfg.cluster.call_timeout_s, cfg.max_num_seqs, cfg.flush_ms)

    async def start_learner(self, inputs: PPOInputs) -> LearnerGang:
        """All ranks, and the weight store beside rank 0."""
        gang = LearnerGang(self, inputs)
        await gang.start(self.cfg.learner.resources.workers)
        return gang

    def keeping(self) -> Keeping:
        """What the learner's ranks begin anew from. Where weights go straight to engines that it met, it cannot."""
        every = 0 if self.cfg.weights.is_direct or not self.cfg.cluster.restarts else self.cfg.learner.keep_state_every
        return Keeping(self.attempt.state, every)

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
class Roles:
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
    of: Roles

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


class LearnerGang:
    """Keeps `learner_group.Gang`: the ranks in one placement group, so that they start together or not at all."""

    def __init__(self, starter: Starter, inputs: PPOInputs) -> None:
        self._starter, self._inputs = starter, inputs
        self.hosts: list[Host] = []
        self.channel: WeightChannel
        self._group: Any = None
        self._text = ray.put(inputs.pretraining)  # once for all ranks
        cluster = starter.cfg.cluster
        self._budget = Budget(cluster.restarts, cluster.restart_refill_s)
        self._numbers = itertools.count()
        self._following: list[asyncio.Task[Any]] = []
        self._ranks = 0  # that there were when it was whole

    async def start(self, ranks: int) -> None:
        await self._place(ranks, self._starter.cfg.cluster.start_timeout_s)
        self._ranks = ranks
        self._spawn(ranks)
        _, self.channel = await asyncio.gather(self._meet(), self._starter.open_channel(await self._node()))

    async def _node(self) -> str:
        """Of rank 0, which publishes: the store is there."""
        return str(await self._starter.ask(self.hosts[0], "ready"))

    async def _place(self, ranks: int, timeout_s: float) -> None:
        bundle = reserved(self._starter.cfg.learner.resources) | set_apart("learner")
        self._group = placement_group([bundle] * ranks, strategy="PACK")
        self._starter.groups.append(self._group)
        await answer(self._group.ready(), Call("learner", "placement"), timeout_s)

    def _spawn(self, ranks: int) -> None:
        args, resources = worker_arguments.of_learner(self._starter.cfg), self._starter.cfg.learner.resources
        for rank in range(ranks):
            place, number = PlacementGroupSchedulingStrategy(self._group, rank), next(self._numbers)
            self.hosts.append(self._starter.spawn(LearnerHost, "learner", number, resources, args, place))

    async def _meet(self) -> None:
        """They are started, and one collective group."""
        starter, cfg, inputs, ranks = self._starter, self._starter.cfg, self._inputs, len(self.hosts)
        endpoint = await starter.ask(self.hosts[0], "endpoint")
        starting = (ranks, endpoint, cfg.cluster.call_timeout_s, inputs.policy, inputs.reward_model, self._text)
        await asyncio.gather(*(starter.ask(host, "start", rank, *starting) for rank, host in enumerate(self.hosts)))
        self._following = [asyncio.ensure_future(starter.pulse.follow(host)) for host in self.hosts]

    async def follow(self) -> NoReturn:
        await asyncio.wait(self._following, return_when=asyncio.FIRST_COMPLETED)
        raise next(error for one in self._following if one.done() and (error := one.exception()))

    async def lost(self) -> WorkerLost | None:
        """A rank whose peer died says so within moments, and Ray a little later which one it was."""
        await asyncio.wait(self._following, timeout=LOST_S, return_when=asyncio.FIRST_COMPLETED)
        found = [error for one in self._following if one.done() and isinstance(error := one.exception(), WorkerLost)]
        return found[0] if found else None

    async def anew(self, error: WorkerError, ranks: int = 0) -> bool:
        """As many as before where there is room for them, or else fewer, down to `learner.min_workers`."""
        cfg, warn = self._starter.cfg, self._starter.attempt.warn
        before, spent = self._ranks, 0 if ranks else self._budget.take()
        if not ranks and not spent:
            raise WorkerError(
                f"{error}; the {cfg.cluster.restarts} restarts of the learner (cluster.restarts) are used up"
            )
        await self.end()
        least = cfg.learner.min_workers or before
        sizes = [ranks] if ranks else [n for n in range(before, least - 1, -1) if not cfg.ppo.minibatch_size % n]
        warn(
            f"{error}; the learner's ranks begin anew" + (f" (restart {spent} of {cfg.cluster.restarts})" * (spent > 0))
        )
        for number, size in enumerate(sizes):
            try:
                empty = await self._again(size)
                break
            except WorkerError as failure:
                await self.end()
                if number + 1 == len(sizes):
                    return await self.anew(failure)  # as far as the budget goes
        self._ranks = size
        if size != before:
            warn(f"the learner goes on with {size} ranks, of {before} before")
        return empty

    async def _again(self, ranks: int) -> bool:
        """In the same place where it has as many bundles; Ray moves them where a node is gone."""
        starter, timeout_s = self._starter, self._starter.cfg.cluster.start_timeout_s
        if self._group is None or len(self._group.bundle_specs) != ranks:
            if self._group is not None:
                starter.remove(self._group)
            await self._place(ranks, timeout_s)
        else:
            await answer(self._group.ready(), Call("learner", "placement"), timeout_s)
        self._spawn(ranks)
        await self._meet()
        return await self._with_store(await self._node())

    async def _with_store(self, node: str) -> bool:
        """A store on this node; whether it is another one."""
        starter, store = self._starter, self.channel.store
        try:
            await store.ask("ready", deadline_s=starter.cfg.cluster.start_timeout_s)
            if node == self.channel.node:
                return False
            await starter.end_one(store)
        except WorkerLost:
            starter.forget(store)
        fresh = await starter.open_channel(node)
        self.channel.store, self.channel.node = fresh.store, fresh.node
        return True

    async def end(self) -> None:
        """All of them at once."""
        for one in self._following:
            one.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        for host in self.hosts:
            self._starter.kill(host)
        self.hosts = []


@dataclass(frozen=True)
class OpenRooms:
    """The rooms of a PPO run, with what only the wiring needs."""

    rooms: Rooms
    learner: LearnerGroup
    starter: Starter

    @property
    def hosts(self) -> list[Host]:
        return self.starter.hosts

    @property
    def crews(self) -> Mapping[str, Crew]:
        """The pools, by role."""
        return self.starter.crews

    def metrics(self) -> dict[str, float]:
        """Since it was asked last: what share of the time each role had nothing to do, how many workers serve, and how
        many were lost in all."""
        pools = {f"pool/{role}": float(len(crew.serving)) for role, crew in self.crews.items()}
        lost = float(sum(crew.losses for crew in self.crews.values()))
        return self.starter.activity.idle() | pools | {"fault/workers_lost": lost}

    async def peak_memory(self) -> Mapping[str, int]:
        """Bytes by worker, the processes that it started included."""
        hosts = list(self.hosts)
        asked = [host.ask("peak_memory", deadline_s=60) for host in hosts]
        return dict(zip((host.name for host in hosts), await asyncio.gather(*asked), strict=True))


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
        reward = starter.reward_crew(policy, None)
        generation, _ = await asyncio.gather(
            starter.generation_alone(policy), reward.start(cfg.reward.resources.workers)
        )
        yield generation, RewardPool(reward, cfg.cluster.call_timeout_s)
    finally:
        await starter.end()


@asynccontextmanager
async def open_rooms(cfg: RunConfig, attempt: Attempt, inputs: PPOInputs) -> AsyncIterator[OpenRooms]:
    """All rooms of PPO, started side by side."""
    starter, deadline = Starter(cfg, attempt), cfg.cluster.call_timeout_s
    adapter_rank = cfg.learner.lora.rank if cfg.learner.lora.publish == "adapter" else 0
    try:
        generation = starter.generation_crew(inputs.policy, 0, adapter_rank)
        reward = starter.reward_crew(inputs.policy, inputs.reward_model)
        reference = starter.reference_crew(inputs.reference) if cfg.ppo.kl.kind != "none" else None
        sizes, pools = roles(cfg), starter.crews.items()
        crews = asyncio.gather(*(crew.start(sizes[role].workers) for role, crew in pools))
        learner, _ = await asyncio.gather(starter.start_learner(inputs), crews)
        group = LearnerGroup(learner, learner.channel, deadline, keeping=starter.keeping())
        if cfg.weights.is_direct:
            await group.open_direct(generation.serving, cfg.generation.tensor_parallel)
        rooms = Rooms(
            starter.generation_pool(generation, learner.channel),
            RewardPool(reward, deadline),
            ReferencePool(reference, deadline) if reference else NoReference(),
            group,
        )
        if adapter_rank:  # running requests follow an adapter that they name, so they name one from the first
            await group.publish(0)
            await rooms.generation.receive(0)
        yield OpenRooms(rooms, group, starter)
    finally:
        await starter.end()
        shutil.rmtree(attempt.state, ignore_errors=True)
