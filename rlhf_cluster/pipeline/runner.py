"""A run from its claim on a directory to its report: what is refused, which stages run, what is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rlhf_cluster import dpo, ppo, rm, sft
from rlhf_cluster.cluster.session import ray_session
from rlhf_cluster.config import ConfigError, Resources, RunConfig, differences, load_file, to_yaml
from rlhf_cluster.environment import describe_environment
from rlhf_cluster.evaluation.heldout import HeldOutError
from rlhf_cluster.inputs import load_inputs
from rlhf_cluster.interrupts import first_cause
from rlhf_cluster.pipeline import reinforcement
from rlhf_cluster.pipeline.context import Run
from rlhf_cluster.pipeline.preferences import run_dpo, run_rm
from rlhf_cluster.pipeline.supervised import run_sft
from rlhf_cluster.storage.durable import StorageError
from rlhf_cluster.storage.run_directory import RunDirectory
from rlhf_cluster.telemetry.activity import bubbles
from rlhf_cluster.telemetry.comparison import ReportError
from rlhf_cluster.telemetry.metrics import JsonlSink, MetricError, MetricsLog, Sink
from rlhf_cluster.telemetry.progress import ConsoleSink, Progress
from rlhf_cluster.telemetry.quiet import driver_log
from rlhf_cluster.telemetry.report import write_report
from rlhf_cluster.telemetry.tensorboard import TensorBoardSink
from rlhf_cluster.telemetry.timer import Timeline

SHOWN = 5  # differences from a run's config that a sentence names
STAGES: dict[str, Callable[[Run], None]] = {
    sft.STAGE: run_sft,
    rm.STAGE: run_rm,
    dpo.STAGE: run_dpo,
    ppo.STAGE: reinforcement.run_ppo,
}


def run(cfg: RunConfig, overrides: Sequence[str]) -> Path:
    """Runs the stages of `cfg`; returns the run's directory. Everything that can be refused is refused first."""
    inputs = load_inputs(cfg)
    path = Path(cfg.dir or Path("runs") / cfg.name).resolve()
    with _claimed(path) as directory:
        _refuse_another_run(directory, cfg)
        if _is_finished(directory, cfg):
            print(f"{path} holds this run, finished: rlhf-cluster chat {path}, or choose another name to run it again")
            return path
        directory.begin_attempt()
        with driver_log(directory.attempt_logs / "driver.log") as terminal, _metrics(cfg, directory, terminal) as shown:
            progress, metrics = shown
            whole = Run(cfg, inputs, directory, progress, metrics, Timeline())
            progress.note(f"{cfg.name}: {', '.join(cfg.stages)} in {path} (attempt {directory.attempt})")
            if inputs.dropped:
                progress.note(f"rows not used: {', '.join(f'{reason}: {n}' for reason, n in inputs.dropped.items())}")
            try:
                _run_stages(whole, overrides)
            except* (ppo.GuardrailError, ppo.EmptyBatchError, HeldOutError) as stop:
                _report_a_stop(path, progress, str(first_cause(stop)))
                raise
            finally:
                directory.sweep()
            progress.note(f"report: {write_report(path)}")
            progress.note(f"talk to it: rlhf-cluster chat {path}")
    return path


def _run_stages(run: Run, overrides: Sequence[str]) -> None:
    """Those that are not finished yet. However it ends, it leaves the timeline of this attempt."""
    cfg, directory = run.cfg, run.directory
    try:
        with ray_session(cfg.cluster, roles_at_once(cfg)):
            directory.write_config(to_yaml(cfg), overrides)  # not before: what the cluster refuses is no run
            directory.write_environment(describe_environment())
            for stage in cfg.stages:
                if run.output(stage):
                    run.progress.note(f"{stage}: finished before, its output is used")
                else:
                    STAGES[stage](run)
    finally:
        _write_timeline(run)


def _write_timeline(run: Run) -> None:
    """Where there is one: not where PPO was finished before, or is no stage of this run."""
    if run.timeline.spans:
        waited = [dataclasses.asdict(one) for one in bubbles(run.timeline.spans)]
        try:
            run.timeline.write_chrome(run.directory.timeline, bubbles=waited)
        except StorageError as error:
            run.progress.note(f"there is no timeline: {error}")


def _report_a_stop(path: Path, progress: Progress, why: str) -> None:
    """The report says what led to it. Where it cannot be made, why the run stopped is still what is raised."""
    try:
        progress.note(f"report: {write_report(path, why)}")
    except (StorageError, MetricError, ReportError) as error:
        progress.note(f"there is no report: {error}")


def _claimed(path: Path) -> RunDirectory:
    """A directory that cannot be had is refused like other bad input: nothing has begun."""
    try:
        return RunDirectory(path)
    except StorageError as error:
        raise ConfigError(str(error)) from error


def _is_finished(directory: RunDirectory, cfg: RunConfig) -> bool:
    """The report is the last that a run writes: one killed before it goes on once more."""
    stages = all(directory.stage_output(stage) for stage in cfg.stages if stage != ppo.STAGE)
    return (
        directory.report.is_file()
        and stages
        and (ppo.STAGE not in cfg.stages or reinforcement.is_finished(directory, cfg))
    )


def _refuse_another_run(directory: RunDirectory, cfg: RunConfig) -> None:
    """Two different runs are never mixed in one directory; a run of which nothing was finished is none yet."""
    begun = any(directory.stages.iterdir()) or any(directory.checkpoints.iterdir())
    if not directory.holds_run or (not begun and cfg.resume == "auto"):
        return
    if cfg.resume == "never":
        raise ConfigError(f"{directory.path} holds a run already and resume=never; choose another dir")
    if differing := differences(cfg, load_file(directory.resolved_config)):
        raise ConfigError(
            f"{directory.path} holds a run with another config (here: {'; '.join(differing[:SHOWN])}"
            f"{f'; and {len(differing) - SHOWN} more' if len(differing) > SHOWN else ''}); "
            "choose another dir, or give the same overrides to continue it"
        )


def roles_at_once(cfg: RunConfig) -> dict[str, dict[str, Resources]]:
    """Which roles run at the same time, by stage."""
    together = {
        sft.STAGE: {"sft": cfg.sft.resources},
        rm.STAGE: {"rm": cfg.rm.resources},
        dpo.STAGE: {"dpo": cfg.dpo.resources},
        ppo.STAGE: {
            "generation": cfg.generation.resources,
            "reward": cfg.reward.resources,
            "learner": cfg.learner.resources,
            **({} if cfg.ppo.kl.kind == "none" else {"reference": cfg.reference.resources}),
        },
    }
    of_run = {stage: roles for stage, roles in together.items() if stage in cfg.stages}
    if sft.STAGE in cfg.stages and cfg.sft.select == "reward":
        of_run["selection"] = {"generation": cfg.generation.resources, "reward": cfg.reward.resources}
    if {rm.STAGE, dpo.STAGE} & set(cfg.stages) and cfg.rm.ranking.labeler:
        of_run["ranking"] = {"generation": cfg.generation.resources}
    return of_run


@contextmanager
def _metrics(cfg: RunConfig, directory: RunDirectory, terminal: TextIO) -> Iterator[tuple[Progress, MetricsLog]]:
    progress = Progress.on(terminal, cfg.logging.progress)
    jsonl = JsonlSink(directory.metrics)
    sinks: list[Sink] = [jsonl, ConsoleSink(progress)]
    if cfg.logging.tensorboard:
        sinks.append(TensorBoardSink(directory.path / "tensorboard"))
    with MetricsLog(sinks, progress.note, elapsed=jsonl.elapsed()) as metrics:
        yield progress, metrics
