"""The three stages as one run: SFT -> reward model -> PPO, each stage's output the next one's input.

A finished stage is never run again: a run that was cut off goes on from its last finished stage, and in PPO from its
last checkpoint. This module wires; what is learnt stands in `sft.py`, `rm.py` and `ppo.py`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from rlhf_cluster import dpo, ppo, rm, sft
from rlhf_cluster.cluster.placement import (
    Attempt,
    OpenRooms,
    PPOInputs,
    open_generation,
    open_judges,
    open_rooms,
)
from rlhf_cluster.cluster.session import ray_session
from rlhf_cluster.cluster.train import train_on_ranks
from rlhf_cluster.config import ConfigError, Resources, RunConfig, differences, load_file, to_yaml
from rlhf_cluster.data.batches import PromptOrder, heldout_members
from rlhf_cluster.environment import describe_environment
from rlhf_cluster.evaluation.heldout import (
    HeldOut,
    compare_heldout,
    read_heldout,
    require_scores,
    sample_heldout,
    samples,
)
from rlhf_cluster.inputs import Inputs, load_inputs
from rlhf_cluster.interrupts import run_async
from rlhf_cluster.loop.admission import Batch
from rlhf_cluster.ranking import Judge, RankingError, make_judge, rank_samples, split_comparisons
from rlhf_cluster.records import Comparisons, Pretraining, ScoredRollouts
from rlhf_cluster.storage.checkpoints import Checkpoints
from rlhf_cluster.storage.durable import StorageError, replace_text
from rlhf_cluster.storage.rollout_log import RolloutLog
from rlhf_cluster.storage.run_directory import RunDirectory
from rlhf_cluster.telemetry.calibration import calibration, write_calibration
from rlhf_cluster.telemetry.comparison import ReportError, gold_of, write_samples
from rlhf_cluster.telemetry.metrics import JsonlSink, MetricError, MetricsLog, Sink
from rlhf_cluster.telemetry.progress import ConsoleSink, Progress
from rlhf_cluster.telemetry.quiet import driver_log
from rlhf_cluster.telemetry.report import COMPARISON_FILE, SAMPLES_FILE, write_report
from rlhf_cluster.telemetry.tensorboard import TensorBoardSink
from rlhf_cluster.telemetry.timer import Timeline, Timer

COMPARISONS_FILE = "comparisons.parquet"
SHOWN = 5  # differences from a run's config that a sentence names
SELECTION_STEP = -2  # the label of the batch that SFT's epochs are told apart by
HELDOUT_STEP = -1  # the label of the held-out batch: the same seeds before and after, never a training step


@dataclass(frozen=True)
class Run:
    """A run while it runs: its config, inputs, directory and displays."""

    cfg: RunConfig
    inputs: Inputs
    directory: RunDirectory
    progress: Progress
    metrics: MetricsLog
    timeline: Timeline

    @property
    def attempt(self) -> Attempt:
        return Attempt(self.directory.unique_name(self.cfg.name), self.directory.attempt, self.directory.attempt_logs)

    def output(self, stage: str) -> Path | None:
        return self.directory.stage_output(stage)

    @property
    def start_policy(self) -> Path:
        """The policy that the reward model and DPO start from: SFT's, or the one that the config names."""
        trained = self.output(sft.STAGE)
        return trained / "policy" if trained else self.inputs.base_path

    @property
    def ppo_policy(self) -> Path:
        """The policy that PPO starts from: DPO's where there is that stage."""
        trained = self.output(dpo.STAGE)
        return trained / "policy" if trained else self.start_policy


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
                with ray_session(cfg.cluster, roles_at_once(cfg)):
                    directory.write_config(to_yaml(cfg), overrides)  # not before: what the cluster refuses is no run
                    directory.write_environment(describe_environment())
                    for stage in cfg.stages:
                        STAGES[stage](whole)
            except* ppo.GuardrailError:
                _report_a_stop(path, progress)
                raise
            finally:
                directory.sweep()
            if whole.timeline.spans:  # none where PPO was finished before, or is no stage of this run
                whole.timeline.write_chrome(directory.timeline)
            progress.note(f"report: {write_report(path)}")
            progress.note(f"talk to it: rlhf-cluster chat {path}")
    return path


def _report_a_stop(path: Path, progress: Progress) -> None:
    """The report says what led to it. Where it cannot be made, why the run stopped is still what is raised."""
    try:
        progress.note(f"report: {write_report(path)}")
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
    return directory.report.is_file() and stages and (ppo.STAGE not in cfg.stages or _ppo_is_finished(directory, cfg))


