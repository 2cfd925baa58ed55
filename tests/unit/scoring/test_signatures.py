"""The four calling conventions, as functions are found in the wild."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.scoring.samples import Sample
from rlhf_cluster.scoring.signatures import SignatureError, adapt

SAMPLES = [
    Sample("s0", "2+2=", "4", True, {"answer": "4", "data_source": "sums", "extra_info": {"level": 1}}),
    Sample("s1", "3+3=", "7", False, {"answer": "6", "data_source": "sums", "extra_info": {"level": 2}}),
]


def test_ours() -> None:
    def reward(samples: list[Sample]) -> list[float]:
        return [float(sample.response == sample.columns["answer"]) + sample.ended for sample in samples]

    assert adapt(reward, "answer")(SAMPLES) == [2.0, 0.0]


def test_trls_takes_columns_by_name() -> None:
    def reward_correct(completions: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
        assert set(kwargs) == {"prompts", "data_source", "extra_info"}
        return [1.0 if c == a else None for c, a in zip(completions, answer, strict=True)]

    assert adapt(reward_correct, "x")(SAMPLES) == [1.0, None]


def test_trls_without_keywords_gets_what_it_names() -> None:
    def reward_len(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(p) * len(c)) for p, c in zip(prompts, completions, strict=True)]

    assert adapt(reward_len, "x")(SAMPLES) == [4.0, 4.0]


@pytest.mark.parametrize("wrap", [list, np.array, torch.tensor, lambda scores: {"rewards": torch.tensor(scores)}])
def test_openrlhfs(wrap: Any) -> None:
    def reward_func(queries: list[str], prompts: list[str], labels: list[str], **kwargs: Any) -> Any:
        right = [q == p + a for q, p, a in zip(queries, prompts, labels, strict=True)]
        return wrap([1.0 if r else -1.0 for r in right])

    assert adapt(reward_func, "answer")(SAMPLES) == [1.0, -1.0]


def test_verls_is_asked_one_by_one() -> None:
    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> Any:
        assert data_source == "sums"
        score = float(solution_str == ground_truth)
        return {"score": score, "acc": score} if extra_info["level"] == 1 else score

    assert adapt(compute_score, "answer")(SAMPLES) == [1.0, 0.0]


def test_verls_truth_is_where_its_data_sets_have_it() -> None:
    def compute_score(solution_str: str, ground_truth: str, **_: Any) -> float:
        return float(solution_str == ground_truth)

    row = Sample("s", "p", "9", True, {"reward_model": {"ground_truth": "9", "style": "rule"}})
    assert adapt(compute_score, "answer")([row]) == [1.0]


def test_another_is_refused_with_its_parameters() -> None:
    def reward(text: str, target: str) -> float:
        return 0.0

    with pytest.raises(SignatureError, match=r"its parameters are \(text, target\); known are \(samples\), \(prompts"):
        adapt(reward, "answer")


def test_what_only_trls_trainer_has_is_refused_at_once() -> None:
    def needs(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        raise AssertionError

    def may_have(completions: list[str], trainer_state: object = None) -> list[float]:
        return [1.0 for _ in completions]

    with pytest.raises(SignatureError, match="it asks for completion_ids, which only TRL's trainer has"):
        adapt(needs, "answer")
    assert len(adapt(may_have, "answer")([Sample("0", "p", "r", True)])) == 1
