"""Runs of `rlhf-cluster` as a person starts them, one after the other, and what each of them says at its end."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_cluster.telemetry.comparison import Comparison
from rlhf_cluster.telemetry.metrics import read_metrics

COMMAND = str(Path(sys.executable).parent / "rlhf-cluster")


@dataclass(frozen=True)
class Outcome:
    """The comparison on held-out prompts that a run ends with; errors are standard errors over prompts."""

    before: float
    after: float
    difference: float
    difference_se: float
    kl: float
    seconds: float
    curve: tuple[tuple[float, float], ...]  # (KL, gold score) of each training batch


def run(directory: Path, overrides: Sequence[str], command: str = COMMAND) -> float:
    """Runs to the end (or finds that it did); returns the seconds. Raises where it fails, with its last words."""
    began = time.monotonic()
    finished = subprocess.run(
        [command, "run", f"dir={directory}", "logging.progress=false", "logging.sample_every=0", *overrides],
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        raise RuntimeError(f"{directory.name}: {finished.stderr.strip() or finished.stdout[-500:]}")
    return time.monotonic() - began


def outcome(directory: Path, seconds: float) -> Outcome:
    told = Comparison.from_json((directory / "comparison.json").read_text())
    curve = [
        (record.metrics["objective/kl"], record.metrics["objective/gold"])
        for record in read_metrics(directory / "metrics.jsonl")
        if "objective/gold" in record.metrics and "objective/kl" in record.metrics
    ]
    return Outcome(
        told.before_mean,
        told.after_mean,
        told.difference,
        told.difference_se,
        math.nan if told.kl_mean is None else told.kl_mean,
        seconds,
        tuple((float(kl or 0.0), float(gold or 0.0)) for kl, gold in curve),
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error (nan for one)."""
    mean = sum(values) / len(values)
    spread = (
        math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else math.nan
    )
    return mean, spread / math.sqrt(len(values))


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
            "{:+.3f} ± {:.3f}".format(*mean_and_error([one.difference for one in outcomes])),
            ", ".join(f"{one.difference_se:.3f}" for one in outcomes),
            f"{mean_and_error([one.kl for one in outcomes])[0]:.2f}",
            f"{mean_and_error([one.seconds for one in outcomes])[0]:.0f}",
        ]
        lines.append(f"| {arm} | {len(outcomes)} | {' | '.join(cells)} |")
    return "\n".join(lines)
