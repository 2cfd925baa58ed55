"""What learns from rankings as a part of a run: stage 2, or DPO; and the rankings, where a labeler makes them."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow.parquet as pq

from rlhf_cluster import dpo, rm
from rlhf_cluster.cluster.placement import open_generation
from rlhf_cluster.data.batches import PromptOrder
from rlhf_cluster.interrupts import run_async
from rlhf_cluster.pipeline.context import Run
from rlhf_cluster.ranking import RankingError, rank_samples, split_comparisons
from rlhf_cluster.records import Comparisons
from rlhf_cluster.telemetry.calibration import calibration, write_calibration
from rlhf_cluster.telemetry.metrics import read_metrics

COMPARISONS_FILE = "comparisons.parquet"


def run_rm(run: Run) -> None:
    """Stage 2: `stages/rm`, a plain body with its score head, and its agreement with held-out rankings."""
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
        run.on_ranks(rm.STAGE, rm.train, job, run.cfg.rm.resources)
        evaluation = rm.read_evaluation(job.output)  # on record before the stage counts as finished
        run.metrics.log(rm.STAGE, job.steps(), evaluation.metrics())
        write_calibration(run.directory.path, calibration(evaluation.margins))
    run.progress.note(f"reward model: {evaluation}")


def run_dpo(run: Run) -> None:
    """Instead of stage 2 and 3, or before the third: `stages/dpo/policy`."""
    comparisons, heldout = _rankings(run)
    run.metrics.cut(dpo.STAGE, 0)
    with run.directory.commit_stage(dpo.STAGE) as output:
        job = dpo.DPOJob(
            run.cfg.dpo, run.cfg.model, run.cfg.seed, run.start_policy, comparisons, heldout, output / "policy"
        )
        run.on_ranks(dpo.STAGE, dpo.train, job, run.cfg.dpo.resources)
    last = [record.metrics for record in read_metrics(run.directory.metrics) if record.stage == dpo.STAGE][-1]
    if (accuracy := last.get("dpo/heldout_accuracy")) is not None:
        run.progress.note(
            f"{run.cfg.dpo.loss}: the policy's own rewards agree with {accuracy:.3f} of the pairs of {len(heldout)} "
            f"held-out prompts, mean margin {last['dpo/heldout_margin']:.3f}"
        )


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
        judge = run.judge(cfg.rm.ranking.labeler)
        return await rank_samples(generation, members, judge, cfg.rm.ranking.tie_margin)
