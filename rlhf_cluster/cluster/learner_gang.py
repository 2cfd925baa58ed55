"""The learner's ranks as Ray's actors: how they are placed, meet, and begin anew."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, NoReturn

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_cluster.cluster import worker_arguments
from rlhf_cluster.cluster.crew import Budget
from rlhf_cluster.cluster.delivery import WeightChannel
from rlhf_cluster.cluster.hosts import Host, reserved, set_apart
from rlhf_cluster.cluster.learner_group import Keeping
from rlhf_cluster.cluster.learner_host import LearnerHost
from rlhf_cluster.cluster.starter import Attempt, PPOInputs, Starter
from rlhf_cluster.cluster.waits import Call, WorkerError, WorkerLost, answer, brief
from rlhf_cluster.config import RunConfig

LOST_S = 5.0  # within which a worker's death is known here, once others have felt it


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
        following = self._following
        if following:
            await asyncio.wait(following, return_when=asyncio.FIRST_COMPLETED)
        ended = [one.exception() for one in following if one.done() and not one.cancelled()]
        raise next(filter(None, ended), WorkerLost("the learner's ranks begin anew"))

    async def lost(self) -> WorkerLost | None:
        """A rank whose peer died says so within moments; which one it was, its pulse says."""
        asked = [asyncio.ensure_future(self._starter.pulse.once(host)) for host in self.hosts]
        answered, silent = await asyncio.wait(asked, timeout=LOST_S) if asked else (set(), set())
        for one in silent:
            one.cancel()
        found = [error for one in answered if isinstance(error := one.exception(), WorkerLost)]
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
            f"{brief(error)}; the learner's ranks begin anew"
            + (f" (restart {spent} of {cfg.cluster.restarts})" * (spent > 0))
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


async def start_learner(starter: Starter, inputs: PPOInputs) -> LearnerGang:
    """All ranks, and the weight store beside rank 0."""
    gang = LearnerGang(starter, inputs)
    await gang.start(starter.cfg.learner.resources.workers)
    return gang


def keeping(cfg: RunConfig, attempt: Attempt) -> Keeping:
    """What the ranks begin anew from. Where weights go straight to engines that they met, they cannot."""
    every = 0 if cfg.weights.is_direct or not cfg.cluster.restarts else cfg.learner.keep_state_every
    return Keeping(attempt.state, every)
