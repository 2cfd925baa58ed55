"""Rewards and advantages of two short rows by hand, and whitening that does not depend on who holds which row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.config import AdvantageConfig, KLConfig, OffPolicyConfig, PPOConfig
from rlhf_cluster.learner.experience import EvaluatedRow, Experience, make_experience
from rlhf_cluster.records import Controls

PLAIN = AdvantageConfig(gamma=1.0, lam=0.5, whiten=False)
LONGEST = 8  # response tokens
OnRanks = Callable[[int, Callable[[Any], Any]], list[Any]]


def make(rows: list[EvaluatedRow], cfg: PPOConfig, kl_coef: float, on_ranks: OnRanks) -> Experience:
    """On one rank."""
    (experience,) = on_ranks(1, lambda ranks: make_experience(rows, cfg, Controls(kl_coef), ranks, LONGEST))
    return experience


@pytest.fixture
def rows(row: Callable[..., EvaluatedRow]) -> list[EvaluatedRow]:
    return [
        row("a", old=[-1.0, -2.0], ref=[-1.5, -1.0], values=[0.5, 1.0], score=3.0),
        row("b", old=[-1.0], ref=[-1.0], values=[0.25], score=-2.0, ended=False),
    ]


def test_rewards_and_advantages_by_hand(rows: list[EvaluatedRow], on_ranks: OnRanks) -> None:
    """beta = 0.1. Row a: KL per token 0.5 and -1, so rewards -0.05 and 0.1 + 3.

    delta_2 = 3.1 - 1 = 2.1 = A_2; delta_1 = -0.05 + 1 - 0.5 = 0.45, A_1 = 0.45 + 0.5 * 2.1 = 1.5; returns A + V.
    Row b: no EOS costs 1: reward -3, advantage -3.25.
    """
    cfg = PPOConfig(missing_eos_penalty=1.0, advantage=PLAIN)
    experience = make(rows, cfg, 0.1, on_ranks)
    assert experience.rewards[0].tolist() == pytest.approx([-0.05, 3.1])
    assert experience.advantages[0].tolist() == pytest.approx([1.5, 2.1])
    assert experience.returns[0].tolist() == pytest.approx([2.0, 3.1])
    assert experience.rewards[1].tolist() == pytest.approx([-3.0])
    assert experience.advantages[1].tolist() == pytest.approx([-3.25])
    assert experience.index == {"a": 0, "b": 1}


def test_scores_are_clipped_before_the_penalty(rows: list[EvaluatedRow], on_ranks: OnRanks) -> None:
    cfg = PPOConfig(missing_eos_penalty=1.0, score_clip=1.5, advantage=PLAIN)
    experience = make(rows, cfg, 0.0, on_ranks)
    assert experience.rewards[0].tolist() == pytest.approx([0.0, 1.5])
    assert experience.rewards[1].tolist() == pytest.approx([-2.5])


def test_a_missing_eos_may_replace_the_score(rows: list[EvaluatedRow], on_ranks: OnRanks) -> None:
    cfg = PPOConfig(missing_eos="replace", missing_eos_penalty=1.0, advantage=PLAIN)
    experience = make(rows, cfg, 0.0, on_ranks)
    assert [rewards.tolist() for rewards in experience.rewards] == [[0.0, 3.0], [-1.0]]


@pytest.mark.parametrize(
    ("estimator", "kl"), [("k2", [0.125, 0.5]), ("k3", [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0])]
)
def test_the_penalty_is_of_the_configured_estimator(
    rows: list[EvaluatedRow], on_ranks: OnRanks, estimator: str, kl: list[float]
) -> None:
    """Row a: log ref - log pol is -0.5 and 1. Row b is at the reference."""
    experience = make(rows, PPOConfig(kl=KLConfig(estimator=estimator), advantage=PLAIN), 0.1, on_ranks)
    assert experience.non_score_rewards[0].tolist() == pytest.approx([-0.1 * kl[0], -0.1 * kl[1]])
    assert experience.rewards[0].tolist() == pytest.approx([-0.1 * kl[0], 3.0 - 0.1 * kl[1]])
    assert experience.rewards[1].tolist() == [-2.0]


def test_whitening_by_hand(rows: list[EvaluatedRow], on_ranks: OnRanks) -> None:
    """Advantages 1.5, 2.1 and -2.25 (no penalty): mean 0.45, variance (1.05^2 + 1.65^2 + 2.7^2) / 3."""
    whitened = make(rows, PPOConfig(advantage=AdvantageConfig(lam=0.5)), 0.1, on_ranks).advantages
    scale = ((1.05**2 + 1.65**2 + 2.7**2) / 3) ** 0.5
    assert np.concatenate(whitened).tolist() == pytest.approx([1.05 / scale, 1.65 / scale, -2.7 / scale])


@pytest.mark.parametrize(
    ("asked", "max_staleness", "expected"),
    [
        (OffPolicyConfig(), 0, [1, 1, 1]),  # auto
        (OffPolicyConfig(), 1, [2, 0.5, 0.25]),
        (OffPolicyConfig("none"), 1, [1, 1, 1]),
        (OffPolicyConfig("token", cap=2.5), 0, [2.5, 0.5, 0.25]),
        (OffPolicyConfig("response"), 0, [1.5, 1.5, 0.25]),
        (OffPolicyConfig("none", mask="token", low=0.3, high=2.0), 0, [0, 1, 0]),
        (OffPolicyConfig("token", mask="response"), 0, [2, 0.5, 0]),
        (OffPolicyConfig("token", mask="response_mean", low=0.2, high=1.2), 0, [0, 0, 0.25]),  # sqrt(1.5) is 1.22
    ],
)
def test_off_policy_weights_by_hand(
    row: Callable[..., EvaluatedRow],
    on_ranks: OnRanks,
    asked: OffPolicyConfig,
    max_staleness: int,
    expected: list[float],
) -> None:
    """The learner's probabilities are 3, 0.5 and 0.25 times the sampler's."""
    old, zeros = [-1.0, -2.0], [0.0, 0.0]
    sampled = [np.array([-1 - math.log(3), -2 + math.log(2)]), np.array([-1 + math.log(4)])]
    rows = [
        row("a", old=old, ref=old, values=zeros, rollout_logprobs=sampled[0].astype(np.float32)),
        row("b", old=old[:1], ref=old[:1], values=zeros[:1], rollout_logprobs=sampled[1].astype(np.float32)),
    ]
    weights = make(rows, PPOConfig(off_policy=asked, max_staleness=max_staleness), 0.0, on_ranks).weights
    assert [len(own) for own in weights] == [2, 1]
    assert np.concatenate(weights).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("share", [[], [1], [0, 2, 4], [1, 2, 3, 4]])
def test_two_ranks_whiten_as_one(
    row: Callable[..., EvaluatedRow], on_ranks: OnRanks, share: list[int], whiten_rewards: bool
) -> None:
    """Whichever rows a rank holds, also none, each row's advantages are those of the whole batch."""
    rng = np.random.default_rng(0)
    rows = [
        row(f"s{i}", *rng.normal(size=(3, length)).tolist(), score=float(rng.normal()))
        for i, length in enumerate([3, 1, 7, 2, 5])
    ]
    cfg = PPOConfig(advantage=AdvantageConfig(whiten_rewards=whiten_rewards))
    shares = [[rows[i] for i in share], [row for i, row in enumerate(rows) if i not in share]]
    whole = make(rows, cfg, 0.2, on_ranks)
    parts = on_ranks(2, lambda ranks: make_experience(shares[ranks.rank], cfg, Controls(0.2), ranks, LONGEST))
    for part in parts:
        for sample_id, place in part.index.items():
            for name in ("rewards", "advantages", "returns"):
                one, all_ = getattr(part, name)[place], getattr(whole, name)[whole.index[sample_id]]
                np.testing.assert_allclose(one, all_, atol=1e-6)
    assert sum(len(part.rows) for part in parts) == 5
