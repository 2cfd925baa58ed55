"""Stage 1 as a part of a run."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np

from rlhf_cluster import sft
from rlhf_cluster.cluster.placement import open_judges
from rlhf_cluster.data.batches import heldout_members
from rlhf_cluster.evaluation.heldout import require_scores
from rlhf_cluster.interrupts import run_async
from rlhf_cluster.pipeline.context import Run
from rlhf_cluster.records import Pretraining

SELECTION_STEP = -2  # the label of the batch that SFT's epochs are told apart by
SELECTION_PROMPTS = 64  # of it, at most


def run_sft(run: Run) -> None:
    """Stage 1: `stages/sft/policy`."""
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
        run.on_ranks(sft.STAGE, sft.train, job, run.cfg.sft.resources)
        if run.cfg.sft.select == "reward":
            _select_epoch(run, job)


def _select_epoch(run: Run, job: sft.SFTJob) -> None:
    """The epoch whose samples score highest becomes SFT's policy; a loss on held-out demonstrations would choose too
    early (InstructGPT C.1). The prompts are PPO's own: whoever is chosen on held-out ones cannot be judged
    by them."""
    epochs = range(1, run.cfg.sft.epochs + 1)
    scores = {epoch: run_async(partial(_mean_score, run, job.epoch_output(epoch))) for epoch in epochs}
    for epoch, score in scores.items():
        run.metrics.log(sft.STAGE, job.steps() // len(epochs) * epoch, {"sft/selection_score": score})
    best = max(scores, key=lambda epoch: scores[epoch])
    told = ", ".join(f"{epoch}: {score:+.3f}" for epoch, score in scores.items())
    run.progress.note(f"sft: the policy of epoch {best} goes on; mean scores by epoch: {told}")
    job.epoch_output(best).rename(job.output)
    for epoch in epochs:
        shutil.rmtree(job.epoch_output(epoch), ignore_errors=epoch == best)


async def _mean_score(run: Run, policy: Path) -> float:
    cfg, prompts = run.cfg, run.inputs.prompts.slice(0, SELECTION_PROMPTS)
    members = heldout_members(prompts, SELECTION_STEP, cfg.evaluation.samples_per_prompt, cfg.seed)
    async with open_judges(cfg, run.attempt, policy) as (generation, reward):
        scores = [await reward.score(rollouts) async for rollouts in generation.sample(members)]
    require_scores([failure for part in scores for failure in part.failure])
    return float(np.mean(np.concatenate([part.score for part in scores])))
