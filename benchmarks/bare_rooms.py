"""Our own rooms without what connects them: each worker in a bare process, called back to back through a pipe. No Ray,
no stream, no pools, no publish; what an iteration takes beyond this is the system's own."""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from workload import endpoint

from rlhf_cluster.cluster import worker_arguments
from rlhf_cluster.cluster.hosts import environment
from rlhf_cluster.cluster.starter import PPOInputs
from rlhf_cluster.config import Resources, RunConfig
from rlhf_cluster.generation.worker import GenerationWorker
from rlhf_cluster.learner.worker import LearnerWorker
from rlhf_cluster.records import Controls, Members, RefLogprobs, Rollouts, join
from rlhf_cluster.reference.worker import ReferenceWorker
from rlhf_cluster.scoring.worker import RewardWorker
from rlhf_cluster.telemetry.quiet import quiet_libraries


class BareWorker:
    """A plain worker in a process of its own, born with the environment that Ray would give it."""

    def __init__(self, worker: type, resources: Resources, *args: Any) -> None:
        os.environ.update(environment(resources))
        spawning = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawning.Pipe()
        self._process = spawning.Process(target=_serve, args=(theirs, worker, args))
        self._process.start()

    def send(self, verb: str, *args: Any) -> None:
        self._pipe.send((verb, args))

    def answer(self) -> Any:
        """Of what was sent. Raises RuntimeError with the worker's own traceback."""
        failure, answer = self._pipe.recv()
        if failure:
            raise RuntimeError(failure)
        return answer

    def ask(self, verb: str, *args: Any) -> Any:
        self.send(verb, *args)
        return self.answer()

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, worker: type, args: tuple[Any, ...]) -> None:
    quiet_libraries()
    with asyncio.Runner() as loop:
        held = None
        while True:
            verb, given = pipe.recv()
            try:
                held = held or worker(*args)
                pipe.send(("", loop.run(_answer(getattr(held, verb)(*given)))))
            except Exception:
                pipe.send((traceback.format_exc(), None))


async def _answer(answer: Any) -> Any:
    """However the verb gives it: at once, awaited, or in parts."""
    if inspect.isasyncgen(answer):
        return [part async for part in answer]
    return await answer if inspect.isawaitable(answer) else answer


class BareRooms:
    """Generation workers, reward worker, reference where there is one, and a learner of one rank."""

    def __init__(self, cfg: RunConfig, paths: PPOInputs) -> None:
        self._cfg = cfg
        self._generation = [
            BareWorker(
                GenerationWorker,
                cfg.generation.resources,
                *worker_arguments.of_generation(cfg, paths.policy, f"bare-{index}"),
            )
            for index in range(cfg.generation.resources.workers)
        ]
        scorer = worker_arguments.of_reward(cfg, paths.policy, paths.reward_model)
        self._reward = BareWorker(RewardWorker, cfg.reward.resources, *scorer)
        self._reference: BareWorker | None = None
        if cfg.ppo.kl.kind != "none":
            reference = worker_arguments.of_reference(cfg, paths.reference)
            self._reference = BareWorker(ReferenceWorker, cfg.reference.resources, *reference)
        self._learner = BareWorker(LearnerWorker, cfg.learner.resources, *worker_arguments.of_learner(cfg))
        self._learner.send("start", 0, 1, endpoint(), 600.0, paths.policy, paths.reward_model, paths.pretraining)
        for worker in self._generation:
            worker.send("start", 0)
        for worker in (self._learner, *self._generation):
            worker.answer()

    def iteration(self, step: int, members: Members) -> dict[str, float]:
        """Seconds by part, one after the other; reward and reference are asked at once, and the reference's are those
        that it took longer."""
        seconds: dict[str, float] = {}
        with timed(seconds, "generate"):
            rollouts = self.sample(members)
        ref: RefLogprobs | None = None
        if self._reference is not None:
            self._reference.send("logprobs", rollouts)
        with timed(seconds, "score"):
            scores = self._reward.ask("score", rollouts)
        if self._reference is not None:
            with timed(seconds, "reference"):
                ref = self._reference.answer()
        rows = join(rollouts, scores, ref)
        self._learner.ask("begin", step, rows.sample_id)
        with timed(seconds, "learner evaluate"):
            self._learner.ask("add", step, rows, 0, len(rows))
        with timed(seconds, "learner update"):
            self._learner.ask("update", step, Controls(self._cfg.ppo.kl.coef))
        return seconds

    def sample(self, members: Members) -> Rollouts:
        """All of them at once, an equal share of the prompts on each worker."""
        prompts = np.array_split(np.unique(members.prompt_id), len(self._generation))
        rows = np.array(members.prompt_id)
        for worker, own in zip(self._generation, prompts, strict=True):
            worker.send("sample", members.take(np.flatnonzero(np.isin(rows, own))))
        return Rollouts.concat([part for worker in self._generation for part in worker.answer()])

    def end(self) -> None:
        every: Sequence[BareWorker | None] = (*self._generation, self._reward, self._reference, self._learner)
        for worker in every:
            if worker is not None:
                worker.end()


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - began
