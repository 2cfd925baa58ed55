"""Stage 3: proximal policy optimization against the reward model (InstructGPT section 3.5; Ziegler et al. 2019).

           +---------------------------- weights v+1 --------------------------------+
           v                                                                         |
prompts -> generation -> scoring || reference -> learner: add ... update -> publish -+-> log, checkpoint
           per rollout, as each one ends

One loop for every degree of asynchrony: `max_staleness + 1` batches are open at once, and with 0 each batch is sampled
from the policy that it then updates. A batch's members are fixed when it opens, and the learner evaluates them by the
very policy that they will update, so arrival order changes nothing but which versions the tokens were sampled from.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from rlhf_cluster.algo.kl import AdaptiveKL, FixedKL
from rlhf_cluster.collection import Batches, collect, reasons
from rlhf_cluster.config import PPOConfig
from rlhf_cluster.loop.admission import DROPPED, FILTERED, Batch
from rlhf_cluster.loop.control import Control, KLCoefficient
from rlhf_cluster.loop.guardrails import Alarm, Guardrails, Rail, gravest, moved_nothing
from rlhf_cluster.records import QUARANTINED, Controls, ScoredRollouts, UpdateStats
from rlhf_cluster.rooms import Rooms
from rlhf_cluster.storage.checkpoints import Checkpoint, Checkpoints
from rlhf_cluster.storage.rollout_log import RolloutLog
from rlhf_cluster.telemetry.metrics import MetricsLog
from rlhf_cluster.telemetry.timer import Timer

STAGE = "ppo"
RUN_STATE = "run.json"


class EmptyBatchError(RuntimeError):
    """An iteration that has nothing to train on."""


async def _never(version: int, served: Awaitable[object]) -> Mapping[str, float]:
    """No evaluation on the way."""
    return {}


@dataclass(frozen=True)
class Log:
    """Where a run writes down what happened."""

    metrics: MetricsLog
    timer: Timer
    rollouts: RolloutLog
    checkpoints: Checkpoints
    show: Callable[[int, Batch], None]
    warn: Callable[[str], None]
    # further metrics that nothing learns from: of a batch, and of a version once generation serves it
    measure: Callable[[ScoredRollouts], Mapping[str, float]] = lambda batch: {}
    evaluate: Callable[[int, Awaitable[object]], Awaitable[Mapping[str, float]]] = _never
    workers: Callable[[int], Mapping[str, float]] = lambda iteration: {}  # what there is to say of them since the last


@dataclass(frozen=True)
class Start:
    """Where a run goes on: the iteration, and the driver's own state (empty: as configured)."""

    step: int = 0
    control: Mapping[str, float] = field(default_factory=dict)
    guardrails: Mapping[str, Any] = field(default_factory=dict)


AT_FIRST = Start()


async def train(rooms: Rooms, prompts: Batches, cfg: PPOConfig, log: Log, start: Start = AT_FIRST) -> None:
    """Runs iterations `start` to `cfg.steps`; the policy of iteration n is weight version n."""
    control, rails = make_control(cfg, start), make_guardrails(cfg, start)
    batches: deque[asyncio.Task[Batch]] = deque()
    async with asyncio.TaskGroup() as tasks:
        served = tasks.create_task(_as_it_began())

        def open_batches(step: int) -> None:
            """Those of `step` and of as many after it as staleness allows, as far as they are not open yet."""
            for ahead in range(step + len(batches), min(step + cfg.max_staleness + 1, cfg.steps)):
                batch_of = collect(rooms, ahead, prompts, cfg, served, log.timer, log.warn)
                batches.append(tasks.create_task(batch_of))

        open_batches(start.step)
        for step in range(start.step, cfg.steps):
            with log.timer("step"):
                batch = await batches.popleft()
                if not len(batch.rows):
                    await give_up(rooms, step, batch, control, rails, log)
                early = rails.before(batch.rows)
                controls = control.before(batch.rows.score, learn=gravest(early) in ("", "warn"))
                with log.timer("update"):
                    stats = await rooms.learner.update(step, controls)
                alarms = early + rails.after(stats.metrics)
                good = last_good(early, alarms, batch.rows, rails, log)
                await heed(alarms, good, rooms, stats.weight_version, log)
                if good is not None or moved_nothing(stats.metrics):
                    rails.note_same(stats.weight_version, step if good is None else good.step)
                sync = await served
                with log.timer("update_weights"):
                    await rooms.learner.publish(stats.weight_version)
                served = tasks.create_task(receive(rooms, stats.weight_version, log))
                control.after(stats.metrics.get("objective/kl", 0.0), len(batch.rows))
            heldout = await log.evaluate(stats.weight_version, served)
            # First, so that what a checkpoint has behind it is on record.
            write_down(step, batch, stats, controls, alarms, {**heldout, **sync}, log)
            stop_where_due(alarms, good, stats.weight_version)
            open_batches(step + 1)
            if is_checkpoint(step, cfg):
                await save(rooms, stats.weight_version, control, rails, log)


