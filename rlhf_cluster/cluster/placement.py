"""Starts the workers of a stage, waits until they serve, hands out their clients, and ends them.

All workers of a stage start at once; the slowest decides. Leaving ends every one of them, whatever happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from rlhf_cluster.cluster.crew import Crew
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.learner_gang import keeping, start_learner
from rlhf_cluster.cluster.learner_group import LearnerGroup
from rlhf_cluster.cluster.pools import ReferencePool, RewardPool
from rlhf_cluster.cluster.sampling import GenerationPool
from rlhf_cluster.cluster.starter import Attempt, PPOInputs, Starter
from rlhf_cluster.config import RunConfig, roles
from rlhf_cluster.rooms import NoReference, Rooms


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
    group: LearnerGroup | None = None
    try:
        generation = starter.generation_crew(inputs.policy, 0, adapter_rank)
        reward = starter.reward_crew(inputs.policy, inputs.reward_model)
        reference = starter.reference_crew(inputs.reference) if cfg.ppo.kl.kind != "none" else None
        sizes, pools = roles(cfg), starter.crews.items()
        crews = asyncio.gather(*(crew.start(sizes[role].workers) for role, crew in pools))
        learner, _ = await asyncio.gather(start_learner(starter, inputs), crews)
        group = LearnerGroup(learner, learner.channel, deadline, keeping=keeping(cfg, attempt))
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
        if group is not None:  # whose ranks write no more
            await group.close()
