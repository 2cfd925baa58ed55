"""Metrics are sums until every rank has spoken: by hand, on one rank and on two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.config import AdvantageConfig, PPOConfig
from rlhf_cluster.learner.experience import EvaluatedRow, make_experience
from rlhf_cluster.learner.statistics import Tally, explained_variance, seconds_by_part, tally_experience, tally_values
from rlhf_cluster.records import Controls

OnRanks = Callable[[int, Callable[[Any], Any]], list[Any]]


def test_means_weigh_things_not_ranks(on_ranks: OnRanks) -> None:
    """Rank 0 saw 1 token of loss 4, rank 1 three of loss 2 in all: 6 / 4, not the mean of 4 and 2 / 3."""

    def work(ranks: Any) -> dict[str, float]:
        tally = Tally()
        tally.mean("loss", *((4.0, 1) if ranks.rank == 0 else (2.0, 3)))
        tally.top("ratio", 1.5 - ranks.rank)
        tally.bottom("ratio_min", 1.5 - ranks.rank)
        return tally.over(ranks)

    assert on_ranks(2, work) == [{"loss": 1.5, "ratio": 1.5, "ratio_min": 0.5}] * 2


def test_what_only_one_rank_saw_is_everybodys(on_ranks: OnRanks) -> None:
    def work(ranks: Any) -> dict[str, float]:
        tally = Tally()
        tally.spread("score", np.array([1.0, 3.0]) if ranks.rank == 1 else np.zeros(0))
        return tally.over(ranks)

    assert on_ranks(2, work) == [{"score/mean": 2.0, "score/max": 3.0, "score/min": 1.0}] * 2


def test_nothing_observed_is_a_mean_of_0(on_ranks: OnRanks) -> None:
    assert Tally().over(on_ranks(1, lambda ranks: ranks)[0]) == {}
    (found,) = on_ranks(1, lambda ranks: _of_nothing().over(ranks))
    assert found == {"loss": 0.0}


def _of_nothing() -> Tally:
    tally = Tally()
    tally.mean("loss", 0.0, 0)
    return tally


@pytest.fixture
def rows(row: Callable[..., EvaluatedRow]) -> list[EvaluatedRow]:
    rollout = np.array([-1.0, -2.0 - np.log(2.0)], np.float32)
    versions = np.array([3, 4], np.int32)
    return [
        row("a", [-1.0, -2.0], [-1.5, -1.0], [0.5, 1.0], score=3.0, rollout_logprobs=rollout, weight_versions=versions),
        row("b", [-1.0], [-3.0], [0.25], score=-2.0, ended=False, weight_versions=np.array([5], np.int32)),
    ]


def found_over(
    world: int, rows: list[EvaluatedRow], on_ranks: OnRanks, missing_eos_penalty: float = 0.0
) -> dict[str, float]:
    cfg = PPOConfig(advantage=AdvantageConfig(lam=0.5, whiten=False), missing_eos_penalty=missing_eos_penalty)

    def work(ranks: Any) -> dict[str, float]:
        experience, tally = make_experience(rows[ranks.rank :: world], cfg, Controls(0.1), ranks, 8), Tally()
        tally_experience(tally, experience, weight_version=5, referenced=True)
        tally_values(tally, experience)
        return tally.over(ranks) | {"explained": explained_variance(experience, ranks)}

    return on_ranks(world, work)[0]


def test_a_batch_by_hand(rows: list[EvaluatedRow], on_ranks: OnRanks) -> None:
    """KL per row -0.5 and 2; rewards (-0.05, 3.1) and (-2.2); sampler's second logprob ln 2 below the learner's."""
    found = found_over(1, rows, on_ranks)
    expected = {
        "critic/score/mean": 0.5,
        "objective/scores": 0.5,
        "objective/kl": 0.75,
        "objective/rlhf_reward": (3.05 - 2.2) / 2,
        "objective/non_score_reward": (0.05 - 0.2) / 2,
        "critic/rewards/mean": (3.05 - 2.2) / 3,
        "critic/rewards/max": 3.1,
        "critic/values/min": 0.25,
        "response_length/mean": 1.5,
        "response_length/clip_ratio": 0.5,
        "rollout/staleness": (2 + 1 + 0) / 3,
        "rollout/staleness_max": 2,
        "rollout/masked": 0.0,
        "rollout/mismatch_kl": (2 - 1 - np.log(2)) / 3,
        "rollout/logprob_diff_max": np.log(2),
        "rollout/logprob_diff_mean": np.log(2) / 3,
        "prompt_length/mean": 2.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_without_a_reference_no_kl_is_told(rows: list[EvaluatedRow], on_ranks: OnRanks) -> None:
    def work(ranks: Any) -> dict[str, float]:
        tally = Tally()
        experience = make_experience(rows, PPOConfig(), Controls(0.0), ranks, 8)
        tally_experience(tally, experience, weight_version=5, referenced=False)
        return tally.over(ranks)

    assert "objective/kl" not in on_ranks(1, work)[0]


def test_what_shapes_the_score_is_no_part_of_the_non_score_reward(rows: list[EvaluatedRow], on_ranks: OnRanks) -> None:
    found = found_over(1, rows, on_ranks, missing_eos_penalty=1.0)
    assert found["objective/rlhf_reward"] == pytest.approx((3.05 - 3.2) / 2)
    assert found["objective/non_score_reward"] == pytest.approx((0.05 - 0.2) / 2)


def test_explained_variance_by_hand(rows: list[EvaluatedRow], on_ranks: OnRanks) -> None:
    """Returns 2, 3.1 and -2.2 for values 0.5, 1 and 0.25: residuals 1.5, 2.1 and -2.45."""
    residual, returns = np.var([1.5, 2.1, -2.45]), np.var([2.0, 3.1, -2.2])
    assert found_over(1, rows, on_ranks)["explained"] == pytest.approx(1 - residual / returns)


def test_two_ranks_say_what_one_says(rows: list[EvaluatedRow], on_ranks: OnRanks) -> None:
    assert found_over(2, rows, on_ranks) == pytest.approx(found_over(1, rows, on_ranks), abs=1e-6)


def test_seconds_get_their_prefix() -> None:
    assert seconds_by_part({"optimizer": 2.0}) == {"learner_s/optimizer": 2.0}
