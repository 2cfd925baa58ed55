"""How long is experience on its way from where it is sampled to where it is trained on?

    python benchmarks/stream.py [--rollouts 16] [--tokens 64] [--rounds 100]

From the moment that a table of rollouts leaves a worker until a learner has it with scores and reference logprobs, all
workers being actors that compute nothing. In turn, round by round:

    the stream     pools, leases, admission, join and the learner's group: `collect`, as `ppo.train` calls it
    bare           the same four actors, references to objects handed from one's call to the next's, nothing else

Prints one table and writes `benchmarks/results/stream-<utc>.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rounds import Measured, ratio, show, write
from workload import rollouts_of

from rlhf_cluster.cluster.crew import Crew
from rlhf_cluster.cluster.delivery import WeightChannel
from rlhf_cluster.cluster.hosts import Host, spawn
from rlhf_cluster.cluster.learner_group import LearnerGroup, Settled
from rlhf_cluster.cluster.pools import ReferencePool, RewardPool
from rlhf_cluster.cluster.sampling import GenerationPool
from rlhf_cluster.cluster.session import ray_session
from rlhf_cluster.collection import collect
from rlhf_cluster.config import ClusterConfig, PPOConfig, Resources, WeightsConfig
from rlhf_cluster.data.batches import PromptOrder
from rlhf_cluster.records import Members, Prompts, RefLogprobs, Rollouts, ScoredRollouts, Scores, join
from rlhf_cluster.rooms import Rooms
from rlhf_cluster.telemetry.quiet import driver_log, quiet_libraries
from rlhf_cluster.telemetry.timer import Timeline, Timer

GOAL = 2.0
PROMPT_TOKENS, WARM_UP, DEADLINE_S = 40, 10, 60.0


class Source:
    """A generation worker that has its responses ready."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._left = tokens, 0.0

    async def sample(self, members: Members) -> AsyncIterator[Rollouts]:
        table = rollouts_of(members, self._tokens)
        self._left = time.perf_counter()
        yield table

    def table(self, members: Members) -> Rollouts:
        table = rollouts_of(members, self._tokens)
        self._left = time.perf_counter()
        return table

    def left(self) -> float:
        return self._left


class Scorer:
    """Reward and reference."""

    def score(self, rollouts: Rollouts) -> Scores:
        ids = rollouts.sample_id
        return Scores.of({"sample_id": ids, "score": [0.5] * len(ids), "failure": [""] * len(ids)})

    def logprobs(self, rollouts: Rollouts) -> RefLogprobs:
        return RefLogprobs.of({"sample_id": rollouts.sample_id, "ref_logprobs": rollouts.rollout_logprobs})


class Sink:
    """A learner that notes when it has rows."""

    def __init__(self) -> None:
        self._came = 0.0

    def begin(self, step: int, sample_ids: Sequence[str]) -> dict[str, int]:
        return dict.fromkeys(sample_ids, 0)

    def add(self, step: int, rows: ScoredRollouts, start: int, stop: int) -> None:
        own = rows.slice(start, stop)
        assert len(own.response_ids[0])
        self._came = time.perf_counter()

    def add_parts(self, rollouts: Rollouts, scores: Scores, ref: RefLogprobs) -> None:
        rows = join(rollouts, scores, ref)
        self.add(0, rows, 0, len(rows))

    def came(self) -> float:
        return self._came


@dataclass(frozen=True)
class Actors:
    source: Host
    reward: Host
    reference: Host
    sink: Host

    async def seconds(self) -> float:
        """That the last table was on its way."""
        left = await self.source.ask("left", deadline_s=DEADLINE_S)
        came = await self.sink.ask("came", deadline_s=DEADLINE_S)
        return came - left


def start(tokens: int, logs: Path) -> Actors:
    def one(worker: type, name: str, *args: Any) -> Host:
        return spawn(worker, f"{name} 0", logs / f"{name}.log", Resources(num_cpus=0.0), args)

    return Actors(
        one(Source, "generation", tokens), one(Scorer, "reward"), one(Scorer, "reference"), one(Sink, "learner")
    )


def make_rooms(actors: Actors, rollouts: int) -> Rooms:
    channel = WeightChannel(actors.source, "", "", "stream", 0, WeightsConfig())
    return Rooms(
        GenerationPool(Crew.of([actors.source]), channel, DEADLINE_S, rollouts),
        RewardPool(Crew.of([actors.reward]), DEADLINE_S),
        ReferencePool(Crew.of([actors.reference]), DEADLINE_S),
        LearnerGroup(Settled([actors.sink]), channel, DEADLINE_S),
    )


async def measure(args: argparse.Namespace, logs: Path) -> dict[str, Measured]:
    actors = start(args.tokens, logs)
    rooms, prompts = make_rooms(actors, args.rollouts), PromptOrder(make_prompts(args.rollouts), 0)
    cfg = PPOConfig(batch_size=args.rollouts)
    found = {"bare": Measured([], []), "the stream": Measured([], [])}
    timer = Timer(Timeline(), "stream")
    for step in range(WARM_UP + args.rounds):
        members = prompts.members(step, args.rollouts, 1)
        await by_reference(actors, members)
        bare = await actors.seconds()
        await collect(rooms, step, prompts, cfg, done(), timer, print)
        streamed = await actors.seconds()
        timer.take()
        if step >= WARM_UP:
            found["bare"].seconds.append(bare)
            found["the stream"].seconds.append(streamed)
    return found


async def by_reference(actors: Actors, members: Members) -> None:
    rollouts = actors.source.actor.table.remote(members)
    score, ref = actors.reward.actor.score.remote(rollouts), actors.reference.actor.logprobs.remote(rollouts)
    await asyncio.wait_for(actors.sink.actor.add_parts.remote(rollouts, score, ref), DEADLINE_S)


async def done() -> None:
    """Generation serves the weights that the batch waits for."""


def make_prompts(count: int) -> Prompts:
    ids = np.random.default_rng(0).integers(0, 1000, (count, PROMPT_TOKENS)).astype(np.int32)
    return Prompts.of({"prompt_id": [f"p{i}" for i in range(count)], "prompt_ids": list(ids)})


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of experience.")
    for name, default in (("rollouts", 16), ("tokens", 64), ("rounds", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    quiet_libraries()
    workers = {"stream": {"all": Resources(num_cpus=0.0, workers=4)}}
    with (
        tempfile.TemporaryDirectory() as logs,
        driver_log(Path(logs) / "driver.log"),
        ray_session(ClusterConfig(), workers),
    ):
        found = asyncio.run(measure(args, Path(logs)))
    over = ratio(found["the stream"], found["bare"])
    rows = [
        [name, *(f"{1000 * value:.2f}" for value in (one.median, min(one.seconds), max(one.seconds))), ""]
        for name, one in found.items()
    ]
    rows.append(["the stream over bare", *(f"{over[of]:.2f}" for of in ("median", "min", "max")), f"<= {GOAL:g}"])
    title = f"a table of {args.rollouts} rollouts of {PROMPT_TOKENS} + {args.tokens} tokens"
    show(title, ["milliseconds on the way", "median", "smallest", "largest", "goal"], rows, [])
    seconds = {name: one.seconds for name, one in found.items()}
    write("stream", {"arguments": vars(args), "seconds": seconds, "ratio": over, "goal": GOAL})


if __name__ == "__main__":
    main()
