"""In-process fakes of all rooms: the real loop runs on them in milliseconds. Each keeps its Protocol of `rooms.py`, and
the learner refuses what the real one refuses, so that a loop which calls out of turn cannot pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rlhf_cluster.records import Controls, Members, Prompts, RefLogprobs, Rollouts, ScoredRollouts, Scores, UpdateStats
from rlhf_cluster.rooms import NoReference, Rooms

EOS = 258
Order = Callable[[int], Sequence[int]]


class Broken(Exception):
    """What a fake raises where a test breaks it."""


@dataclass
class Events:
    """What happened in all rooms, in order: (verb, step or version). Breaks `verb` at `when`, if told to."""

    log: list[tuple[str, int]] = field(default_factory=list)
    broken: tuple[str, int] | None = None

    def __call__(self, verb: str, number: int) -> None:
        self.log.append((verb, number))
        if (verb, number) == self.broken:
            raise Broken(f"{verb} {number}")

    def of(self, *verbs: str) -> list[tuple[str, int]]:
        return [event for event in self.log if event[0] in verbs]


def as_they_came(count: int) -> Sequence[int]:
    return range(count)


def shuffled(seed: int) -> Order:
    return lambda count: np.random.default_rng(seed).permutation(count).tolist()


def response(seed: int, max_tokens: int = 6) -> list[int]:
    """The response of a seed: 1 to `max_tokens` tokens, ending with EOS where it is shorter."""
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, max_tokens + 1))
    ids = rng.integers(0, 256, length).tolist()
    return ids if length == max_tokens else [*ids[:-1], EOS]


@dataclass
class FakeGeneration:
    """Samples by seed alone; tables of `chunk` rows leave in the order that `order` says, `ticks` turns apart."""

    events: Events = field(default_factory=Events)
    order: Order = as_they_came
    chunk: int = 2
    ticks: int = 1
    max_tokens: int = 6
    version: int = 0
    receive_ticks: int = 1

    async def sample(self, members: Members) -> AsyncIterator[Rollouts]:
        ordered = list(self.order(len(members)))
        for start in range(0, len(ordered), self.chunk):
            for _ in range(self.ticks):
                await asyncio.sleep(0)
            part = members.take(ordered[start : start + self.chunk])
            self.events("sample", int(part.step[0]))
            yield self.rollouts(part)

    def rollouts(self, members: Members) -> Rollouts:
        responses = [response(int(seed), self.max_tokens) for seed in members.seed]
        return members.extend(
            Rollouts,
            {
                "response_ids": responses,
                "rollout_logprobs": [[-0.1 * (1 + token % 7) for token in ids] for ids in responses],
                "weight_versions": [[self.version] * len(ids) for ids in responses],
                "finish_reason": ["stop" if ids[-1] == EOS else "length" for ids in responses],
                "temperature": [1.0] * len(responses),
                "incarnation": ["fake"] * len(responses),
            },
        )

    async def receive(self, version: int) -> dict[str, float]:
        for _ in range(self.receive_ticks):
            await asyncio.sleep(0)
        self.events("receive", version)
        self.version = version
        return {"sync/bytes": float(version)}


@dataclass
class FakeReward:
    """The share of small tokens in a response; a failure where `failing` says why."""

    events: Events = field(default_factory=Events)
    ticks: int = 1
    failing: Callable[[str], str] = lambda sample_id: ""

    async def score(self, rollouts: Rollouts) -> Scores:
        self.events("score", int(rollouts.step[0]))
        for _ in range(self.ticks):
            await asyncio.sleep(0)
        scores = [float((ids < 128).mean()) for ids in rollouts.response_ids]
        failures = [self.failing(sample_id) for sample_id in rollouts.sample_id]
        return Scores.of({"sample_id": rollouts.sample_id, "score": scores, "failure": failures})


@dataclass
class FakeReference:
    """Finds every token half a nat less likely than the sampler did."""

    events: Events = field(default_factory=Events)
    ticks: int = 1

    async def logprobs(self, rollouts: Rollouts) -> RefLogprobs:
        self.events("ref", int(rollouts.step[0]))
        for _ in range(self.ticks):
            await asyncio.sleep(0)
        ref_logprobs = [logprobs - 0.5 for logprobs in rollouts.rollout_logprobs]
        return RefLogprobs.of({"sample_id": rollouts.sample_id, "ref_logprobs": ref_logprobs})


class OutOfTurn(RuntimeError):
    """A verb of the learner that came too early or too late."""


@dataclass
class FakeLearner:
    """Keeps the books: which batches are open, what was trained, how old its tokens were."""

    events: Events = field(default_factory=Events)
    version: int = 0
    open: dict[int, dict[str, Rollouts | None]] = field(default_factory=dict)
    trained: dict[int, list[str]] = field(default_factory=dict)
    rows: dict[int, ScoredRollouts] = field(default_factory=dict)
    staleness: dict[int, int] = field(default_factory=dict)  # by step, of the oldest token
    most_open: int = 0
    published: list[int] = field(default_factory=list)
    controls: list[Controls] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    told: dict[int, dict[str, float]] = field(default_factory=dict)  # further metrics of an update, by step
    last: UpdateStats | None = None

    async def begin(self, step: int, sample_ids: Sequence[str]) -> None:
        self.events("begin", step)
        self.open.setdefault(step, dict.fromkeys(sample_ids))
        self.most_open = max(self.most_open, len(self.open))

    async def add(self, step: int, rows: ScoredRollouts) -> None:
        self.events("add", step)
        if step not in self.open:
            raise OutOfTurn(f"rows of batch {step} arrived, but the open batches are {sorted(self.open)}")
        await asyncio.sleep(0)
        batch = self.open[step]
        for index, sample_id in enumerate(rows.sample_id):
            if sample_id not in batch:
                raise OutOfTurn(f"{sample_id} is no member of batch {step}")
            batch[sample_id] = batch[sample_id] or rows.take([index])

    async def replace(self, step: int, gone: Sequence[str], come: Sequence[str]) -> None:
        self.events("replace", step)
        if step not in self.open:
            raise OutOfTurn(f"members of batch {step} are to change, but the open batches are {sorted(self.open)}")
        left = [sample_id for sample_id in gone if self.open[step].pop(sample_id, self) is not self]
        self.open[step] |= dict.fromkeys(come[: len(left)])

    async def update(self, step: int, controls: Controls) -> UpdateStats:
        if self.last is not None and self.last.step == step:
            return self.last
        self.events("update", step)
        if step not in self.open:
            raise OutOfTurn(f"update of batch {step}, but the open batches are {sorted(self.open)}")
        if step != self.version:
            raise OutOfTurn(f"update of batch {step} by the policy of version {self.version}")
        batch = self.open.pop(step)
        missing = [sample_id for sample_id, row in batch.items() if row is None]
        if missing:
            raise OutOfTurn(f"update of batch {step} without {missing}")
        rows = ScoredRollouts.concat([batch[sample_id] for sample_id in sorted(batch)])
        await asyncio.sleep(0)
        self.rows[step], self.trained[step] = rows, rows.sample_id
        self.staleness[step] = self.version - min(int(v.min()) for v in rows.weight_versions)
        self.controls.append(controls)
        self.version = step + 1
        metrics = {"objective/kl": 0.5, "critic/score/mean": float(rows.score.mean())}
        metrics |= {"actor/minibatches_done": float(controls.learn)} | self.told.get(step, {})
        self.last = UpdateStats(step, self.version, metrics)
        return self.last

    async def publish(self, version: int) -> None:
        self.events("publish", version)
        if version != self.version:
            raise OutOfTurn(f"asked to publish version {version} of a policy of version {self.version}")
        self.published.append(version)

    async def load(self, directory: Path, version: int) -> None:
        self.events("load", version)
        self.loaded.append((directory / "policy" / "weights").read_text())
        self.open = {step: batch for step, batch in self.open.items() if step >= version}
        self.version, self.last = version, None

    async def save(self, directory: Path) -> None:
        self.events("save", self.version)
        for part in ("policy", "critic", "state"):
            (directory / part).mkdir()
            (directory / part / "weights").write_text(f"version {self.version}")


@dataclass
class FakeRooms:
    """All rooms around one log of events."""

    events: Events = field(default_factory=Events)
    order: Order = as_they_came
    chunk: int = 2
    version: int = 0
    kl: bool = True
    ticks: dict[str, int] = field(default_factory=dict)  # turns of the event loop that a room takes, by its name

    def __post_init__(self) -> None:
        ticks = {"generation": 1, "receive": 1, "reward": 1, "reference": 1} | self.ticks
        self.generation = FakeGeneration(
            self.events,
            self.order,
            self.chunk,
            ticks["generation"],
            version=self.version,
            receive_ticks=ticks["receive"],
        )
        self.reward = FakeReward(self.events, ticks["reward"])
        self.reference = FakeReference(self.events, ticks["reference"]) if self.kl else NoReference()
        self.learner = FakeLearner(self.events, self.version)
        self.rooms = Rooms(self.generation, self.reward, self.reference, self.learner)


def prompts(count: int = 12) -> Prompts:
    return Prompts.of(
        {"prompt_id": [f"p{i:02}" for i in range(count)], "prompt_ids": [[i, i + 1] for i in range(count)]}
    )