async def _as_it_began() -> Mapping[str, float]:
    """Generation serves the weights that it was started with."""
    return {}


async def receive(rooms: Rooms, version: int, log: Log) -> Mapping[str, float]:
    """Generation takes the weights while the learner goes on, with what was sampled before; batches that are not begun
    yet wait for it, which keeps them within their staleness. Returns what there is to say of it, which stands on the
    record of the iteration that it ended in."""
    with log.timer("update_weights"):
        return await rooms.generation.receive(version)


async def give_up(rooms: Rooms, step: int, batch: Batch, control: Control, rails: Guardrails, log: Log) -> NoReturn:
    """An iteration without a row: what failed goes on record, the policy so far into a checkpoint."""
    log.rollouts.write(step, batch.table())
    last = log.checkpoints.latest()
    if step > (last.step if last else 0):
        await save(rooms, step, control, rails, log)
    samples = sum(map(len, batch.others.values()))
    raise EmptyBatchError(
        f"iteration {step + 1}: none of its {samples} samples has a score to train on ({reasons(batch)}); mend the "
        "reward, or give it more time (reward.deadline_s, cluster.call_timeout_s), and give the same command again: "
        "the run goes on from here"
    )


class GuardrailError(RuntimeError):
    """A run that was stopped by one of its guardrails."""


def last_good(
    early: Sequence[Alarm], alarms: Sequence[Alarm], rows: ScoredRollouts, rails: Guardrails, log: Log
) -> Checkpoint | None:
    """The checkpoint to go back to, where that is asked: what was seen in samples is true of the policy that sampled
    them, which may have a checkpoint too; what was seen in the update, of none before it."""
    if gravest(alarms) != "rollback":
        return None
    sampled = min(rails.first_of(int(version)) for versions in rows.weight_versions for version in np.unique(versions))
    return log.checkpoints.latest(below=sampled if gravest(early) == "rollback" else math.inf)


async def heed(alarms: Sequence[Alarm], good: Checkpoint | None, rooms: Rooms, version: int, log: Log) -> None:
    """What is due at once: a word, or the policy of the checkpoint `good` as `version`. An adaptive KL coefficient
    stays where it is: that keeps the policy from going the same way again."""
    for alarm in alarms:
        log.warn(f"iteration {version}: guardrail {alarm.name} ({alarm.action}): {alarm.sentence}")
    if good is not None:
        log.checkpoints.verify(good)
        await rooms.learner.load(good.path, version)
        log.checkpoints.forget_after(good.step)
        log.warn(f"iteration {version}: the policy is that of the checkpoint of iteration {good.step} again")


def stop_where_due(alarms: Sequence[Alarm], good: Checkpoint | None, version: int) -> None:
    """The end, once the iteration that led to it is on record; its checkpoint is not written."""
    action = gravest(alarms)
    if action == "stop" or (action == "rollback" and good is None):
        first = sorted(alarms, key=lambda alarm: alarm.action != action)  # and what else there was
        told = "; ".join(f"{alarm.name}: {alarm.sentence}" for alarm in first)
        none = " and there is no checkpoint of a policy before it to go back to" if action == "rollback" else ""
        raise GuardrailError(f"iteration {version} was stopped by ppo.guardrails ({told}){none}")


