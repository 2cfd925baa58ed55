"""Stage 3 as a part of a run: its rooms, its checkpoints, its held-out samples before, on the way and after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from rlhf_cluster import ppo, rm
from rlhf_cluster.cluster.placement import OpenRooms, open_rooms
from rlhf_cluster.cluster.scaling import Scaling
from rlhf_cluster.cluster.starter import PPOInputs
from rlhf_cluster.collection import most_frequent, reasons
from rlhf_cluster.config import RunConfig, roles
from rlhf_cluster.data.batches import PromptOrder, heldout_members
from rlhf_cluster.evaluation.heldout import HeldOut, compare_heldout, read_heldout, sample_heldout, samples
from rlhf_cluster.interrupts import run_async
from rlhf_cluster.loop.admission import Batch
from rlhf_cluster.pipeline.context import Run
from rlhf_cluster.records import Pretraining, ScoredRollouts
from rlhf_cluster.storage.checkpoints import Checkpoints
from rlhf_cluster.storage.durable import replace_text
from rlhf_cluster.storage.requests import Requests
from rlhf_cluster.storage.rollout_log import RolloutLog
from rlhf_cluster.storage.run_directory import RunDirectory
from rlhf_cluster.telemetry.comparison import gold_of, write_samples
from rlhf_cluster.telemetry.report import COMPARISON_FILE, SAMPLES_FILE
from rlhf_cluster.telemetry.timer import Timer

HELDOUT_STEP = -1  # the label of the held-out batch: the same seeds before and after, never a training step


def run_ppo(run: Run) -> None:
    """Stage 3: checkpoints, and the comparison before/after on the held-out prompts, which is its last word."""
    if is_finished(run.directory, run.cfg):
        run.progress.note("ppo: finished before")
        return
    run_async(lambda: _run_ppo(run))


def is_finished(directory: RunDirectory, cfg: RunConfig) -> bool:
    last = Checkpoints(directory.checkpoints).latest()
    return (directory.path / COMPARISON_FILE).is_file() and last is not None and last.step == cfg.ppo.steps


async def _run_ppo(run: Run) -> None:
    cfg, checkpoints = run.cfg, Checkpoints(run.directory.checkpoints, run.cfg.ppo.keep_checkpoints)
    reference = Path(cfg.reference.path).resolve() if cfg.reference.path else run.ppo_policy
    run.progress.note("ppo: starting generation, reward, reference and learner workers")
    text = run.inputs.pretraining if cfg.ppo.ptx.coef else Pretraining.empty()
    inputs = PPOInputs(run.ppo_policy, reference, _reward_model(run), text)
    async with open_rooms(cfg, run.attempt, inputs) as opened, scaled(run, opened) as scaling:
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
            partial(_of_workers, opened, scaling),
        )
        scaling.begin(start.step + 1)
        opened.metrics()  # what was before counts for no iteration
        with run.progress.stage(ppo.STAGE, cfg.ppo.steps):
            await ppo.train(opened.rooms, PromptOrder(run.inputs.prompts, cfg.seed), cfg.ppo, log, start)
        await _serve_average(run, opened, cfg.ppo.steps)
        after = await _heldout(run, opened, "after")
        _compare(run, before, after)
        _look_at_the_last(run, after)
        peaks = await opened.peak_memory()
        memory = {f"memory_gb/{name.replace(' ', '_')}": peak / 1e9 for name, peak in peaks.items()}
        last_checkpoint = timer.take()
        run.metrics.log(ppo.STAGE, cfg.ppo.steps, after.metrics() | memory | last_checkpoint)


@asynccontextmanager
async def scaled(run: Run, opened: OpenRooms) -> AsyncIterator[Scaling]:
    """The pools change meanwhile, as is asked for."""
    of_role = roles(run.cfg)
    resources = {role: of_role[role] for role in opened.crews}
    requests = Requests(run.directory.requests)
    scaling = Scaling(opened.crews, resources, run.cfg.cluster, requests, run.progress.note)
    async with asyncio.TaskGroup() as beside:
        following = beside.create_task(scaling.follow())
        try:
            yield scaling
        finally:
            following.cancel()
            scaling.end()


def _of_workers(opened: OpenRooms, scaling: Scaling, iteration: int) -> Mapping[str, float]:
    """What an iteration's record says of the workers, which scaling goes by too."""
    found = opened.metrics()
    scaling.iteration(iteration, found)
    return found