def _ppo_is_finished(directory: RunDirectory, cfg: RunConfig) -> bool:
    last = Checkpoints(directory.checkpoints).latest()
    return (directory.path / COMPARISON_FILE).is_file() and last is not None and last.step == cfg.ppo.steps


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
def _metrics(cfg: RunConfig, directory: RunDirectory, terminal) -> Iterator[tuple[Progress, MetricsLog]]:  # type: ignore[no-untyped-def]
    progress = Progress.on(terminal, cfg.logging.progress)
    jsonl = JsonlSink(directory.metrics)
    sinks: list[Sink] = [jsonl, ConsoleSink(progress)]
    if cfg.logging.tensorboard:
        sinks.append(TensorBoardSink(directory.path / "tensorboard"))
    with MetricsLog(sinks, progress.note, elapsed=jsonl.elapsed()) as metrics:
        yield progress, metrics


def run_sft(run: Run) -> None:
    """Stage 1: `stages/sft/policy`."""
    if run.output(sft.STAGE):
        run.progress.note("sft: finished before, its output is used")
        return
    run.metrics.cut(sft.STAGE, 0)
    with run.directory.commit_stage(sft.STAGE) as output:
        inputs = run.inputs
        text = inputs.pretraining if run.cfg.sft.pretraining_share else Pretraining.empty()
        job = sft.SFTJob(
            run.cfg.sft,
            run.cfg.model,
            run.cfg.seed,
            inputs.base_path,
            inputs.demonstrations,
            output / "policy",
            text,
        )
        _on_ranks(run, sft.STAGE, sft.train, job, run.cfg.sft.resources)
        if run.cfg.sft.select == "reward":
            _select_epoch(run, job)


