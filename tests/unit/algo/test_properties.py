"""Laws of the algorithm on shapes and numbers that nobody picked: ragged batches, ties, any split over ranks."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from rlhf_cluster.algo.advantages import gae, group_relative, leave_one_out, returns_to_go
from rlhf_cluster.algo.kl import AdaptiveKL, k1, k2, k3
from rlhf_cluster.algo.losses import (
    RankingLoss,
    explained_variance,
    ipo_loss,
    kto_loss,
    policy_loss,
    ranking_loss,
    sft_loss,
    value_loss,
)
from rlhf_cluster.algo.masked import mean_var, moments, whiten
from rlhf_cluster.algo.rewards import ScoreMoments, kl_shaped_rewards, overlong_penalty, shape_scores
from rlhf_cluster.data.labelers import rank

NUMBERS = st.floats(-4, 4, width=32)
SHARES = st.floats(0, 1)


@st.composite
def masks(draw: st.DrawFn, least: int = 1) -> Tensor:
    """Right-padded, [B, T], at least `least` tokens in each row."""
    lengths = draw(st.lists(st.integers(least, 7), min_size=1, max_size=6))
    return torch.arange(max(*lengths, 1)) < torch.tensor(lengths)[:, None]


def like(draw: st.DrawFn, mask: Tensor, count: int) -> list[Tensor]:
    """float64 numbers of the mask's shape; NaN where it is not set, which nothing may look at."""
    found = []
    for _ in range(count):
        numbers = draw(hnp.arrays(np.float64, tuple(mask.shape), elements=NUMBERS))
        found.append(torch.where(mask, torch.from_numpy(numbers), torch.nan))
    return found


@st.composite
def batches(draw: st.DrawFn, count: int) -> tuple[Tensor, ...]:
    mask = draw(masks())
    return mask, *like(draw, mask, count)


def rows_of(mask: Tensor, values: Tensor) -> list[list[float]]:
    return [row[own].tolist() for row, own in zip(values, mask, strict=True)]


@given(batches(2), SHARES, SHARES)
def test_gae_is_the_discounted_sum_of_its_errors(batch: tuple[Tensor, ...], gamma: float, lam: float) -> None:
    """Schulman's eq. 16, token by token, over the response's own end."""
    mask, rewards, values = batch
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    pairs = zip(rows_of(mask, rewards), rows_of(mask, values), rows_of(mask, advantages), strict=True)
    for r, v, found in pairs:
        deltas = [r[t] + gamma * ([*v, 0.0][t + 1]) - v[t] for t in range(len(r))]
        expected = [
            sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, len(r))) for t in range(len(r))
        ]
        assert found == pytest.approx(expected, abs=1e-9)
    assert torch.allclose((returns - advantages)[mask], values[mask])
    assert not advantages[~mask].any() and not returns[~mask].any()


@given(batches(2))
def test_with_gamma_and_lambda_1_a_return_is_what_was_still_earned_whatever_the_critic_says(
    batch: tuple[Tensor, ...],
) -> None:
    mask, rewards, values = batch
    returns = gae(rewards, values, mask, 1.0, 1.0)[1]
    assert torch.allclose(returns, returns_to_go(rewards, mask, 1.0), atol=1e-9)


@given(batches(1), st.integers(1, 4))
def test_whitened_by_the_moments_of_all_ranks_nothing_depends_on_the_split(
    batch: tuple[Tensor, ...], ranks: int
) -> None:
    mask, values = batch
    shares = [range(rank, len(mask), ranks) for rank in range(ranks)]
    together = sum((moments(values[list(own)], mask[list(own)]) for own in shares), torch.zeros(3, dtype=torch.float64))
    mean, var = mean_var(together)
    white = whiten(values, mask, mean, var)
    real = values[mask]
    expected = (real - real.mean()) / (real.var(unbiased=False) + 1e-8).sqrt()
    assert torch.allclose(white[mask], expected, atol=1e-5, rtol=1e-5)
    assert not white[~mask].any()


