"""`report.html`: one self-contained page that says what a run did, for someone who was not there.

Takes a run's directory (`metrics.jsonl`; where present `comparison.json`, `samples.jsonl`, `rm_calibration.json`,
`timeline.json`, `config/resolved.yaml`, `rollouts/`), gives the page. No network, no scripts: a content security policy
in the page forbids both. All text goes through Jinja's escaping, since responses are untrusted. What a run did not log
is said to be missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from yaml import safe_load

from rlhf_cluster.storage.durable import replace_text
from rlhf_cluster.telemetry import calibration, incidents
from rlhf_cluster.telemetry.activity import Bubbles
from rlhf_cluster.telemetry.chart import COLOURS, Series, line_chart, stacked_chart
from rlhf_cluster.telemetry.comparison import Comparison, Sample, printable, read_samples
from rlhf_cluster.telemetry.metrics import FILE as METRICS_FILE
from rlhf_cluster.telemetry.metrics import MetricsRecord, read_metrics
from rlhf_cluster.telemetry.progress import clock_text

REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.json"
SAMPLES_FILE = "samples.jsonl"
TIMELINE_FILE = "timeline.json"
MAX_SAMPLES = 12  # the page is read by a person; the file has them all
TIMING = "timing_s/"


@dataclass(frozen=True)
class Plot:
    """A chart to draw where at least one of `names` was logged. `*` at the end stands for any ending."""

    title: str
    y_label: str
    names: tuple[str, ...]


PLOTS = (
    Plot("Score (what PPO raises)", "score", ("objective/scores",)),
    Plot("Parts of the score", "score", ("reward/*",)),
    Plot("Gold score of the batch", "gold score", ("objective/gold",)),
    Plot("Held-out prompts", "mean score", ("eval/gold", "eval/score")),
    Plot("KL from the reference policy", "nats per response", ("objective/kl",)),
    Plot("Coefficient of the KL penalty", "coefficient", ("actor/kl_coef", "actor/kl_loss_coef")),
    Plot("Entropy of the policy", "nats", ("objective/entropy",)),
    Plot("Response length", "tokens", ("response_length/mean",)),
    Plot("Policy loss", "loss", ("actor/pg_loss",)),
    Plot("Loss of the pretraining mix", "nats per token", ("ptx/loss",)),
    Plot("Value loss", "loss", ("critic/vf_loss",)),
    Plot("Clip fraction", "share of tokens", ("actor/pg_clipfrac", "critic/vf_clipfrac")),
    Plot("Approximate KL of the update", "nats per token", ("actor/ppo_kl",)),
    Plot("Gradient norm before clipping", "norm", ("actor/grad_norm", "critic/grad_norm")),
    Plot("How far the sampler is from the learner", "k3, nats per token", ("rollout/mismatch_kl",)),
    Plot("Staleness of the tokens", "versions", ("rollout/staleness", "rollout/staleness_max")),
    Plot("Idle share of the workers", "share of the time", ("idle/*",)),
    Plot("Effective sample size", "share of tokens", ("rollout/ess",)),
    Plot("Loss of supervised fine-tuning", "nats per token", ("sft/loss",)),
    Plot("Loss of the reward model", "nats per pair", ("rm/loss",)),
    Plot("Loss of learning from rankings (DPO, IPO, KTO)", "loss per prompt", ("dpo/loss",)),
    Plot("Accuracy of the policy's own rewards", "share of pairs", ("dpo/accuracy", "dpo/heldout_accuracy")),
    Plot("Margin of the policy's own rewards", "difference", ("dpo/margin", "dpo/heldout_margin")),
    Plot("KL from the policy that DPO began with", "nats per response", ("dpo/kl",)),
    Plot("Accuracy of the reward model", "share of pairs", ("rm/accuracy",)),
    Plot("Margin of the reward model", "score difference", ("rm/margin",)),
)


@dataclass(frozen=True)
class Figure:
    """A drawn chart with what stands around it."""

    title: str
    svg: Markup
    legend: tuple[str, ...]


@dataclass(frozen=True)
class StageSummary:
    """One stage: its iterations, how long it took, its figures."""

    name: str
    steps: int
    duration: str
    figures: tuple[Figure, ...]


def write_report(run_dir: Path, stopped: str = "") -> Path:
    """Writes `run_dir`/report.html, whole or not at all, and returns its path. `stopped`: why the run was, if it was.

    Raises FileNotFoundError without `metrics.jsonl`, MetricError, ReportError or StorageError on a file that
    cannot be read.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["printable"] = printable
    environment.filters["steps"] = incidents.steps_text
    environment.filters["range"] = incidents.range_text
    page = environment.get_template("report.html.j2").render(_contents(run_dir), stopped=stopped)
    target = run_dir / REPORT_FILE
    replace_text(target, page, "the report")
    return target


