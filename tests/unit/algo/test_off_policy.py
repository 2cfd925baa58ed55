"""Importance weights and masks: by hand, against the sum over everything that may be sampled, and where they say
nothing."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cluster.algo.masked import moments
from rlhf_cluster.algo.off_policy import MOST, effective_share, of_responses, truncated_weights, within

NAN, INF = float("nan"), float("inf")
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
DIFFERENCE = torch.tensor([[math.log(3.0), math.log(0.5), NAN], [math.log(0.25), NAN, NAN]])


def test_weights_of_tokens_by_hand() -> None:
    found = truncated_weights(DIFFERENCE, MASK, cap=2.0)
    torch.testing.assert_close(found, torch.tensor([[2.0, 0.5, 0.0], [0.25, 0.0, 0.0]]))


def test_weights_of_responses_by_hand() -> None:
    """3 x 0.5 = 1.5, and the geometric mean sqrt(1.5), at every token."""
    whole = truncated_weights(of_responses(DIFFERENCE, MASK), MASK, cap=INF)
    torch.testing.assert_close(whole, torch.tensor([[1.5, 1.5, 0.0], [0.25, 0.0, 0.0]]))
    mean = truncated_weights(of_responses(DIFFERENCE, MASK, mean=True), MASK, cap=INF)
    torch.testing.assert_close(mean, torch.tensor([[math.sqrt(1.5)] * 2 + [0.0], [0.25, 0.0, 0.0]]))


def test_masks_by_hand() -> None:
    assert within(DIFFERENCE, MASK, 0.5, 5.0).tolist() == [[True, True, False], [False] * 3]
    assert within(DIFFERENCE, MASK, 0.1, 2.0).tolist() == [[False, True, False], [True, False, False]]
    assert within(of_responses(DIFFERENCE, MASK), MASK, 1.4, 1.6).tolist() == [[True, True, False], [False] * 3]
    assert not within(of_responses(DIFFERENCE, MASK, mean=True), MASK, 1.4, 1.6).any()


def test_effective_share_by_hand() -> None:
    """Of weights 2, 0.5, 0.25: 2.75^2 / (3 x 4.3125)."""
    weights = truncated_weights(DIFFERENCE, MASK, cap=2.0)
    assert effective_share(moments(weights, MASK)) == pytest.approx(2.75**2 / (3 * 4.3125))
    assert effective_share(moments(MASK.float(), MASK)) == 1.0
    assert effective_share(moments(torch.tensor([[7.0, 0.0, 0.0, 0.0]]), torch.ones(1, 4))) == pytest.approx(0.25)
    assert effective_share(moments(weights, torch.zeros_like(MASK))) == 0.0


def test_weighed_samples_of_one_policy_have_the_mean_of_the_other() -> None:
    """Every response of two tokens from a vocabulary of three, by its probability under the sampler: weighed by its
    ratio, any function of it has its mean under the learner."""
    generator = torch.Generator().manual_seed(0)
    sampler, learner = (torch.log_softmax(torch.randn(2, 3, 3, generator=generator), -1) for _ in range(2))
    value = torch.randn(3, 3, generator=generator)
    mean = expected = 0.0
    for first, second in product(range(3), range(3)):

        def logprobs(policy: torch.Tensor, first: int = first, second: int = second) -> torch.Tensor:
            return torch.stack([policy[0, 0, first], policy[1, first, second]])[None]

        mask = torch.ones(1, 2)
        weight = truncated_weights(of_responses(logprobs(learner) - logprobs(sampler), mask), mask, INF)[0, 0]
        mean += float(logprobs(sampler).sum().exp() * weight * value[first, second])
        expected += float(logprobs(learner).sum().exp() * value[first, second])
    assert mean == pytest.approx(expected, abs=1e-6)


DIFFERENCES = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=6)


@given(st.lists(DIFFERENCES, min_size=1, max_size=4), st.floats(1.0, 10.0))
def test_law_weights_are_finite_within_the_cap_and_1_where_policies_agree(rows: list[list[float]], cap: float) -> None:
    width = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    difference = torch.tensor([row + [NAN] * (width - len(row)) for row in rows])
    for of in (difference, of_responses(difference, mask), of_responses(difference, mask, mean=True)):
        weights = truncated_weights(of, mask, cap)
        assert ((weights >= 0) & (weights <= cap + 1e-6)).all() and not weights[mask == 0].any()
        assert truncated_weights(of, mask, INF).max() <= math.exp(MOST) * 1.001
        assert not within(of, mask, 0.0, INF)[mask == 0].any() and within(of, mask, 0.0, INF)[mask == 1].all()
    same = torch.zeros_like(difference)
    assert torch.equal(truncated_weights(of_responses(same, mask), mask, cap), mask.float())
    assert torch.equal(within(same, mask, 0.99, 1.01), mask.bool())