def is_checkpoint(step: int, cfg: PPOConfig) -> bool:
    """After every `save_every` iterations, and after the last."""
    return step + 1 == cfg.steps or (cfg.save_every > 0 and (step + 1) % cfg.save_every == 0)


def make_control(cfg: PPOConfig, start: Start) -> Control:
    """The KL coefficients and the score normaliser as configured, or as they were when the run was cut off."""

    def coefficient(coef: float) -> KLCoefficient:
        steers = cfg.kl.kind == "adaptive" and coef > 0
        return AdaptiveKL(coef, cfg.kl.target, cfg.kl.horizon) if steers else FixedKL(coef)

    control = Control(coefficient(cfg.kl.coef), coefficient(cfg.kl.loss_coef), cfg.score_norm)
    if start.control:
        control.restore(start.control)
    return control


def make_guardrails(cfg: PPOConfig, start: Start) -> Guardrails:
    asked = cfg.guardrails
    limits = {name: Rail(rail.limit, rail.action) for name, rail in asked.rails.items()}
    rails = Guardrails(limits, asked.not_finite, asked.max_skips)
    rails.restore(start.guardrails)
    return rails


async def save(rooms: Rooms, version: int, control: Control, rails: Guardrails, log: Log) -> None:
    """A checkpoint that is either complete or not there. `version` iterations are done."""
    with log.timer("save_checkpoint"), log.checkpoints.write(version) as directory:
        await rooms.learner.save(directory)
        state = {"step": version, "control": control.state(), "guardrails": rails.state()}
        (directory / RUN_STATE).write_text(json.dumps(state))


def resume(checkpoint: Path) -> Start:
    """Where the run of a checkpoint goes on."""
    return Start(**json.loads((checkpoint / RUN_STATE).read_text()))


def write_down(
    step: int,
    batch: Batch,
    stats: UpdateStats,
    controls: Controls,
    alarms: Sequence[Alarm],
    further: Mapping[str, float],
    log: Log,
) -> None:
    """Rollouts, metrics and now and then a sample, once the iteration is done. The seconds of its checkpoint, which
    comes after, stand in the next record."""
    rows, seconds = batch.rows, log.timer.take()
    tokens = sum(map(len, rows.response_ids)) + sum(map(len, rows.prompt_ids))
    log.rollouts.write(step, batch.table())
    log.metrics.log(
        STAGE,
        stats.weight_version,
        {
            **stats.metrics,
            **parts_of_score(rows),
            **log.measure(rows),
            **further,
            **seconds,
            **log.workers(stats.weight_version),
            "rollout/filtered": float(len(batch.others.get(FILTERED, ()))),
            "fault/quarantined": float(len(batch.others.get(QUARANTINED, ()))),
            "fault/dropped": float(len(batch.others.get(DROPPED, ()))),
            "fault/neutral": float(sum(map(bool, failures_of_parts(rows)))),
            **{f"guard/{alarm.name}": alarm.value for alarm in alarms},
            "actor/kl_coef": controls.kl_coef,
            "actor/kl_loss_coef": controls.kl_loss_coef,
            "sync/version": stats.weight_version,
            "perf/total_num_tokens": tokens,
            "perf/throughput": tokens / seconds["timing_s/step"],
        },
    )
    log.show(step, batch)


def failures_of_parts(rows: ScoredRollouts) -> list[list[str]]:
    """For each row the parts of its score that failed, and why."""
    names = [name for name in rows.table.column_names if name.startswith("reward_failure/")]
    columns = [rows.table.column(name).to_pylist() for name in names]
    parts = [name.partition("/")[2] for name in names]
    return [
        [f"{part}: {why}" for part, why in zip(parts, row, strict=True) if why] for row in zip(*columns, strict=True)
    ]


def parts_of_score(rows: ScoredRollouts) -> dict[str, float]:
    """The mean of each part of the score, and the seconds of its slowest sample."""
    found = {}
    for name in rows.table.column_names:
        if name.startswith("reward/"):
            found[name] = float(np.mean(rows.table.column(name).to_numpy()))
        if name.startswith("reward_s/"):
            found[name] = float(np.max(rows.table.column(name).to_numpy()))
    return found
