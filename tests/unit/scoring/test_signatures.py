"""The four calling conventions, as functions are found in the wild."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from trl.rewards import accuracy_reward, think_format_reward

from rlhf_cluster.scoring.samples import Sample
from rlhf_cluster.scoring.signatures import NoNumber, SignatureError, adapt

SAMPLES = [
    Sample(
        *("s0", "user\n2+2=\n", "4", True, {"answer": "4", "data_source": "sums", "extra_info": {"level": 1}}),
        *("2+2=", ("<user>2+2=<bot>", "4<end>")),
    ),
    Sample(
        *("s1", "user\n3+3=\n", "7", False, {"answer": "6", "data_source": "sums", "extra_info": {"level": 2}}),
        *("3+3=", ("<user>3+3=<bot>", "7")),
    ),
]
TURNS = [{"role": "system", "content": "Think."}, {"role": "user", "content": "2+2="}]
TALK = Sample(
    *("s2", "Think.2+2=", "<think>\n2+2\n</think>\n\\boxed{4}", True),
    {"answer": "4", "solution": "$4$", "prompt": TURNS},
    raw=("<system>Think.<user>2+2=<bot>", "<think>\n2+2\n</think>\n\\boxed{4}<end>"),
)


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


def test_trls_gets_messages_where_the_prompt_was_messages() -> None:
    def reward_func(prompts: list[Any], completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
        assert prompts == [TURNS] and set(kwargs) == {"solution"}
        assert [[message["role"] for message in completion] for completion in completions] == [["assistant"]]
        return [float(answer[0] in completion[0]["content"]) for completion in completions]

    assert adapt(reward_func, "x")([TALK]) == [1.0]


def test_trls_gets_each_row_as_it_was_given() -> None:
    def reward_func(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(isinstance(p, list) + 2 * isinstance(c, list)) for p, c in zip(prompts, completions, strict=True)]

    text = Sample("s3", "p", "r", True, {"prompt": None})  # a row of text in a file with messages
    assert adapt(reward_func, "x")([TALK, text, SAMPLES[0]]) == [3.0, 0.0, 0.0]


def test_trls_own_rewards() -> None:
    wrong = replace(TALK, response="\\boxed{5}")
    assert adapt(accuracy_reward, "x")([TALK, wrong]) == [1.0, 0.0]
    assert adapt(think_format_reward, "x")([TALK, wrong]) == [1.0, 0.0]


def test_the_other_conventions_get_text_whatever_the_prompt_was() -> None:
    def openrlhfs(queries: list[str], prompts: list[str], labels: list[str]) -> list[float]:
        return [float(queries == ["".join(TALK.raw)] and prompts == [TALK.raw[0]] and labels == ["4"])]

    def verls(solution_str: str, ground_truth: str) -> float:
        return float((solution_str, ground_truth) == (TALK.response, "4"))

    def ours(samples: list[Sample]) -> list[float]:
        return [float(samples == [TALK])]

    assert [adapt(function, "answer")([TALK]) for function in (openrlhfs, verls, ours)] == [[1.0]] * 3


@pytest.mark.parametrize("wrap", [list, np.array, torch.tensor, lambda scores: {"rewards": torch.tensor(scores)}])
def test_openrlhfs(wrap: Any) -> None:
    def reward_func(queries: list[str], prompts: list[str], labels: list[str], **kwargs: Any) -> Any:
        right = [q == f"{p}{a}<end>" and p[:6] == "<user>" for q, p, a in zip(queries, prompts, labels, strict=True)]
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


def test_a_coroutine_function_is_refused() -> None:
    async def reward(prompts: list[str], completions: list[str]) -> list[float]:
        raise AssertionError

    class Reward:
        async def __call__(self, samples: list[Sample]) -> list[float]:
            raise AssertionError

    for function in (reward, partial(reward, []), Reward()):
        with pytest.raises(SignatureError, match=r"it is a coroutine function \(async def\), which nobody would await"):
            adapt(function, "answer")


def test_what_only_trls_trainer_has_is_refused_at_once() -> None:
    def needs(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        raise AssertionError

    def may_have(completions: list[str], trainer_state: object = None) -> list[float]:
        return [1.0 for _ in completions]

    with pytest.raises(SignatureError, match="it asks for completion_ids, which only TRL's trainer has"):
        adapt(needs, "answer")
    assert len(adapt(may_have, "answer")([Sample("0", "p", "r", True)])) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (["x", 1.0], "it gave 'x' for a sample; a number is wanted"),
        ({"a": 1.0}, "it gave {'a': 1.0}; a list of numbers, one for each sample, is wanted"),
        (0.5, "it gave 0.5; a list of numbers, one for each sample, is wanted"),
    ],
)
def test_what_is_no_score_is_named(answer: Any, words: str) -> None:
    def score(samples: Any) -> Any:
        return answer

    with pytest.raises(NoNumber, match=re.escape(words)):
        adapt(score, "x")(SAMPLES)
