"""Rankings of the policy's own samples by a labeler: what InstructGPT's step 2 collects from people."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_cluster.data.labelers import make_labeler, rank
from rlhf_cluster.records import Comparisons, Members, Rollouts
from rlhf_cluster.rooms import Generation


class RankingError(RuntimeError):
    """A labeler that tells nothing apart."""


Judge = Callable[[Rollouts], Sequence[float]]  # one score per rollout


def make_judge(name: str, answer_column: str, text: Callable[[Any], str]) -> Judge:
    """A labeler who reads rollouts; `answer_column` is the prompts' column with the right answer, if they have it."""
    labeler = make_labeler(name)

    def judge(rollouts: Rollouts) -> list[float]:
        has_answers = answer_column in rollouts.table.column_names
        answers = rollouts.table.column(answer_column).to_pylist() if has_answers else [None] * len(rollouts)
        return labeler.score([*map(text, rollouts.response_ids)], answers)

    return judge


async def rank_samples(generation: Generation, members: Members, judge: Judge, tie_margin: float) -> Comparisons:
    """Samples every member and ranks the responses of each prompt; prompts whose responses all tie are left out."""
    rollouts = Rollouts.concat([part async for part in generation.sample(members)]).sort_by("sample_id")
    scores = np.array(judge(rollouts))
    prompt_ids, responses = rollouts.prompt_ids, rollouts.response_ids
    by_prompt: dict[str, list[int]] = {}
    for row, prompt_id in enumerate(rollouts.prompt_id):
        by_prompt.setdefault(prompt_id, []).append(row)
    columns: dict[str, list[Any]] = {"prompt_id": [], "prompt_ids": [], "responses": [], "ranks": []}
    for prompt_id, rows in by_prompt.items():
        ranks = rank(scores[rows].tolist(), tie_margin)
        if len(set(ranks)) > 1:
            columns["prompt_id"].append(prompt_id)
            columns["prompt_ids"].append(prompt_ids[rows[0]])
            columns["responses"].append([responses[row] for row in rows])
            columns["ranks"].append(ranks)
    return Comparisons.of(columns)


def split_comparisons(comparisons: Comparisons, heldout_fraction: float) -> tuple[Comparisons, Comparisons]:
    """(to train on, held out); rows are in the order of hashed ids, so the cut is as good as a shuffle. At least one
    stays to train on."""
    heldout = min(math.ceil(len(comparisons) * heldout_fraction), len(comparisons) - 1)
    return comparisons.slice(heldout, len(comparisons)), comparisons.slice(0, heldout)
