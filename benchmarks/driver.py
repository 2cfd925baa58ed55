"""What does the driver itself cost? `ppo.train` between rooms that answer at once, in this process.

    python benchmarks/driver.py [--batch 512] [--samples 4] [--tokens 128] [--flush 16] [--iterations 10]

Rooms hand out tables that were made beforehand; what they need to do so is measured apart and taken off, so that what
is left is the loop's own: admission, joining, batches, the rollout log, metrics. CPU seconds of the whole process, its
threads included. Prints one table and writes `benchmarks/results/driver-<utc>.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rounds import show, write
from virtual_time import Clock
from workload import log_of, rollouts_of

from rlhf_cluster import ppo
from rlhf_cluster.config import PPOConfig
from rlhf_cluster.data.batches import PromptOrder
from rlhf_cluster.loop.admission import Batch
from rlhf_cluster.records import Controls, Members, Prompts, RefLogprobs, Rollouts, ScoredRollouts, Scores, UpdateStats
from rlhf_cluster.rooms import Rooms
from rlhf_cluster.telemetry.metrics import JsonlSink

PROMPT_TOKENS, PROMPTS = 64, 4096
GOAL_MS = 50.0  # of CPU for 512 rollouts


@dataclass
class NullGeneration:
    clock: Clock
    tokens: int
    flush: int
    version: int = 0

    async def sample(self, members: Members) -> AsyncIterator[Rollouts]:
        for start in range(0, len(members), self.flush):
            await asyncio.sleep(0)
            with self.clock.of_others():
                part = members.slice(start, min(start + self.flush, len(members)))
                rollouts = rollouts_of(part, self.tokens, self.version)
            yield rollouts

    async def receive(self, version: int) -> dict[str, float]:
        self.version = version
        return {}


@dataclass
class NullScorers:
    """Reward and reference."""

    clock: Clock

    async def score(self, rollouts: Rollouts) -> Scores:
        with self.clock.of_others():
            ids = rollouts.sample_id
            return Scores.of({"sample_id": ids, "score": [0.5] * len(ids), "failure": [""] * len(ids)})

    async def logprobs(self, rollouts: Rollouts) -> RefLogprobs:
        with self.clock.of_others():
            return RefLogprobs.of({"sample_id": rollouts.sample_id, "ref_logprobs": rollouts.rollout_logprobs})


@dataclass
class NullLearner:
    rows: dict[int, int] = field(default_factory=dict)

    async def begin(self, step: int, sample_ids: Sequence[str]) -> None:
        self.rows[step] = 0

    async def add(self, step: int, rows: ScoredRollouts) -> None:
        self.rows[step] += len(rows)

    async def replace(self, step: int, gone: Sequence[str], come: Sequence[str]) -> None:
        raise AssertionError("nothing fails here")

    async def update(self, step: int, controls: Controls) -> UpdateStats:
        return UpdateStats(step, step + 1, {"objective/kl": 0.1, "objective/entropy": 2.0})

    async def publish(self, version: int) -> None: ...

    async def load(self, directory: Path, version: int) -> None: ...

    async def save(self, directory: Path) -> None:
        (directory / "policy").mkdir()


class Costs:
    """CPU seconds of the driver in each iteration."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self.seconds = clock, list[float]()
        self._before = clock.own()

    def show(self, step: int, batch: Batch) -> None:
        """Called once all is written down."""
        now = self._clock.own()
        self.seconds.append(now - self._before)
        self._before = now


def prompts() -> Prompts:
    ids = np.random.default_rng(0).integers(0, 1000, (PROMPTS, PROMPT_TOKENS)).astype(np.int32)
    return Prompts.of({"prompt_id": [f"p{i}" for i in range(PROMPTS)], "prompt_ids": list(ids)})


async def measure(args: argparse.Namespace, directory: Path) -> list[float]:
    """CPU seconds of each iteration; the first is warm-up and left out."""
    clock = Clock()
    scorers, costs = NullScorers(clock), Costs(clock)
    rooms = Rooms(NullGeneration(clock, args.tokens, args.flush), scorers, scorers, NullLearner())
    cfg = PPOConfig(steps=args.iterations + 1, batch_size=args.batch, samples_per_prompt=args.samples)
    log = log_of(directory, JsonlSink(directory / "metrics.jsonl"), costs.show)
    with log.metrics:
        await ppo.train(rooms, PromptOrder(prompts(), seed=0), cfg, log)
    return costs.seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU of the driver for a batch of rollouts.")
    for name, default in (("batch", 512), ("samples", 4), ("tokens", 128), ("flush", 16), ("iterations", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        seconds = asyncio.run(measure(args, Path(directory)))
    per_512 = statistics.median(seconds) * 1000 * 512 / args.batch
    spread = [f"{1000 * value * 512 / args.batch:.1f}" for value in (min(seconds), max(seconds))]
    row = [str(args.batch), str(args.tokens), str(args.flush), f"{per_512:.1f}", *spread, f"{GOAL_MS:g}"]
    columns = ["rollouts", "tokens each", "a table", "CPU ms for 512, median", "smallest", "largest", "goal"]
    show("CPU of the driver", columns, [row], [])
    write("driver", {"arguments": vars(args), "seconds": seconds})


if __name__ == "__main__":
    main()