@given(batches(3), st.floats(0.01, 0.9))
def test_the_clipped_loss_is_never_below_the_free_one_and_equal_where_the_policy_did_not_move(
    batch: tuple[Tensor, ...], clip: float
) -> None:
    mask, logprobs, old, advantages = batch
    moved = policy_loss(logprobs, old, advantages, mask, clip)
    free = -(advantages * (logprobs - old).exp())[mask].sum()
    assert float(moved.loss_sum) >= float(free) - 1e-6 * (1 + abs(float(free)))
    still = policy_loss(logprobs, logprobs, advantages, mask, clip)
    assert float(still.loss_sum) == pytest.approx(-float(advantages[mask].sum()), abs=1e-6)
    assert (float(still.ratio_min), float(still.ratio_max), float(still.pg_clipfrac_sum)) == (1.0, 1.0, 0.0)


@given(batches(3), st.floats(0.01, 2))
def test_a_held_critic_is_never_better_off(batch: tuple[Tensor, ...], clip: float) -> None:
    mask, values, old, returns = batch
    free = 0.5 * (values - returns)[mask].square().sum()
    assert float(value_loss(values, old, returns, mask, clip).loss_sum) >= float(free) - 1e-9
    for unheld in (value_loss(values, values, returns, mask, clip), value_loss(values, old, returns, mask, 0.0)):
        assert float(unheld.loss_sum) == pytest.approx(float(free), abs=1e-9)
        assert float(unheld.vf_clipfrac_sum) == 0


@given(batches(2))
def test_explained_variance_is_what_a_plain_variance_says(batch: tuple[Tensor, ...]) -> None:
    mask, values, returns = batch
    said, told = values[mask].tolist(), returns[mask].tolist()
    assume(statistics.pvariance(told) > 1e-6)
    expected = 1 - statistics.pvariance([r - v for r, v in zip(told, said, strict=True)]) / statistics.pvariance(told)
    assert float(explained_variance(values, returns, mask)) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(batches(1), st.integers(0, 6))
def test_the_loss_of_demonstrations_is_minus_the_sum_of_their_tokens_however_they_are_laid_out(
    batch: tuple[Tensor, ...], cut: int
) -> None:
    """Padded, flat, or in two micro-batches, of which one may be empty."""
    mask, logprobs = batch
    expected = -sum(sum(row) for row in rows_of(mask, logprobs))
    flat = sft_loss(logprobs[mask], torch.ones(int(mask.sum())))
    parts = sft_loss(logprobs[:cut], mask[:cut]) + sft_loss(logprobs[cut:], mask[cut:])
    for found in (sft_loss(logprobs, mask), flat, parts):
        assert float(found) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(NUMBERS, st.booleans()), min_size=1, max_size=6), SHARES, SHARES, st.booleans())
def test_shaped_scores_are_held_one_by_one_and_a_missing_end_never_pays(
    rows: list[tuple[float, bool]], clip: float, penalty: float, replace: bool
) -> None:
    scores, ended = torch.tensor([s for s, _ in rows], dtype=torch.float64), torch.tensor([end for _, end in rows])
    found = shape_scores(scores, ended, penalty, clip, replace)
    for (score, end), shaped in zip(rows, found.tolist(), strict=True):
        held = min(max(score, -clip), clip) if clip else score
        missing = -penalty if replace else held - penalty
        assert shaped == pytest.approx(held if end else missing, abs=1e-9)
    others = shape_scores(scores, ~ended, penalty, clip, replace)
    told, untold = torch.where(ended, found, others), torch.where(ended, others, found)
    assert bool((untold == -penalty).all()) if replace else bool((untold <= told).all())


@given(st.integers(1, 30), st.integers(1, 30))
def test_each_token_within_the_buffer_costs_the_same_and_no_other_costs(limit: int, buffer: int) -> None:
    lengths = torch.arange(max(limit - buffer - 3, 0), limit + 1)
    found = overlong_penalty(lengths, limit, buffer)
    costs = -found.diff()
    assert float(found[-1]) == -1
    within = lengths[1:] > limit - buffer
    assert costs.tolist() == pytest.approx([1 / buffer if inside else 0.0 for inside in within.tolist()], abs=1e-6)


@given(batches(2), hnp.arrays(np.float64, 6, elements=NUMBERS), SHARES)
def test_shaped_rewards_add_up_to_the_score_minus_the_penalty(
    batch: tuple[Tensor, ...], scores: np.ndarray, coef: float
) -> None:
    mask, logprobs, ref = batch
    own = torch.from_numpy(scores[: len(mask)])
    kl = k1(logprobs, ref)
    rewards, penalties = kl_shaped_rewards(own, kl, mask, coef)
    per_response = torch.tensor([sum(row) for row in rows_of(mask, kl)], dtype=torch.float64)
    assert torch.allclose(rewards.sum(1), own - coef * per_response, atol=1e-9)
    last = mask.sum(1) - 1
    away = torch.ones_like(mask).scatter(1, last[:, None], False)
    assert torch.equal(rewards[away], penalties[away])


