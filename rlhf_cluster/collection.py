"""One batch, from the prompts that are its members to rows that the learner has evaluated.

           generation -> scoring || reference -> admission -> learner: add          per rollout, as each one ends

Asks the rooms, and decides nothing that admission does not say: which rows are trained on, and whose place is free.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import Protocol, TypeVar

import numpy as np

from rlhf_cluster.config import PPOConfig
from rlhf_cluster.loop.admission import Admission, Batch
from rlhf_cluster.records import QUARANTINED, Members, RefLogprobs, Rollouts, ScoredRollouts, Scores, join
from rlhf_cluster.rooms import NoReference, Rooms
from rlhf_cluster.telemetry.timer import Timer

T = TypeVar("T")

PAUSE_S = 10.0  # between two tries for a batch that has no row yet


class Batches(Protocol):
    """Which responses to sample in a step: a pure function of the step."""

    def members(self, step: int, batch_size: int, samples_per_prompt: int) -> Members: ...

    def refill(
        self, step: int, attempt: int, count: int, samples_per_prompt: int, taken: AbstractSet[str]
    ) -> Members: ...


async def collect(
    rooms: Rooms,
    step: int,
    prompts: Batches,
    cfg: PPOConfig,
    served: Awaitable[object],
    timer: Timer,
    warn: Callable[[str], None],
) -> Batch:
    """One batch, from its members to rows that the learner has evaluated; begun once generation has `served` the
    weights that came before it. Members that failed or were filtered are replaced by others, a few times; then the
    batch runs short. While it has no row at all others are tried for longer: whoever gives the scores may come back."""
    await served
    together = cfg.samples_per_prompt if cfg.advantage.compares_groups else 1
    admission = Admission(cfg.advantage.compares_groups, cfg.dynamic_sampling)
    members = prompts.members(step, cfg.batch_size, cfg.samples_per_prompt)
    await rooms.learner.begin(step, members.sample_id)
    taken: set[str] = set()
    end, clock = math.inf, asyncio.get_running_loop().time
    for attempt in itertools.count():
        await evaluate_all(rooms, step, members, admission, timer)
        gone = admission.gone()
        late = attempt >= cfg.max_refill
        if attempt == cfg.max_refill:
            end = clock() + cfg.empty_wait_s
        if not gone or (late and (admission.any() or clock() >= end)):
            break
        if late:
            warn(f"iteration {step + 1}: no sample has a score yet ({reasons(admission.batch())}); tries again")
            await asyncio.sleep(PAUSE_S)
        taken |= set(members.prompt_id)
        members = prompts.refill(step, attempt, len(gone) // together, together, taken)
        await rooms.learner.replace(step, gone, members.sample_id)
    restored = admission.restore_filtered(gone)
    kept = set(restored.sample_id)
    if missing := [sample_id for sample_id in gone if sample_id not in kept]:
        await rooms.learner.replace(step, missing, [])
    if len(restored):
        warn(f"iteration {step + 1}: the responses to each prompt scored alike; they are trained on, and teach nothing")
        await rooms.learner.add(step, restored)
    return admission.batch()


async def evaluate_all(rooms: Rooms, step: int, members: Members, admission: Admission, timer: Timer) -> None:
    """Samples the members; each rollout moves on as it ends."""
    admission.expect(members)
    async with asyncio.TaskGroup() as evaluating:
        with timer("gen"):
            async for rollouts in rooms.generation.sample(members):
                evaluating.create_task(evaluate(rooms, step, rollouts, admission, timer))


async def evaluate(rooms: Rooms, step: int, rollouts: Rollouts, admission: Admission, timer: Timer) -> None:
    """Score and reference side by side, then the learner's own logprobs and values of what is admitted. What has no
    response goes nowhere but on record."""
    sampled = [not reason.startswith(QUARANTINED) for reason in rollouts.finish_reason]
    if not all(sampled):
        admission.take(unscored(rooms, rollouts.take(np.flatnonzero(~np.array(sampled)))))
        rollouts = rollouts.take(np.flatnonzero(sampled))
        if not len(rollouts):
            return

    async def timed(part: str, ask: Callable[[Rollouts], Awaitable[T]]) -> T:
        with timer(part):
            return await ask(rollouts)

    async with asyncio.TaskGroup() as side_by_side:
        scores = side_by_side.create_task(timed("reward", rooms.reward.score))
        ref = side_by_side.create_task(timed("ref", rooms.reference.logprobs))
    admitted = admission.take(join(rollouts, scores.result(), ref.result()))
    if len(admitted):
        with timer("old_log_prob"):
            await rooms.learner.add(step, admitted)


def unscored(rooms: Rooms, rollouts: Rollouts) -> ScoredRollouts:
    """Rollouts that there are none of, as rows that nothing can be trained on; the reason is why they ended."""
    ids, failures = rollouts.sample_id, rollouts.finish_reason
    scores = Scores.of({"sample_id": ids, "score": [0.0] * len(ids), "failure": failures})
    nothing: list[list[float]] = [[]] * len(ids)
    ref = RefLogprobs.of({"sample_id": ids, "ref_logprobs": nothing})
    return join(rollouts, scores, None if isinstance(rooms.reference, NoReference) else ref)


def reasons(batch: Batch) -> str:
    """Why samples failed, the most frequent first."""
    return most_frequent(failure for rows in batch.others.values() for failure in rows.failure)


def most_frequent(failures: Iterable[str]) -> str:
    """The three most frequent, with how often; those that are empty are none."""
    counts = Counter(filter(None, failures))
    return "; ".join(f"{count} x {failure}" for failure, count in counts.most_common(3))