def _reward_model(run: Run) -> Path | None:
    """The reward model, which the critic starts as: named for the run, or stage 2's, or named by a part alone."""
    if run.cfg.reward.path:
        return Path(run.cfg.reward.path).resolve()
    if trained := run.output(rm.STAGE):
        return trained / "reward_model"
    own = [Path(part.path).resolve() for part in run.cfg.reward.parts if part.kind == "model" and part.path]
    return own[0] if own else None


async def _serve_average(run: Run, opened: OpenRooms, version: int) -> None:
    """The run is judged by the policy of `version`, which is there already, or by its average, as the version after
    it."""
    if run.cfg.ppo.result == "ema":
        await opened.learner.publish_average(version + 1)
        await opened.rooms.generation.receive(version + 1)


async def _serve_policy(run: Run, opened: OpenRooms, version: int) -> None:
    """The policy of `version` again, where its average has taken its place."""
    if run.cfg.ppo.result == "ema":
        await opened.learner.publish(version)
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


async def _on_the_way(
    run: Run, opened: OpenRooms, timer: Timer, version: int, served: Awaitable[object]
) -> Mapping[str, float]:
    """The held-out samples of an iteration between the first and the last, where `evaluation.every` asks for them."""
    every = run.cfg.evaluation.every
    if not every or version % every or version == run.cfg.ppo.steps:
        return {}
    await served
    with timer("eval"):
        await _serve_average(run, opened, version)
        found = await _heldout(run, opened, f"iteration {version}")
        await _serve_policy(run, opened, version)
    return found.metrics()


async def _heldout(run: Run, opened: OpenRooms, when: str) -> HeldOut:
    cfg = run.cfg.evaluation
    run.progress.note(f"held-out prompts, {when}: {len(run.inputs.heldout_prompts)} x {cfg.samples_per_prompt} samples")
    members = heldout_members(run.inputs.heldout_prompts, HELDOUT_STEP, cfg.samples_per_prompt, run.cfg.seed)
    gold = run.judge(cfg.gold) if cfg.gold else None
    return await sample_heldout(opened.rooms, members, cfg.samples_per_prompt, gold)


def _compare(run: Run, before: HeldOut, after: HeldOut) -> None:
    gold = gold_of(run.cfg.evaluation.gold, {part.kind for part in run.cfg.reward.parts})
    comparison = compare_heldout(before, after, gold)
    if left_out := len(before.gold) - comparison.prompts:
        run.progress.note(f"{left_out} held-out prompts are left out: some of their samples have no score")
    write_samples(run.directory.path / SAMPLES_FILE, samples(before, after, run.inputs.text))
    pq.write_table(after.table(), run.directory.path / "heldout_after.parquet")
    replace_text(run.directory.path / COMPARISON_FILE, comparison.to_json(), "the comparison")
    run.progress.comparison(comparison)


def _look_at_the_last(run: Run, after: HeldOut) -> None:
    """Nothing is sampled to train on after the last update, so its KL is looked at here."""
    kl, limit = after.kl(), run.cfg.ppo.guardrails.kl.limit
    if kl is not None and limit and kl.mean() > limit:
        run.progress.note(
            f"the last update led beyond ppo.guardrails.kl: {kl.mean():.4g} nats per response from the reference on "
            f"held-out prompts; the limit is {limit:g}"
        )


def _gold_score(run: Run) -> Callable[[ScoredRollouts], Mapping[str, float]]:
    """The labeler's mean score of a batch, where there is a labeler: watched, never learnt from."""
    if not run.cfg.evaluation.gold:
        return lambda batch: {}
    gold = run.judge(run.cfg.evaluation.gold)
    return lambda batch: {"objective/gold": float(np.mean(gold(batch)))}


def _show(run: Run, step: int, batch: Batch) -> None:
    if failures := reasons(batch):
        run.progress.note(f"iteration {step + 1}: samples failed and were not trained on: {failures}")
    if neutral := most_frequent(chain.from_iterable(ppo.failures_of_parts(batch.rows))):
        said = "parts of the score failed and count as reward.neutral_score"
        run.progress.note(f"iteration {step + 1}: {said}: {neutral}")
    every = run.cfg.logging.sample_every
    if every and step % every == 0:
        rows = batch.rows
        prompt, response = run.inputs.text(rows.prompt_ids[0]), run.inputs.text(rows.response_ids[0])
        run.progress.sample(prompt, response, float(rows.score[0]))
