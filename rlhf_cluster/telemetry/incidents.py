"""What did not go as it should have in PPO: guardrails that were passed, samples without a score, and the slowest.

Takes the metrics and the rollouts of a run, gives tables for its report; decides nothing.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cluster.storage.rollout_log import RolloutLog
from rlhf_cluster.telemetry.metrics import MetricsRecord

GUARD, FAILURE, SECONDS, LOST = "guard/", "reward_failure/", "reward_s/", "failure"
REASONS, SLOWEST = 10, 5  # the page is read by a person; the rollouts have them all


@dataclass(frozen=True)
class Passed:
    """A guardrail: what is done beyond it, where it was passed, and the value there (None: not finite)."""

    name: str
    action: str
    steps: tuple[int, ...]
    values: tuple[float | None, ...]


@dataclass
class Failure:
    """Samples that a part of the score gave nothing for, for one reason; `dropped`: those that were lost for it."""

    part: str
    reason: str
    count: int = 0
    dropped: int = 0
    steps: set[int] = field(default_factory=set)


@dataclass(frozen=True, order=True)
class Asked:
    """One sample that a part of the score took time for."""

    seconds: float
    part: str
    step: int
    sample_id: str


@dataclass(frozen=True)
class Incidents:
    """`failures`: what cost most samples first, then the most frequent; `others` beyond them. `slowest`: the slowest
    first."""

    guardrails: tuple[Passed, ...]
    failures: tuple[Failure, ...]
    others: int
    slowest: tuple[Asked, ...]


def incidents(records: Sequence[MetricsRecord], rollouts: Path, rails: Mapping[str, Any]) -> Incidents:
    """`rails`: the run's `ppo.guardrails`. Raises StorageError on rollouts that cannot be read."""
    failures: dict[tuple[str, str], Failure] = {}
    slowest: list[Asked] = []
    log = RolloutLog(rollouts)
    for step in log.steps():
        table = log.read(step, ("sample_id", LOST, FAILURE, SECONDS)).to_pydict()
        for name, column in table.items():
            part = name.partition("/")[2]
            if name.startswith(FAILURE):
                for reason, lost in zip(column, table[LOST], strict=True):
                    if reason:
                        found = failures.setdefault((part, reason), Failure(part, reason))
                        found.count += 1
                        found.dropped += lost == f"{part}: {reason}"
                        found.steps.add(step + 1)
            if name.startswith(SECONDS):
                asked = zip(column, table["sample_id"], strict=True)
                timed = [Asked(seconds, part, step + 1, sample_id) for seconds, sample_id in asked if seconds]
                slowest = heapq.nlargest(SLOWEST, [*slowest, *timed])
    frequent = sorted(failures.values(), key=lambda found: (-found.dropped, -found.count, found.part, found.reason))
    others = sum(found.count for found in frequent[REASONS:])
    return Incidents(_passed(records, rails), tuple(frequent[:REASONS]), others, tuple(slowest))


def _passed(records: Sequence[MetricsRecord], rails: Mapping[str, Any]) -> tuple[Passed, ...]:
    found: dict[str, dict[int, float | None]] = defaultdict(dict)
    for record in records:
        for name, value in record.metrics.items():
            if name.startswith(GUARD):
                found[name.removeprefix(GUARD)][record.step] = value
    return tuple(
        Passed(name, _action(rails, name), tuple(at), tuple(at.values())) for name, at in sorted(found.items())
    )


def _action(rails: Mapping[str, Any], name: str) -> str:
    """What a rail does. `not_finite` is its action; `max_skips` is a number, and stops the run."""
    rail = rails.get(name)
    if isinstance(rail, Mapping):
        return str(rail["action"])
    return rail if isinstance(rail, str) else "stop"


def steps_text(steps: Sequence[int]) -> str:
    """Ascending numbers in few words: 1, 2, 3, 7 as `1-3, 7`."""
    spans: list[list[int]] = []
    for step in sorted(steps):
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)


def range_text(values: Sequence[float | None]) -> str:
    """The finite values from the least to the largest, and whether there were others."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    ends = dict.fromkeys(f"{end:.4g}" for end in (min(finite), max(finite))) if finite else {}
    return " to ".join(ends) + (", not finite" if ends else "not finite") * (len(finite) < len(values))