def _select_epoch(run: Run, job: sft.SFTJob) -> None:
    """The epoch whose samples score highest becomes SFT's policy; a loss on held-out demonstrations would choose too
    early (InstructGPT C.1)."""
    epochs = range(1, run.cfg.sft.epochs + 1)
    scores = {epoch: run_async(partial(_mean_score, run, job.epoch_output(epoch))) for epoch in epochs}
    for epoch, score in scores.items():
        run.metrics.log(sft.STAGE, job.steps() // len(epochs) * epoch, {"sft/heldout_score": score})
    best = max(scores, key=lambda epoch: scores[epoch])
    told = ", ".join(f"{epoch}: {score:+.3f}" for epoch, score in scores.items())
    run.progress.note(f"sft: the policy of epoch {best} goes on; mean scores by epoch: {told}")
    job.epoch_output(best).rename(job.output)
    for epoch in epochs:
        shutil.rmtree(job.epoch_output(epoch), ignore_errors=epoch == best)


async def _mean_score(run: Run, policy: Path) -> float:
    cfg, prompts = run.cfg, run.inputs.heldout_prompts
    members = heldout_members(prompts, SELECTION_STEP, cfg.evaluation.samples_per_prompt, cfg.seed)
    async with open_judges(cfg, run.attempt, policy) as (generation, reward):
        scores = [await reward.score(rollouts) async for rollouts in generation.sample(members)]
    require_scores([failure for part in scores for failure in part.failure])
    return float(np.mean(np.concatenate([part.score for part in scores])))


def _on_ranks(
    run: Run, stage: str, train: Callable, job: sft.SFTJob | rm.RMJob | dpo.DPOJob, resources: Resources
) -> None:  # type: ignore[type-arg]
    with run.progress.stage(stage, job.steps()):
        train_on_ranks(
            stage,
            train,
            job,
            resources,
            run.cfg.cluster,
            run.directory.attempt_logs,
            lambda step, metrics: run.metrics.log(stage, step + 1, metrics),
        )


def run_rm(run: Run) -> None:
    """Stage 2: `stages/rm`, a plain body with its score head, and its agreement with held-out rankings."""
    if run.output(rm.STAGE):
        run.progress.note("rm: finished before, its output is used")
        return
    comparisons, heldout = _rankings(run)
    run.metrics.cut(rm.STAGE, 0)
    with run.directory.commit_stage(rm.STAGE) as output:
        shown = run.inputs.demonstrations
        job = rm.RMJob(
            run.cfg.rm,
            run.cfg.model,
            run.cfg.seed,
            run.start_policy,
            comparisons,
            heldout,
            shown,
            output / "reward_model",
        )
        _on_ranks(run, rm.STAGE, rm.train, job, run.cfg.rm.resources)
        evaluation = rm.read_evaluation(job.output)  # on record before the stage counts as finished
        run.metrics.log(rm.STAGE, job.steps(), evaluation.metrics())
        write_calibration(run.directory.path, calibration(evaluation.margins))
    run.progress.note(f"reward model: {evaluation}")


def run_dpo(run: Run) -> None:
    """Instead of stage 2 and 3, or before the third: `stages/dpo/policy`."""
    if run.output(dpo.STAGE):
        run.progress.note("dpo: finished before, its output is used")
        return
    comparisons, heldout = _rankings(run)
    run.metrics.cut(dpo.STAGE, 0)
    with run.directory.commit_stage(dpo.STAGE) as output:
        job = dpo.DPOJob(
            run.cfg.dpo, run.cfg.model, run.cfg.seed, run.start_policy, comparisons, heldout, output / "policy"
        )
        _on_ranks(run, dpo.STAGE, dpo.train, job, run.cfg.dpo.resources)


def _rankings(run: Run) -> tuple[Comparisons, Comparisons]:
    """Comparisons to train on and to be judged by: the data's own, or a labeler's of the policy's samples."""
    ranking = run.cfg.rm.ranking
    if not ranking.labeler:
        return run.inputs.comparisons, run.inputs.heldout_comparisons
    ranked = run.output("ranking") or _make_rankings(run)
    comparisons = Comparisons(pq.read_table(ranked / COMPARISONS_FILE))
    return split_comparisons(comparisons, run.cfg.data.heldout_fraction)


def _make_rankings(run: Run) -> Path:
    """Samples the policy and has the labeler rank: `stages/ranking`."""
    ranking, began = run.cfg.rm.ranking, time.monotonic()
    run.progress.note(
        f"ranking: {ranking.responses} samples of {ranking.prompts} prompts, ranked by {ranking.labeler}, "
        "a stated stand-in for a human labeler"
    )
    with run.directory.commit_stage("ranking") as output:
        comparisons = run_async(lambda: _rank(run))
        if len(comparisons) < 2:
            raise RankingError(
                f"the labeler {ranking.labeler} told the samples of {len(comparisons)} of {ranking.prompts} "
                "prompts apart, 2 are needed; rank more prompts or lower rm.ranking.tie_margin"
            )
        pq.write_table(comparisons.table, output / COMPARISONS_FILE)
    run.progress.note(f"ranking: {len(comparisons)} prompts with a winner, {time.monotonic() - began:.0f} s")
    return run.directory.stages / "ranking"


async def _rank(run: Run) -> Comparisons:
    cfg, prompts = run.cfg, run.inputs.prompts
    order = PromptOrder(prompts, -1 - cfg.seed)  # not PPO's order and seeds: its first batch would repeat these samples
    count, responses = min(cfg.rm.ranking.prompts, len(prompts)), cfg.rm.ranking.responses
    members = order.members(0, count * responses, responses)
    async with open_generation(cfg, run.attempt, run.start_policy) as generation:
        judge = _judge(run, cfg.rm.ranking.labeler)
        return await rank_samples(generation, members, judge, cfg.rm.ranking.tie_margin)


def run_ppo(run: Run) -> None:
    """Stage 3: checkpoints, and the comparison before/after on the held-out prompts, which is its last word."""
    if _ppo_is_finished(run.directory, run.cfg):
        run.progress.note("ppo: finished before")
        return
    run_async(lambda: _run_ppo(run))


async def _run_ppo(run: Run) -> None:
    cfg, checkpoints = run.cfg, Checkpoints(run.directory.checkpoints, run.cfg.ppo.keep_checkpoints)
    reference = Path(cfg.reference.path) if cfg.reference.path else run.ppo_policy
    run.progress.note("ppo: starting generation, reward, reference and learner workers")
    text = run.inputs.pretraining if cfg.ppo.ptx.coef else Pretraining.empty()
    inputs = PPOInputs(run.ppo_policy, reference, _reward_model(run), text)
    async with open_rooms(cfg, run.attempt, inputs) as opened:
        start = await _resume(run, opened, checkpoints)
        before = await _before(run, opened)
        timer = Timer(run.timeline, ppo.STAGE)
        log = ppo.Log(
            run.metrics,
            timer,
            RolloutLog(run.directory.rollouts),
            checkpoints,
            lambda step, batch: _show(run, step, batch),
            run.progress.note,
            _gold_score(run),
            partial(_on_the_way, run, opened, timer),
        )
        with run.progress.stage(ppo.STAGE, cfg.ppo.steps):
            await ppo.train(opened.rooms, PromptOrder(run.inputs.prompts, cfg.seed), cfg.ppo, log, start)
        await _publish_result(run, opened)
        after = await _heldout(run, opened, "after")
        _compare(run, before, after)
        peaks = await opened.peak_memory()
        memory = {f"memory_gb/{name.replace(' ', '_')}": peak / 1e9 for name, peak in peaks.items()}
        last_checkpoint = timer.take()
        run.metrics.log(ppo.STAGE, cfg.ppo.steps, after.metrics() | memory | last_checkpoint)


def _reward_model(run: Run) -> Path | None:
    """The reward model, which the critic starts as: named for the run, or stage 2's, or named by a part alone."""
    if run.cfg.reward.path:
        return Path(run.cfg.reward.path)
    if trained := run.output(rm.STAGE):
        return trained / "reward_model"
    own = [Path(part.path) for part in run.cfg.reward.parts if part.kind == "model" and part.path]
    return own[0] if own else None


async def _publish_result(run: Run, opened: OpenRooms) -> None:
    """What the run is judged by: the last policy, which is there already, or its average, as the version after it."""
    if run.cfg.ppo.result == "ema":
        version = run.cfg.ppo.steps + 1
        await opened.learner.publish_average(version)
        await opened.rooms.generation.receive(version)


async def _resume(run: Run, opened: OpenRooms, checkpoints: Checkpoints) -> ppo.Start:
    """Goes on from the last complete checkpoint; what lies past it is cut off."""
    found = checkpoints.latest()
    start = ppo.AT_FIRST
    if found is not None:
        checkpoints.verify(found)
        start = ppo.resume(found.path)
        await opened.learner.load(found.path, start.step)
        await opened.learner.publish(start.step)
        await opened.rooms.generation.receive(start.step)
        run.progress.note(f"ppo: continues from the checkpoint of iteration {start.step}")
    run.metrics.cut(ppo.STAGE, start.step)
    RolloutLog(run.directory.rollouts).cut(start.step - 1)
    return start


async def _before(run: Run, opened: OpenRooms) -> HeldOut:
    """The held-out samples of the policy that PPO starts from, sampled once and kept for a resumed run."""
    if kept := run.output("before"):
        return read_heldout(kept / "heldout.parquet", run.cfg.evaluation.samples_per_prompt)
    sampled = await _heldout(run, opened, "before")
    run.metrics.log(ppo.STAGE, 0, sampled.metrics())
    with run.directory.commit_stage("before") as output:
        pq.write_table(sampled.table(), output / "heldout.parquet")
    return sampled


async def _on_the_way(run: Run, opened: OpenRooms, timer: Timer, version: int) -> Mapping[str, float]:
    """The held-out samples of an iteration between the first and the last, where `evaluation.every` asks for them."""
    every = run.cfg.evaluation.every
    if not every or version % every or version == run.cfg.ppo.steps:
        return {}
    with timer("eval"):
        return (await _heldout(run, opened, f"iteration {version}")).metrics()


async def _heldout(run: Run, opened: OpenRooms, when: str) -> HeldOut:
    cfg = run.cfg.evaluation
    run.progress.note(f"held-out prompts, {when}: {len(run.inputs.heldout_prompts)} x {cfg.samples_per_prompt} samples")
    members = heldout_members(run.inputs.heldout_prompts, HELDOUT_STEP, cfg.samples_per_prompt, run.cfg.seed)
    gold = _judge(run, cfg.gold) if cfg.gold else None
    return await sample_heldout(opened.rooms, members, cfg.samples_per_prompt, gold)


def _compare(run: Run, before: HeldOut, after: HeldOut) -> None:
    gold = gold_of(run.cfg.evaluation.gold, {part.kind for part in run.cfg.reward.parts})
    comparison = compare_heldout(before, after, gold)
    write_samples(run.directory.path / SAMPLES_FILE, samples(before, after, run.inputs.text))
    pq.write_table(after.table(), run.directory.path / "heldout_after.parquet")
    replace_text(run.directory.path / COMPARISON_FILE, comparison.to_json(), "the comparison")
    run.progress.comparison(comparison)


def _gold_score(run: Run) -> Callable[[ScoredRollouts], Mapping[str, float]]:
    """The labeler's mean score of a batch, where there is a labeler: watched, never learnt from."""
    if not run.cfg.evaluation.gold:
        return lambda batch: {}
    gold = _judge(run, run.cfg.evaluation.gold)
    return lambda batch: {"objective/gold": float(np.mean(gold(batch)))}


def _judge(run: Run, name: str) -> Judge:
    return make_judge(name, run.cfg.data.answer_column, run.inputs.text)


def _show(run: Run, step: int, batch: Batch) -> None:
    if failures := ppo.reasons(batch):
        run.progress.note(f"iteration {step + 1}: samples failed and were not trained on: {failures}")
    every = run.cfg.logging.sample_every
    if every and step % every == 0:
        rows = batch.rows
        prompt, response = run.inputs.text(rows.prompt_ids[0]), run.inputs.text(rows.response_ids[0])
        run.progress.sample(prompt, response, float(rows.score[0]))


STAGES: dict[str, Callable[[Run], None]] = {
    sft.STAGE: run_sft,
    rm.STAGE: run_rm,
    dpo.STAGE: run_dpo,
    ppo.STAGE: run_ppo,
}