@given(batches(2))
def test_estimators_of_the_kl_are_their_formulas_and_agree_where_the_policies_do(batch: tuple[Tensor, ...]) -> None:
    mask, logprobs, ref = batch
    logr = [r - p for p, r in zip(logprobs[mask].tolist(), ref[mask].tolist(), strict=True)]
    assert k1(logprobs, ref)[mask].tolist() == pytest.approx([-x for x in logr], abs=1e-9)
    assert k2(logprobs, ref)[mask].tolist() == pytest.approx([x**2 / 2 for x in logr], abs=1e-9)
    assert k3(logprobs, ref)[mask].tolist() == pytest.approx([math.exp(x) - 1 - x for x in logr], abs=1e-9)
    assert bool((k2(logprobs, ref)[mask] >= 0).all()) and bool((k3(logprobs, ref)[mask] >= 0).all())
    assert all(not bool(one(ref, ref)[mask].any()) for one in (k1, k2, k3))


@given(st.lists(st.tuples(st.floats(-5, 50), st.integers(1, 400)), max_size=8))
def test_an_adaptive_coefficient_is_the_product_of_its_factors(batches: list[tuple[float, int]]) -> None:
    """As the class of lm-human-preferences has it; it stays above 0 where the horizon is long enough."""
    controller, expected = AdaptiveKL(0.1, target=6.0, horizon=100.0), 0.1
    for kl, batch_size in batches:
        controller.update(kl, batch_size)
        expected *= 1 + float(np.clip(kl / 6 - 1, -0.2, 0.2)) * batch_size / 100
    assert controller.coef == pytest.approx(expected, rel=1e-9) and controller.coef > 0


@st.composite
def rankings(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    count = draw(st.integers(1, 7))
    scores = draw(st.lists(NUMBERS, min_size=count, max_size=count))
    return scores, draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))


OfMargin = Callable[[float], float]
PAIRWISE = [
    pytest.param(ranking_loss, lambda m: math.log1p(math.exp(-m)), lambda m: -1 / (1 + math.exp(m)), 1.0, id="ranking"),
    pytest.param(partial(ipo_loss, beta=0.25), lambda m: (m - 2) ** 2, lambda m: 2 * (m - 2), 0.25, id="ipo"),
]


@pytest.mark.parametrize(("loss", "of_margin", "slope", "scale"), PAIRWISE)
@given(rankings(), NUMBERS, st.randoms(use_true_random=False))
def test_a_prompts_ranking_loss_is_the_mean_over_its_unequal_pairs(
    loss: Callable[[Tensor, Tensor], RankingLoss],
    of_margin: OfMargin,
    slope: OfMargin,
    scale: float,
    ranking: tuple[list[float], list[int]],
    shift: float,
    chance: random.Random,
) -> None:
    """In any order of the responses, wherever the scores have their zero; only ties say nothing."""
    scores, ranks = ranking
    pairs = [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]
    margins = [scores[i] - scores[j] for i, j in pairs]
    pulls = [0.0] * len(ranks)
    for (i, j), margin in zip(pairs, margins, strict=True):
        pulls[i] += slope(margin) / len(pairs)
        pulls[j] -= slope(margin) / len(pairs)
    order = list(range(len(ranks)))
    chance.shuffle(order)
    told = torch.tensor([scores[i] + shift for i in order], dtype=torch.float64, requires_grad=True)
    found = loss(told, torch.tensor([ranks[i] for i in order]))
    assert float(found.loss.detach()) == pytest.approx(sum(map(of_margin, margins)) / max(len(pairs), 1), abs=1e-6)
    assert int(found.pairs) == len(pairs)
    assert float(found.margin_sum) == pytest.approx(scale * sum(margins), abs=1e-6)
    found.loss.backward()
    assert told.grad is not None
    assert told.grad.tolist() == pytest.approx([pulls[i] for i in order], abs=1e-6)


