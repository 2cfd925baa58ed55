"""`rlhf-cluster tune RUN`: what a run's own metrics say of its split of workers, and what to change."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf_cluster.config import ConfigError, RunConfig, load_file
from rlhf_cluster.planning.split import Machines, Split, Work, best, seconds
from rlhf_cluster.telemetry.metrics import FILE, read_metrics

LEAST = 3  # iterations to judge by, after the first, in which everything is slower
WORTH = 1.03  # times as fast: less is within what was measured


@dataclass(frozen=True)
class Role:
    """Of the workers of a role, as measured."""

    name: str
    workers: int
    busy: float  # share of an iteration
    gpus: float  # of one
    threads: int


@dataclass(frozen=True)
class Advice:
    """Overrides, and what an iteration should take with them."""

    text: str
    overrides: Sequence[str]
    seconds: float  # 0: not known


@dataclass(frozen=True)
class Tuning:
    """What was measured of a run, and what would be better, the best first."""

    step_s: float
    roles: Sequence[Role]
    bottleneck: str
    advice: Sequence[Advice]


def tune(run_dir: Path, cpus: float = 0.0, gpus: float = 0.0) -> Tuning:
    """`cpus`, `gpus`: what there is; 0: what the run had. Raises ConfigError for a directory without enough measured
    iterations of PPO."""
    if not (run_dir / FILE).is_file():
        raise ConfigError(f"{run_dir} has no {FILE}: it is not the directory of a run that has begun")
    records = [record for record in read_metrics(run_dir / FILE) if record.stage == "ppo" and record.step > 1]
    measured = [record.metrics for record in records if "idle/learner" in record.metrics]
    if len(measured) < LEAST:
        raise ConfigError(
            f"{run_dir} has {len(measured)} measured iterations of PPO after the first, {LEAST} are needed: "
            f"run it with ppo.steps={LEAST + 1} or more"
        )
    cfg = load_file(run_dir / "config" / "resolved.yaml")
    middle = _medians(measured)
    roles = _roles(cfg, middle)
    work = _work(roles, middle)
    machines = _machines(run_dir, roles, cpus, gpus)
    return _tuning(cfg, middle["timing_s/step"], roles, work, machines)


def _medians(measured: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Of each metric, over the iterations that have it."""
    found: dict[str, list[float]] = defaultdict(list)
    for metrics in measured:
        for name, value in metrics.items():
            if value is not None:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def _roles(cfg: RunConfig, middle: Mapping[str, float]) -> list[Role]:
    resources = {
        "generation": cfg.generation.resources,
        "reward": cfg.reward.resources,
        "reference": cfg.reference.resources,
        "learner": cfg.learner.resources,
    }
    return [
        Role(name, one.workers, 1 - middle[f"idle/{name}"], one.num_gpus, one.threads)
        for name, one in resources.items()
        if f"idle/{name}" in middle
    ]


def _work(roles: Sequence[Role], middle: Mapping[str, float]) -> Work:
    """Busy time by workers, which is what one of them alone would take; the learner's apart from its update."""
    step = middle["timing_s/step"]
    alone = {role.name: role.busy * role.workers * step for role in roles}
    ranks = next(role.workers for role in roles if role.name == "learner")
    workers = next(role.workers for role in roles if role.name == "generation")
    update, receive = middle.get("timing_s/update", 0.0), middle.get("sync/seconds", 0.0)
    publish = max(0.0, middle.get("timing_s/update_weights", 0.0) - receive)  # that part has them both
    evaluation = max(0.0, alone["learner"] - ranks * (update + publish))
    return Work(
        max(0.0, alone["generation"] - workers * receive),
        alone.get("reward", 0.0),
        alone.get("reference", 0.0),
        evaluation,
        update * ranks,
        publish + receive,
    )


def _machines(run_dir: Path, roles: Sequence[Role], cpus: float, gpus: float) -> Machines:
    if any(role.gpus for role in roles):
        had = sum(role.workers * role.gpus for role in roles)
        return Machines(gpus or had, {role.name: max(role.gpus, 1e-3) for role in roles}, own=True)
    environment = run_dir / "environment.json"
    cores = json.loads(environment.read_text())["cores"] if environment.is_file() else 1
    return Machines(cpus or cores, {role.name: float(role.threads) for role in roles}, own=False)


def _tuning(cfg: RunConfig, step_s: float, roles: Sequence[Role], work: Work, machines: Machines) -> Tuning:
    now = {role.name: role.workers for role in roles}
    late = cfg.ppo.max_staleness > 0
    scale = step_s / seconds(work, now, machines, late)  # what the model leaves out, it leaves out of the others too
    size = cfg.ppo.minibatch_size
    advice = [_advice(cfg, now, best(work, now, machines, late, size), late, scale)]
    if not late and not (cfg.ppo.result == "ema" and cfg.evaluation.every):
        advice.append(_advice(cfg, now, best(work, now, machines, True, size), True, scale))
    worth = [one for one in advice if one.overrides and step_s / one.seconds >= WORTH]
    return Tuning(
        step_s,
        roles,
        max(roles, key=lambda role: role.busy).name,
        [*sorted(worth, key=lambda one: one.seconds), *_of_sampling(cfg, now)],
    )


def _advice(cfg: RunConfig, now: Mapping[str, int], split: Split, late: bool, scale: float) -> Advice:
    overrides = [f"{role}.resources.workers={n}" for role, n in split.workers.items() if n != now[role]]
    text = "another split of the workers"
    if late and not cfg.ppo.max_staleness:
        overrides.append("ppo.max_staleness=1")
        text = "generation goes on while the learner learns, one version behind"
    return Advice(text, overrides, split.seconds * scale)


def _of_sampling(cfg: RunConfig, now: Mapping[str, int]) -> list[Advice]:
    """Responses that wait for a place in a worker while it could sample more of them together."""
    each = math.ceil(cfg.ppo.batch_size / now["generation"])
    if each <= cfg.generation.max_num_seqs:
        return []
    text = (
        f"{each} responses come to a worker, which samples {cfg.generation.max_num_seqs} at once: more at once are "
        "more tokens a second, as long as its memory (generation.kv_cache_memory) holds them"
    )
    return [Advice(text, [f"generation.max_num_seqs={each}"], 0.0)]


def show(found: Tuning) -> None:
    """As a person reads it."""
    console, table = Console(highlight=False), Table("role", "workers", "busy", "idle")
    for role in found.roles:
        table.add_row(role.name, str(role.workers), f"{role.busy:.0%}", f"{1 - role.busy:.0%}")
    console.print(table)
    said = f"An iteration takes {found.step_s:.2f} s; {found.bottleneck} has least rest."
    console.print(said if found.advice else f"{said} Nothing that would make it clearly shorter was found.")
    for one in found.advice:
        gain = f": about {one.seconds:.2f} s, {found.step_s / one.seconds:.2f} times as fast" if one.seconds else ""
        console.print(f"- {one.text}{gain}\n    {' '.join(one.overrides)}", soft_wrap=True)
    if found.advice:
        console.print("By a model in which work divides by workers; run a few iterations with it and measure again.")
