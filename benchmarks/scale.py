"""SIMULATED: does the loop keep thousands of workers busy? The real `ppo.train`, pools, leases, admission and logs, in
virtual time: workers are stand-ins in this process whose times follow a model, and the CPU that the driver really
spends counts as it passes.

    python benchmarks/scale.py [--workers 1 16 128 1024] [--staleness 0 1 2 4 8] [--iterations 4] [--slots 16]

Generation: `--slots` responses at once on each worker, 25 ms a token, log-normal lengths (median 512, sigma 0.8, 4096
at most); an iteration has a response for each slot. One scorer and a learner rank for every four generation workers;
the learner takes as long for a batch as generation takes for it on average, so neither is the other's bottleneck. A
version takes a learner 1 s to publish and a worker 1 s to load. Ideal, for the very lengths that were drawn:

    synchronous   longest response + load + scoring of the last table + evaluation of it + update + publish
    asynchronous  the larger of (tokens by slots + load) and (evaluation + update + publish)

A batch's members are fixed, so no more than staleness + 1 batches pass while the longest response is sampled: what that
takes for the iterations stands beside the ideal, which is out of reach where it is more.

Prints one table and writes `benchmarks/results/scale-<utc>.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import tempfile
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rounds import show, write
from virtual_time import Clock, run
from workload import log_of

from rlhf_cluster import ppo
from rlhf_cluster.cluster.crew import Crew
from rlhf_cluster.cluster.delivery import WeightChannel
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.learner_group import LearnerGroup, Settled
from rlhf_cluster.cluster.pools import ReferencePool, RewardPool
from rlhf_cluster.cluster.sampling import GenerationPool
from rlhf_cluster.config import PPOConfig, WeightsConfig
from rlhf_cluster.data.batches import PromptOrder
from rlhf_cluster.loop.admission import Batch
from rlhf_cluster.records import Controls, Members, Prompts, RefLogprobs, Rollouts, ScoredRollouts, Scores, UpdateStats
from rlhf_cluster.rooms import Rooms
from rlhf_cluster.telemetry.metrics import JsonlSink
from rlhf_cluster.weights.snapshot import Snapshot

PER_TOKEN_S, LOAD_S, PUBLISH_S, SCORE_S = 0.025, 1.0, 1.0, 0.05
MEDIAN, SIGMA, LONGEST, PROMPT_TOKENS = 512, 0.8, 4096, 64
MEAN = MEDIAN * np.exp(SIGMA**2 / 2)
EVALUATION = 0.25  # of the learner's time for a batch
FLUSH_MS, MINIBATCH = 50, 1 << 20  # all in one
DEADLINE_S = 1e6
GOAL, GOAL_SYNCHRONOUS = 0.95, 0.90


def now() -> float:
    return asyncio.get_running_loop().time()


async def until(when: float) -> None:
    await asyncio.sleep(max(0.0, when - now()))


def length_of(seed: int) -> int:
    """The same for a response, whoever samples it."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN), SIGMA)
    return int(min(LONGEST, max(1, round(drawn))))


class Verbs:
    """What stands for an actor: `verb.remote(...)` begins a call."""

    def __init__(self, **verbs: Any) -> None:
        for name, verb in verbs.items():
            setattr(
                self, name, SimpleNamespace(remote=verb, options=lambda verb=verb, **_: SimpleNamespace(remote=verb))
            )


