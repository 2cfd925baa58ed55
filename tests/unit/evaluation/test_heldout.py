"""What is said of held-out samples, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_cluster.evaluation.heldout import HeldOut, HeldOutError, compare_heldout, samples, with_scores
from rlhf_cluster.records import ReferencedRollouts, ScoredRollouts
from rlhf_cluster.telemetry.comparison import Gold

# Two prompts, two samples each; the log-ratios to the reference sum to 0.5, 0, 1.0 and -0.25.
COLUMNS = {
    "prompt_id": ["a", "a", "b", "b"],
    "prompt_ids": [[1, 2]] * 2 + [[3]] * 2,
    "step": [-1] * 4,
    "sample_index": [0, 1, 0, 1],
    "sample_id": ["-1/a/0", "-1/a/1", "-1/b/0", "-1/b/1"],
    "seed": [1, 2, 3, 4],
    "response_ids": [[5, 6], [7], [8, 9, 10], [11, 12]],
    "rollout_logprobs": [[-1.0, -1.0], [-2.0], [-0.5, -0.5, -0.5], [-1.0, -1.25]],
    "weight_versions": [[0, 0], [0], [0, 0, 0], [0, 0]],
    "finish_reason": ["stop"] * 4,
    "temperature": [1.0] * 4,
    "incarnation": ["one"] * 4,
    "score": [1.0, 2.0, 3.0, 6.0],
    "failure": [""] * 4,
}
REFERENCE = [[-1.25, -1.25], [-2.0], [-1.0, -0.5, -1.0], [-1.0, -1.0]]
GOLD = np.array([[0.0, 1.0], [1.0, 1.0]])


def test_metrics_are_means_over_all_samples() -> None:
    found = HeldOut(ReferencedRollouts.of({**COLUMNS, "ref_logprobs": REFERENCE}), GOLD, 2)
    assert found.kl().tolist() == [[0.5, 0.0], [1.0, -0.25]]  # type: ignore[union-attr]
    assert found.metrics() == pytest.approx(
        {"eval/gold": 0.75, "eval/score": 3.0, "eval/response_length": 2.0, "eval/kl": 0.3125}
    )


def test_without_a_reference_there_is_no_kl_to_tell() -> None:
    found = HeldOut(ScoredRollouts.of(COLUMNS), GOLD, 2)
    assert found.kl() is None
    assert set(found.metrics()) == {"eval/gold", "eval/score", "eval/response_length"}


def test_a_sample_without_a_score_counts_as_none_and_never_as_zero() -> None:
    broken = {**COLUMNS, "score": [1.0, 2.0, 3.0, 0.0], "failure": ["", "", "", "http: it is down"]}
    assert HeldOut(ScoredRollouts.of(broken), GOLD, 2).metrics()["eval/score"] == 2.0
    found = with_scores(broken["score"], broken["failure"])
    assert found[:3].tolist() == [1.0, 2.0, 3.0] and np.isnan(found[3])
    with pytest.raises(HeldOutError, match=r"none of 4 samples has a score \(http: it is down\)"):
        with_scores([0.0] * 4, ["http: it is down"] * 4)


def test_a_prompt_with_a_sample_without_a_score_is_not_compared() -> None:
    """Before, one of the first of four prompts has none; after, both of the second: the last two are left."""
    rollouts = ScoredRollouts.of({name: [*values, *values] for name, values in COLUMNS.items()})
    gold = np.arange(8.0).reshape(4, 2)
    before, after = gold.copy(), gold + 1
    before[0, 1], after[1] = np.nan, np.nan
    one, other = (HeldOut(rollouts, scores, 2) for scores in (before, after))
    found = compare_heldout(one, other, Gold("the reward itself", ""))
    assert (found.prompts, found.before_mean, found.difference) == (2, 5.5, 1.0)
    shown = samples(one, other, lambda ids: "text")
    assert [(sample.before_score, sample.after_score) for sample in shown] == [(4.0, 5.0), (6.0, 7.0)]
    assert other.metrics()["eval/gold"] == np.nanmean(after)