def _contents(run_dir: Path) -> dict[str, Any]:
    records = read_metrics(run_dir / METRICS_FILE)
    samples = _samples(run_dir / SAMPLES_FILE)
    config_file = run_dir / "config" / "resolved.yaml"
    config = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
    settings = safe_load(config) or {}
    rails = settings.get("ppo", {}).get("guardrails", {})
    return {
        "name": run_dir.resolve().name,
        "comparison": _comparison(run_dir / COMPARISON_FILE),
        "judged": "ppo" in settings.get("stages", ["ppo"]),  # whether there is to be a comparison
        "samples": samples[:MAX_SAMPLES],
        "samples_total": len(samples),
        "stages": summaries(records),
        "reward_model": _last(records, "rm/"),
        "calibration": _calibration(run_dir),
        "bubbles": _bubbles(run_dir / TIMELINE_FILE),
        "incidents": incidents.incidents(records, run_dir / "rollouts", rails),
        "config": config,
        "colours": COLOURS,
        "duration": clock_text(records[-1].seconds) if records else "",
        "nulls": _nulls(records),
    }


def _comparison(path: Path) -> Comparison | None:
    return Comparison.from_json(path.read_text(encoding="utf-8")) if path.exists() else None


def _samples(path: Path) -> list[Sample]:
    return read_samples(path) if path.exists() else []


def summaries(records: Sequence[MetricsRecord]) -> list[StageSummary]:
    """The stages in order of appearance. A stage lasts from the end of the one before to its last record."""
    found, end = [], 0.0
    for name in dict.fromkeys(record.stage for record in records):
        of_stage = [record for record in records if record.stage == name]
        steps = len({record.step for record in of_stage if record.step})  # 0 is what stood before the first
        found.append(StageSummary(name, steps, clock_text(max(0.0, of_stage[-1].seconds - end)), _figures(of_stage)))
        end = max(end, of_stage[-1].seconds)
    return found


def _figures(records: Sequence[MetricsRecord]) -> tuple[Figure, ...]:
    logged = sorted({name for record in records for name in record.metrics})
    drawn = []
    for plot in PLOTS:
        names = [name for name in logged if any(_matches(name, wanted) for wanted in plot.names)]
        if names:
            lines = [_series(records, name) for name in names]
            drawn.append(_figure(plot.title, line_chart(lines, "step", plot.y_label), lines))
    parts = [name for name in logged if name.startswith(TIMING) and name != TIMING + "step"]
    if parts:
        bars = [_series(records, name, name.removeprefix(TIMING)) for name in parts]
        drawn.append(_figure("Seconds by part (parts may overlap)", stacked_chart(bars, "step", "seconds"), bars))
    return tuple(drawn)


def _matches(name: str, wanted: str) -> bool:
    return name.startswith(wanted[:-1]) if wanted.endswith("*") else name == wanted


def _series(records: Sequence[MetricsRecord], name: str, shown: str = "") -> Series:
    points = {record.step: record.metrics[name] for record in records if name in record.metrics}
    steps = sorted(points)
    return Series(shown or name, steps, [points[step] for step in steps])


def _figure(title: str, svg: str, series: Sequence[Series]) -> Figure:
    names = tuple(one.name for one in series)
    return Figure(title, Markup(svg), names if len(names) > 1 else ())  # chart.py escapes all it is given


def _calibration(run_dir: Path) -> Figure | None:
    if not (run_dir / calibration.FILE).exists():
        return None
    bins = calibration.read_calibration(run_dir)
    line = Series("observed", [one.predicted for one in bins], [one.observed for one in bins])
    svg = line_chart([line], "predicted probability of the favourite", "how often it is right", unit_square=True)
    pairs = sum(one.pairs for one in bins)
    return _figure(f"Calibration of the reward model on {pairs} held-out pairs", svg, [line])


def _bubbles(path: Path) -> list[Bubbles]:
    """None where no timeline was written, or by an earlier version."""
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return [Bubbles(**one) for one in told.get("otherData", {}).get("bubbles", [])]


def _last(records: Sequence[MetricsRecord], prefix: str) -> dict[str, float]:
    values = {n: v for record in records for n, v in record.metrics.items() if n.startswith(prefix) and v is not None}
    return dict(sorted(values.items()))


def _nulls(records: Sequence[MetricsRecord]) -> dict[str, int]:
    names = [name for record in records for name, value in record.metrics.items() if value is None]
    return {name: names.count(name) for name in sorted(set(names))}