@dataclass
class Sampler:
    """A generation worker: `slots` responses at once, each as long as its length says; loading stops them all."""

    clock: Clock
    slots: int
    version: int = 0
    free: list[float] = field(default_factory=list)  # when each slot is, in seconds that it was not stopped
    stopped: float = 0.0
    fetched: int = 0
    given: float = 0.0  # seconds of sampling, of all slots

    def actor(self) -> Verbs:
        return Verbs(sample=self.sample, fetch=self.fetch, load=self.load, digests=self.digests, resume=self.resume)

    def sampled(self) -> float:
        """Seconds of all its slots so far: what it was given, less what of that lies ahead."""
        return self.given - sum(max(0.0, end - self.awake()) for end in self.free)

    def awake(self) -> float:
        return now() - self.stopped

    def sample(self, members: Members) -> AsyncIterator[Awaitable[Rollouts]]:
        with self.clock.of_others():
            lengths = [length_of(seed) for seed in members.seed.tolist()]
            ends = [self.end_of(length) for length in lengths]
            order = np.argsort(ends)
        return self.stream(members, lengths, ends, order)

    def end_of(self, length: int) -> float:
        began = self.awake() if len(self.free) < self.slots else max(self.awake(), heapq.heappop(self.free))
        heapq.heappush(self.free, began + length * PER_TOKEN_S)
        self.given += length * PER_TOKEN_S
        return began + length * PER_TOKEN_S

    async def stream(
        self, members: Members, lengths: Sequence[int], ends: Sequence[float], order: np.ndarray
    ) -> AsyncIterator[Awaitable[Rollouts]]:
        start = 0
        while start < len(order):
            await self.until(ends[order[start]])
            await asyncio.sleep(FLUSH_MS / 1000)
            stop = start
            while stop < len(order) and ends[order[stop]] <= self.awake():
                stop += 1
            rows = order[start : max(stop, start + 1)]
            start += len(rows)
            with self.clock.of_others():
                table = self.rollouts(members.take(rows), [lengths[row] for row in rows])
            yield of(table)

    async def until(self, end: float) -> None:
        """It may be stopped meanwhile."""
        left = end - self.awake()
        if left > 1e-9:
            await asyncio.sleep(left)
            await self.until(end)

    def rollouts(self, members: Members, lengths: Sequence[int]) -> Rollouts:
        count = len(members)
        return members.extend(
            Rollouts,
            {
                "response_ids": [np.zeros(length, np.int32) for length in lengths],
                "rollout_logprobs": [np.full(length, -1.0, np.float32) for length in lengths],
                "weight_versions": [np.full(length, self.version, np.int32) for length in lengths],
                "finish_reason": ["stop"] * count,
                "temperature": [1.0] * count,
                "incarnation": ["simulated"] * count,
            },
        )

    async def fetch(self, store: Any, snapshot: Snapshot, place: tuple[str, str, int], again: bool) -> int:
        self.fetched = snapshot.version
        return 0

    async def load(self) -> None:
        await asyncio.sleep(LOAD_S)
        self.stopped += LOAD_S
        self.version = self.fetched

    async def digests(self) -> dict[str, str]:
        return {"0:model": "same"}

    async def resume(self) -> float:
        return LOAD_S


async def of(value: Any) -> Any:
    return value


def scorer(clock: Clock) -> Verbs:
    async def score(rollouts: Rollouts) -> Scores:
        await asyncio.sleep(SCORE_S)
        with clock.of_others():
            ids = rollouts.sample_id
            return Scores.of({"sample_id": ids, "score": [0.5] * len(ids), "failure": [""] * len(ids)})

    async def logprobs(rollouts: Rollouts) -> RefLogprobs:
        await asyncio.sleep(SCORE_S)
        with clock.of_others():
            return RefLogprobs.of({"sample_id": rollouts.sample_id, "ref_logprobs": rollouts.rollout_logprobs})

    return Verbs(score=score, logprobs=logprobs)


@dataclass
class Rank:
    """Of the learner: one call after the other; seconds are by token of its own."""

    number: int
    per_token_s: float
    clock: Clock
    free: float = 0.0
    tokens: dict[int, int] = field(default_factory=dict)

    def actor(self) -> Verbs:
        return Verbs(begin=self.begin, add=self.add, update=self.update, publish=self.publish, save=self.save)

    async def busy(self, seconds: float) -> None:
        self.free = max(self.free, now()) + seconds
        await until(self.free)

    async def begin(self, step: int, sample_ids: Sequence[str]) -> dict[str, int]:
        self.tokens[step] = 0
        with self.clock.of_others():
            return {} if self.number else {name: place // MINIBATCH for place, name in enumerate(sample_ids)}

    async def add(self, step: int, rows: ScoredRollouts, start: int, stop: int) -> None:
        with self.clock.of_others():
            tokens = sum(map(len, rows.response_ids[start:stop]))
        self.tokens[step] += tokens
        await self.busy(EVALUATION * tokens * self.per_token_s)

    async def update(self, step: int, controls: Controls) -> UpdateStats:
        await self.busy((1 - EVALUATION) * self.tokens[step] * self.per_token_s)
        return UpdateStats(step, step + 1, {"objective/kl": 0.1, "objective/entropy": 2.0})

    async def publish(self, version: int, directory: str, probed: bool) -> Snapshot | None:
        await self.busy(PUBLISH_S)
        return None if self.number else Snapshot(version, "", ())

    async def save(self, directory: str) -> list[str]:
        (Path(directory) / "policy").mkdir(exist_ok=True)
        return []


@dataclass
class Watch:
    """When each iteration was done, the tokens of each, the driver's CPU until then, and the seconds that slots had
    been sampling for."""

    clock: Clock
    samplers: Sequence[Sampler]
    ends: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    sampled: list[float] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)

    def show(self, step: int, batch: Batch) -> None:
        self.ends.append(now())
        self.cpu.append(self.clock.own())
        with self.clock.of_others():
            self.sampled.append(sum(one.sampled() for one in self.samplers))
            self.lengths.append(np.array([len(ids) for ids in batch.rows.response_ids]))


def host(name: str, actor: Verbs) -> Host:
    return Host(name, actor, Path("none"))


