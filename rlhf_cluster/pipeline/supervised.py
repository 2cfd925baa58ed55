"""Stage 1 as a part of a run."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np

from rlhf_cluster import sft
from rlhf_cluster.cluster.placement import open_judges
from rlhf_cluster.config import RunConfig
from rlhf_cluster.data.batches import heldout_members
from rlhf_cluster.data.seeded import seeded_order
from rlhf_cluster.evaluation.heldout import with_scores
from rlhf_cluster.inputs import Inputs
from rlhf_cluster.interrupts import run_async
from rlhf_cluster.pipeline.context import Run
from rlhf_cluster.records import Pretraining, Prompts, Scores

EPOCHS = "sft-epochs"  # the output that waits for one of its epochs to be chosen
SELECTION_STEP = -2  # the label of the batch that SFT's epochs are told apart by


def run_sft(run: Run) -> None:
    """Stage 1: `stages/sft/policy`."""
    if run.cfg.sft.select == "last":
        _train(run, sft.STAGE)
        return
    epochs = run.output(EPOCHS) or _train(run, EPOCHS)
    with run.directory.commit_stage(sft.STAGE) as output:
        shutil.copytree(_best_epoch(run, _job(run, epochs)), output / "policy", copy_function=os.link)
    shutil.rmtree(epochs)


def _job(run: Run, directory: Path) -> sft.SFTJob:
    text = run.inputs.pretraining if run.cfg.sft.pretraining_share else Pretraining.empty()
    return sft.SFTJob(
        run.cfg.sft,
        run.cfg.model,
        run.cfg.seed,
        run.inputs.base_path,
        run.inputs.demonstrations,
        directory / "policy",
        text,
    )


def _train(run: Run, stage: str) -> Path:
    """Returns the output of `stage`. Where an epoch is still to be chosen it is kept, whatever goes wrong then."""
    run.metrics.cut(sft.STAGE, 0)
    with run.directory.commit_stage(stage) as output:
        run.on_ranks(sft.STAGE, sft.train, _job(run, output), run.cfg.sft.resources)
    trained = run.output(stage)
    assert trained is not None
    return trained


def _best_epoch(run: Run, job: sft.SFTJob) -> Path:
    """The policy of the epoch whose samples score highest; a loss on held-out demonstrations would choose too early
    (InstructGPT C.1)."""
    prompts, epochs = selection_prompts(run.inputs, run.cfg), range(1, run.cfg.sft.epochs + 1)
    scores = {epoch: run_async(partial(_mean_score, run, prompts, job.epoch_output(epoch))) for epoch in epochs}
    for epoch, score in scores.items():
        run.metrics.log(sft.STAGE, job.steps() // len(epochs) * epoch, {"sft/selection_score": score})
    best = max(scores, key=lambda epoch: scores[epoch])
    told = ", ".join(f"{epoch}: {score:+.3f}" for epoch, score in scores.items())
    run.progress.note(f"sft: the policy of epoch {best} goes on; mean scores by epoch: {told}")
    return job.epoch_output(best)


def selection_prompts(inputs: Inputs, cfg: RunConfig) -> Prompts:
    """What SFT's epochs are told apart by: held-out prompts, where nothing after SFT is judged by them; else prompts of
    PPO, those first that no demonstration answers."""
    pool = inputs.prompts if "ppo" in cfg.stages or not len(inputs.heldout_prompts) else inputs.heldout_prompts
    shown, names = set(inputs.demonstrations.prompt_id), pool.prompt_id
    order = sorted(seeded_order(names, cfg.seed, "selection"), key=lambda row: names[row] in shown)
    return pool.take(sorted(order[: cfg.sft.select_prompts]))


async def _mean_score(run: Run, prompts: Prompts, policy: Path) -> float:
    cfg = run.cfg
    members = heldout_members(prompts, SELECTION_STEP, cfg.evaluation.samples_per_prompt, cfg.seed)
    async with open_judges(cfg, run.attempt, policy) as (generation, reward):
        scores = [await reward.score(rollouts) async for rollouts in generation.sample(members)]
    whole = Scores.concat(scores)
    return float(np.nanmean(with_scores(whole.score, whole.failure)))