@given(rankings(), NUMBERS, NUMBERS)
def test_a_prompts_kto_loss_is_the_mean_over_its_best_and_worst(
    ranking: tuple[list[float], list[int]], kl: float, shift: float
) -> None:
    """Where the policy is against the KL is all that counts; the other way round it loses what it gained."""
    ratios, ranks = torch.tensor(ranking[0], dtype=torch.float64, requires_grad=True), torch.tensor(ranking[1])
    best, worst = min(ranking[1]), max(ranking[1])
    gains = [
        1 / (1 + math.exp(-0.3 * (h - kl if rank == best else kl - h)))
        for h, rank in zip(*ranking, strict=True)
        if rank in (best, worst) and best < worst
    ]
    found = kto_loss(ratios, ranks, kl, 0.3)
    expected = sum(1 - gain for gain in gains) / max(len(gains), 1)
    assert float(found.loss.detach()) == pytest.approx(expected, abs=1e-9)
    whole = ranking_loss(0.3 * ratios, ranks)
    assert (found.pairs, found.correct_pairs) == (whole.pairs, whole.correct_pairs)
    assert float(found.margin_sum) == pytest.approx(float(whole.margin_sum), abs=1e-9)
    shifted, turned = kto_loss(ratios + shift, ranks, kl + shift, 0.3), kto_loss(ratios, -ranks, kl, 0.3)
    assert float(shifted.loss.detach()) == pytest.approx(expected, abs=1e-9)
    assert float((found.loss + turned.loss).detach()) == pytest.approx(1.0 if gains else 0.0, abs=1e-9)
    found.loss.backward()
    assert ratios.grad is not None
    assert ratios.grad.sign().tolist() == [(rank == worst) - (rank == best) for rank in ranking[1]]


@given(st.lists(NUMBERS, min_size=1, max_size=8), st.floats(0, 2))
def test_ranks_follow_scores_and_leave_none_out(scores: list[float], margin: float) -> None:
    ranks = rank(scores, margin)
    assert sorted(set(ranks)) == list(range(1, max(ranks) + 1))
    for (a, one), (b, other) in itertools.permutations(zip(scores, ranks, strict=True), 2):
        assert one <= other if a >= b else one >= other
        if one == other:
            assert abs(a - b) <= margin


@st.composite
def groups(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    members = draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    outcomes = draw(st.lists(NUMBERS, min_size=len(members), max_size=len(members)))
    number = {name: place for place, name in enumerate(dict.fromkeys(members))}
    return torch.tensor(outcomes, dtype=torch.float64), torch.tensor([number[name] for name in members])


@given(groups(), NUMBERS)
def test_within_a_group_advantages_cancel_and_the_prompts_own_level_does_not_count(
    rows: tuple[Tensor, Tensor], level: float
) -> None:
    outcomes, group = rows
    for compare in (
        lambda o: group_relative(o, group, scale=False),
        lambda o: group_relative(o, group, scale=True),
        lambda o: leave_one_out(o, group),
    ):
        found = compare(outcomes)
        for own in group.unique():
            assert float(found[group == own].sum()) == pytest.approx(0.0, abs=1e-6)
        lifted = compare(outcomes + level * group)
        assert torch.allclose(lifted, found, atol=1e-5)


@given(groups())
def test_leaving_one_out_compares_with_the_mean_of_the_others(rows: tuple[Tensor, Tensor]) -> None:
    outcomes, group = rows
    for i, found in enumerate(leave_one_out(outcomes, group).tolist()):
        others = [float(o) for j, o in enumerate(outcomes) if j != i and group[j] == group[i]]
        expected = float(outcomes[i]) - sum(others) / len(others) if others else 0.0
        assert found == pytest.approx(expected, abs=1e-9)


@given(st.lists(hnp.arrays(np.float64, st.integers(0, 5), elements=NUMBERS), max_size=5))
def test_score_moments_are_those_of_all_scores_however_they_came(parts: list[np.ndarray]) -> None:
    found = ScoreMoments()
    for part in parts:
        found.tell(part)
    whole = np.concatenate([np.zeros(0), *parts])
    if len(whole):
        assert found.mean == pytest.approx(whole.mean(), abs=1e-9)
        assert found.std == pytest.approx(whole.std() if whole.var() > 1e-12 else 1.0, abs=1e-6)