async def simulate(workers: int, staleness: int, args: argparse.Namespace, directory: Path, clock: Clock) -> Watch:
    others = max(1, workers // 4)
    added = Verbs(snapshot=lambda version: of(Snapshot(version, "", ())), add=lambda snapshot: of(None))
    store = host("store", added)
    channel = WeightChannel(store, "node", "", "run", 1, WeightsConfig(probe_every=0))
    sampling = [Sampler(clock, args.slots) for _ in range(workers)]
    samplers = [host(f"generation {i}", one.actor()) for i, one in enumerate(sampling)]
    scorers = [host(f"reward {i}", scorer(clock)) for i in range(others)]
    batch = workers * args.slots
    ranks = [host(f"learner {i}", Rank(i, PER_TOKEN_S * others / batch, clock).actor()) for i in range(others)]
    rooms = Rooms(
        GenerationPool(Crew.of(samplers), channel, DEADLINE_S, args.slots, FLUSH_MS),
        RewardPool(Crew.of(scorers), DEADLINE_S),
        ReferencePool(Crew.of(scorers), DEADLINE_S),
        LearnerGroup(Settled(ranks), channel, DEADLINE_S, put=lambda table: table),
    )
    watch = Watch(clock, sampling)
    cfg = PPOConfig(
        steps=args.iterations + 2 * (staleness + 1), batch_size=batch, samples_per_prompt=4, max_staleness=staleness
    )
    log = log_of(directory, JsonlSink(directory / "metrics.jsonl"), watch.show)
    with log.metrics:
        await ppo.train(rooms, PromptOrder(prompts(max(64, batch // 4)), seed=0), cfg, log)
    return watch


def prompts(count: int) -> Prompts:
    ids = np.random.default_rng(0).integers(0, 1000, (count, PROMPT_TOKENS)).astype(np.int32)
    return Prompts.of({"prompt_id": [f"p{i}" for i in range(count)], "prompt_ids": list(ids)})


def ideal(lengths: np.ndarray, slots: int, staleness: int) -> float:
    """Seconds of an iteration, by the model alone."""
    learning = lengths.sum() * PER_TOKEN_S / slots
    if staleness:
        return max(lengths.sum() * PER_TOKEN_S / slots + LOAD_S, learning + PUBLISH_S)
    last = SCORE_S + EVALUATION * lengths.max() * PER_TOKEN_S / slots
    return lengths.max() * PER_TOKEN_S + LOAD_S + last + (1 - EVALUATION) * learning + PUBLISH_S


def measured(workers: int, staleness: int, args: argparse.Namespace) -> dict[str, float]:
    """Of the iterations in the middle: before them the batches that are to be under way are not yet, and after them
    less and less is."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        watch = run(simulate(workers, staleness, args, Path(directory), clock), clock)
    slots = workers * args.slots
    middle = slice(staleness, staleness + args.iterations)
    seconds, cpu = np.diff(watch.ends)[middle], np.diff(watch.cpu)[middle]
    lengths = watch.lengths[1:][middle]
    ideals = [ideal(one, slots, staleness) for one in lengths]
    sampling = np.diff(watch.sampled)[middle].sum() / (seconds.sum() * slots)
    longest = max(one.max() for one in lengths) * PER_TOKEN_S / (staleness + 1)
    return {
        "workers": workers,
        "learners": max(1, workers // 4),
        "staleness": staleness,
        "rollouts": slots,
        "seconds": float(seconds.sum()),
        "ideal": float(sum(ideals)),
        "fraction": float(sum(ideals) / seconds.sum()),
        "slots_busy": float(sampling),
        "least_for_the_longest": float(longest * args.iterations),
        "driver_ms_per_rollout": float(1000 * cpu.sum() / (slots * args.iterations)),
        "driver_share": float(cpu.sum() / seconds.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The loop with simulated workers, in virtual time.")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 16, 128, 1024])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--slots", type=int, default=16)
    args = parser.parse_args()
    found = [measured(w, s, args) for w, s in itertools.product(args.workers, args.staleness)]
    columns = ["workers", "ranks", "stale", "rollouts", "s", "ideal", "longest", "slots busy", "of ideal", "goal"]
    rows = [
        [
            *(str(int(one[name])) for name in ("workers", "learners", "staleness", "rollouts")),
            *(f"{one[name]:.0f}" for name in ("seconds", "ideal", "least_for_the_longest")),
            f"{one['slots_busy']:.2f}",
            f"{one['fraction']:.3f}",
            f"{GOAL if one['staleness'] else GOAL_SYNCHRONOUS:.2f}",
            f"{one['driver_ms_per_rollout']:.3f}",
            f"{one['driver_share']:.3f}",
        ]
        for one in found
    ]
    columns += ["driver ms", "share"]
    notes = [
        "Seconds of all measured iterations. Longest: what the longest response alone takes of them. Slots busy: the "
        "share of their time that generation's slots sampled. Driver: its CPU for a rollout, and as a share of all."
    ]
    show(f"SIMULATED workers, {args.iterations} iterations", columns, rows, notes)
    write("scale", {"arguments": vars(args), "simulated": True, "found": found})


if __name__ == "__main__":
    main()
