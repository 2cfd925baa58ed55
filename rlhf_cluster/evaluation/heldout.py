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
    gold: np.ndarray  # [prompts, samples]
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
            "eval/gold": float(self.gold.mean()),
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
    """Held-out samples without a score, of which nothing can be said."""


def require_scores(failures: Sequence[str]) -> None:
    """Raises HeldOutError where a reward has failed: a sample that nobody scored must not count as one of score 0."""
    if failed := Counter(failure for failure in failures if failure):
        reason, _ = failed.most_common(1)[0]
        raise HeldOutError(
            f"{failed.total()} of {len(failures)} held-out samples have no score ({reason}); mend the reward and give "
            "the same command again: the run goes on from here"
        )


async def sample_heldout(rooms: Rooms, members: Members, samples_per_prompt: int, gold: Judge | None) -> HeldOut:
    """Samples every member from the policy that generation serves now. Without `gold`, the reward's score is the
    gold."""
    scoring: list[asyncio.Task[ScoredRollouts]] = []
    async with asyncio.TaskGroup() as side_by_side:
        async for rollouts in rooms.generation.sample(members):
            scoring.append(side_by_side.create_task(_scored(rooms, rollouts)))
    arrived = ScoredRollouts.concat([task.result() for task in scoring])
    if gold is None:
        require_scores(arrived.failure)
    place = {sample_id: row for row, sample_id in enumerate(arrived.sample_id)}
    scored = arrived.take([place[sample_id] for sample_id in members.sample_id])
    scores = scored.score.tolist() if gold is None else list(gold(scored))
    return HeldOut(scored, np.array(scores, float).reshape(-1, samples_per_prompt), samples_per_prompt)


async def _scored(rooms: Rooms, rollouts: Rollouts) -> ScoredRollouts:
    scores, ref = await asyncio.gather(rooms.reward.score(rollouts), rooms.reference.logprobs(rollouts))
    return join(rollouts, scores, ref)


def compare_heldout(before: HeldOut, after: HeldOut, gold: Gold) -> Comparison:
    """Paired over prompts; see `telemetry.comparison.compare`."""
    kl = after.kl()
    return compare(before.gold.tolist(), after.gold.tolist(), kl.tolist() if kl is not None else None, gold)


def samples(before: HeldOut, after: HeldOut, text: Callable[[Any], str]) -> list[Sample]:
    """The first sample of every prompt, before and after."""
    step = before.samples_per_prompt
    return [
        Sample(
            text(before.rollouts.prompt_ids[row]),
            text(before.rollouts.response_ids[row]),
            text(after.rollouts.response_ids[row]),
            float(before.gold.ravel()[row]),
            float(after.gold.ravel()[row]),
        )
        for row in range(0, len(before.rollouts), step)
    ]
