"""What is said of held-out samples, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_cluster.evaluation.heldout import HeldOut, HeldOutError, require_scores
from rlhf_cluster.records import ReferencedRollouts, ScoredRollouts

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
    require_scores([""] * 4)
    with pytest.raises(HeldOutError, match=r"1 of 4 held-out samples have no score \(http: it is down\)"):
        require_scores(broken["failure"])
