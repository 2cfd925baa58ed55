"""Which rows are trained on: alone or as whole groups, filtered or dropped, and each in one state only."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_cluster.loop.admission import DROPPED, FILTERED, Admission
from rlhf_cluster.records import ScoredRollouts


def rows(*named: tuple[str, float, str]) -> ScoredRollouts:
    """(sample id as prompt/number, score, failure)"""
    count = len(named)
    return ScoredRollouts.of(
        {
            "prompt_id": [name.split("/")[0] for name, _, _ in named],
            "prompt_ids": [[1]] * count,
            "step": [0] * count,
            "sample_index": [int(name.split("/")[1]) for name, _, _ in named],
            "sample_id": [name for name, _, _ in named],
            "seed": [0] * count,
            "response_ids": [[2]] * count,
            "rollout_logprobs": [[-1.0]] * count,
            "weight_versions": [[0]] * count,
            "finish_reason": ["stop"] * count,
            "temperature": [1.0] * count,
            "incarnation": ["test"] * count,
            "score": [score for _, score, _ in named],
            "failure": [failure for _, _, failure in named],
        }
    )


A0, A1, A_BAD = ("a/0", 1.0, ""), ("a/1", 2.0, ""), ("a/1", 0.0, "it hung")
B0, B1 = ("b/0", 3.0, ""), ("b/1", 3.0, "")


def expecting(whole_groups: bool, telling: bool, *named: tuple[str, float, str]) -> Admission:
    admission = Admission(whole_groups, telling)
    admission.expect(rows(*named))
    return admission


def test_alone_a_row_passes_at_once_and_a_failed_one_is_dropped() -> None:
    admission = expecting(False, False, A0, A_BAD, B0)
    assert admission.take(rows(A0, A_BAD)).sample_id == ["a/0"]
    assert admission.gone() == ["a/1"] and admission.gone() == []
    assert admission.take(rows(B0)).sample_id == ["b/0"]
    batch = admission.batch()
    assert batch.rows.sample_id == ["a/0", "b/0"]
    assert {state: part.sample_id for state, part in batch.others.items()} == {DROPPED: ["a/1"]}


def test_a_group_passes_once_whole_whatever_came_between() -> None:
    admission = expecting(True, False, A0, A1, B0, B1)
    assert admission.take(rows(A0, B1)).sample_id == []
    assert admission.take(rows(B0)).sample_id == ["b/1", "b/0"]
    assert admission.take(rows(A1)).sample_id == ["a/0", "a/1"]
    assert admission.gone() == []


def test_a_group_with_a_failed_row_goes_as_a_whole() -> None:
    admission = expecting(True, False, A0, A_BAD, B0, B1)
    assert admission.take(rows(A0, A_BAD, B0, B1)).sample_id == ["b/0", "b/1"]
    assert admission.gone() == ["a/0", "a/1"]
    assert admission.batch().others[DROPPED].sample_id == ["a/0", "a/1"]


def test_a_group_of_equal_scores_says_nothing() -> None:
    admission = expecting(True, True, A0, A1, B0, B1)
    assert admission.take(rows(A0, A1, B0, B1)).sample_id == ["a/0", "a/1"]
    assert admission.gone() == ["b/0", "b/1"]
    assert admission.batch().others[FILTERED].sample_id == ["b/0", "b/1"]
    assert not len(admission.restore_filtered(["b/0", "b/1"]))  # something passed


def test_where_nothing_passed_the_last_that_were_filtered_do() -> None:
    admission = expecting(True, True, ("c/0", 1.0, ""), ("c/1", 1.0, ""))
    admission.take(rows(("c/0", 1.0, ""), ("c/1", 1.0, "")))
    assert admission.gone() == ["c/0", "c/1"]
    admission.expect(rows(B0, B1))  # in their places
    admission.take(rows(B0, B1))
    assert admission.restore_filtered(admission.gone()).sample_id == ["b/0", "b/1"]
    batch = admission.batch()
    assert batch.rows.sample_id == ["b/0", "b/1"] and batch.others[FILTERED].sample_id == ["c/0", "c/1"]


def test_the_record_has_every_row_with_its_state() -> None:
    admission = expecting(True, True, A0, A1, B0, B1)
    admission.take(rows(B0, B1, A0, A1))
    table = admission.batch().table()
    found = dict(zip(table.column("sample_id").to_pylist(), table.column("state").to_pylist(), strict=True))
    assert found == {"a/0": "trained", "a/1": "trained", "b/0": "filtered", "b/1": "filtered"}


@pytest.mark.parametrize("seed", range(5))
def test_law_every_row_reaches_one_state_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    named = [
        (f"p{i}/{j}", float(rng.integers(2)), "bad" if rng.random() < 0.1 else "") for i in range(8) for j in range(3)
    ]
    admission, passed = expecting(True, True, *named), []
    order = [named[i] for i in rng.permutation(len(named))]
    for start in range(0, len(order), 5):
        passed += admission.take(rows(*order[start : start + 5])).sample_id
    gone, batch = admission.gone(), admission.batch()
    assert sorted(passed + gone) == sorted(name for name, _, _ in named)
    assert sorted(passed) == sorted(batch.rows.sample_id)
    assert sorted(gone) == sorted(i for part in batch.others.values() for i in part.sample_id)
