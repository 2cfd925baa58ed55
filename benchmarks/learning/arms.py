"""Runs of `rlhf-cluster` as a person starts them, one after the other, and what each of them says at its end."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf_cluster.telemetry.comparison import Comparison
from rlhf_cluster.telemetry.metrics import MetricsRecord, read_metrics

T = TypeVar("T")
COMMAND = str(Path(sys.executable).parent / "rlhf-cluster")


@dataclass(frozen=True)
class Point:
    """Means over the held-out samples of one iteration; 0 is the policy before."""

    step: int
    kl: float
    gold: float
    score: float
    response_length: float


@dataclass(frozen=True)
class Outcome:
    """The comparison on held-out prompts that a run ends with, and the way there; errors are standard errors over
    prompts."""

    before: float
    after: float
    difference: float
    difference_se: float
    kl: float
    seconds: float
    points: tuple[Point, ...]

    @classmethod
    def of_json(cls, told: dict[str, Any]) -> Outcome:
        """What `dataclasses.asdict` made of one."""
        return cls(**told | {"points": tuple(Point(**point) for point in told["points"])})


def run(directory: Path, overrides: Sequence[str], command: str = COMMAND) -> Path:
    """Runs to the end (or finds that it did); returns the directory. Raises where it fails, with its last words."""
    finished = subprocess.run(
        [command, "run", f"dir={directory}", "logging.progress=false", "logging.sample_every=0", *overrides],
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        raise RuntimeError(f"{directory.name}: {finished.stderr.strip() or finished.stdout[-500:]}")
    return directory


def outcome(directory: Path) -> Outcome:
    """What a finished run found."""
    told = Comparison.from_json((directory / "comparison.json").read_text())
    records = [record for record in read_metrics(directory / "metrics.jsonl") if record.stage == "ppo"]
    points = [point(record) for record in records if "eval/gold" in record.metrics]
    kl = math.nan if told.kl_mean is None else told.kl_mean
    return Outcome(
        told.before_mean, told.after_mean, told.difference, told.difference_se, kl, records[-1].seconds, tuple(points)
    )


def point(record: MetricsRecord) -> Point:
    told = {name: float("nan" if value is None else value) for name, value in record.metrics.items()}
    return Point(
        record.step,
        told.get("eval/kl", math.nan),
        told["eval/gold"],
        told["eval/score"],
        told["eval/response_length"],
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error (nan for one)."""
    mean = sum(values) / len(values)
    spread = (
        math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else math.nan
    )
    return mean, spread / math.sqrt(len(values))


def signed(values: Sequence[float]) -> str:
    """Their mean with its sign, and its standard error where there is one."""
    mean, error = mean_and_error(values)
    return f"{mean:+.3f}" if math.isnan(error) else f"{mean:+.3f} ± {error:.3f}"


def by_arm(seeds: Iterable[dict[str, T]]) -> dict[str, list[T]]:
    """One mapping of lists from what each seed gave."""
    found: dict[str, list[T]] = {}
    for of_seed in seeds:
        for arm, one in of_seed.items():
            found.setdefault(arm, []).append(one)
    return found


def place(directory: Path, arm: str) -> Path:
    """Where the run of an arm lies."""
    return directory / "".join(letter if letter.isalnum() else "-" for letter in arm.lower())


def options(**values: object) -> list[str]:
    """`a__b=1` as the override `a.b=1`."""
    return [f"{name.replace('__', '.')}={value}" for name, value in values.items()]


def table(rows: Mapping[str, Sequence[Outcome]]) -> str:
    """One row for each arm, means over seeds, as Markdown."""
    lines = [
        "| arm | seeds | before | after | difference | its standard error by seed | KL | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, outcomes in rows.items():
        cells = [
            f"{mean_and_error([one.before for one in outcomes])[0]:.3f}",
            f"{mean_and_error([one.after for one in outcomes])[0]:.3f}",
            signed([one.difference for one in outcomes]),
            ", ".join(f"{one.difference_se:.3f}" for one in outcomes),
            f"{mean_and_error([one.kl for one in outcomes])[0]:.2f}",
            f"{mean_and_error([one.seconds for one in outcomes])[0]:.0f}",
        ]
        lines.append(f"| {arm} | {len(outcomes)} | {' | '.join(cells)} |")
    return "\n".join(lines)
