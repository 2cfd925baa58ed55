"""Samples of one policy on the held-out prompts, with the gold score of each and its distance from the reference."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_cluster.ranking import Judge
from rlhf_cluster.records import Members, ReferencedRollouts, Rollouts, ScoredRollouts, join
from rlhf_cluster.rooms import Rooms
from rlhf_cluster.telemetry.comparison import Comparison, Gold, Sample, compare


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Scored samples in the order of their members: `samples_per_prompt` of each prompt stand side by side."""

    rollouts: ScoredRollouts
    gold: np.ndarray  # [prompts, samples]; NaN where the reward is the judge and failed
    samples_per_prompt: int

    def table(self) -> pa.Table:
        """The rollouts with their gold scores, for the record."""
        return self.rollouts.table.append_column("gold", pa.array(self.gold.ravel(), pa.float32()))

    def kl(self) -> np.ndarray | None:
        """Log-ratio to the reference summed over each response, in nats: [prompts, samples]; None without a
        reference."""
        if not isinstance(self.rollouts, ReferencedRollouts):
            return None
        pairs = zip(self.rollouts.rollout_logprobs, self.rollouts.ref_logprobs, strict=True)
        return np.array([float((own - ref).sum()) for own, ref in pairs]).reshape(-1, self.samples_per_prompt)

    def metrics(self) -> dict[str, float]:
        """Means over all samples, as they are logged; without a reference there is no KL."""
        kl = self.kl()
        scored = zip(self.rollouts.score.tolist(), self.rollouts.failure, strict=True)
        return {
            "eval/gold": float(np.nanmean(self.gold)),
            "eval/score": float(np.mean([score for score, failure in scored if not failure] or [np.nan])),
            "eval/response_length": float(np.mean([*map(len, self.rollouts.response_ids)])),
            **({} if kl is None else {"eval/kl": float(kl.mean())}),
        }


def read_heldout(path: Path, samples_per_prompt: int) -> HeldOut:
    """What `HeldOut.table` wrote as Parquet."""
    table = pq.read_table(path)
    kind = ReferencedRollouts if "ref_logprobs" in table.column_names else ScoredRollouts
    gold = table.column("gold").to_numpy().reshape(-1, samples_per_prompt)
    return HeldOut(kind(table), gold, samples_per_prompt)


class HeldOutError(RuntimeError):
    """Samples without a score, of which nothing can be said."""


def with_scores(scores: Sequence[float], failures: Sequence[str]) -> np.ndarray:
    """The scores, NaN where a reward has failed: a sample that nobody scored must not count as one of score 0. Raises
    HeldOutError where all have failed."""
    if len(failures) and all(failures):
        reason, _ = Counter(failures).most_common(1)[0]
        raise HeldOutError(
            f"none of {len(failures)} samples has a score ({reason}); mend the reward and give the same command again: "
            "the run goes on from here"
        )
    return np.array([np.nan if failure else score for score, failure in zip(scores, failures, strict=True)])


async def sample_heldout(rooms: Rooms, members: Members, samples_per_prompt: int, gold: Judge | None) -> HeldOut:
    """Samples every member from the policy that generation serves now. Without `gold`, the reward's score is the
    gold."""
    scoring: list[asyncio.Task[ScoredRollouts]] = []
    async with asyncio.TaskGroup() as side_by_side:
        async for rollouts in rooms.generation.sample(members):
            scoring.append(side_by_side.create_task(_scored(rooms, rollouts)))
    arrived = ScoredRollouts.concat([task.result() for task in scoring])
    place = {sample_id: row for row, sample_id in enumerate(arrived.sample_id)}
    scored = arrived.take([place[sample_id] for sample_id in members.sample_id])
    scores = with_scores(scored.score, scored.failure) if gold is None else np.array(gold(scored), float)
    return HeldOut(scored, scores.reshape(-1, samples_per_prompt), samples_per_prompt)


async def _scored(rooms: Rooms, rollouts: Rollouts) -> ScoredRollouts:
    scores, ref = await asyncio.gather(rooms.reward.score(rollouts), rooms.reference.logprobs(rollouts))
    return join(rollouts, scores, ref)


def compare_heldout(before: HeldOut, after: HeldOut, gold: Gold) -> Comparison:
    """Paired over the prompts all of whose samples have a score; see `telemetry.comparison.compare`."""
    kl, told = after.kl(), _told(before, after)
    return compare(
        before.gold[told].tolist(), after.gold[told].tolist(), None if kl is None else kl[told].tolist(), gold
    )


def _told(before: HeldOut, after: HeldOut) -> np.ndarray:
    """Which prompts have a score for every sample, bool [prompts]."""
    return np.isfinite(before.gold).all(1) & np.isfinite(after.gold).all(1)


def samples(before: HeldOut, after: HeldOut, text: Callable[[Any], str]) -> list[Sample]:
    """The first sample of every prompt that is compared, before and after."""
    step = before.samples_per_prompt
    return [
        Sample(
            text(before.rollouts.prompt_ids[row]),
            text(before.rollouts.response_ids[row]),
            text(after.rollouts.response_ids[row]),
            float(before.gold.ravel()[row]),
            float(after.gold.ravel()[row]),
        )
        for row in np.flatnonzero(_told(before, after)) * step
    ]
