"""Advantages with and without a critic: hand-worked, against the papers' sums written out, and their laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cluster.algo.advantages import gae, group_relative, leave_one_out, returns_to_go

NAN = float("nan")
LENGTHS = [1, 4, 6, 3]


def rollouts() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(6) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    rewards, values = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    return rewards, values, mask


def test_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0], [4.0, NAN, NAN]])
    values = torch.tensor([[0.5, 1.0, 1.5], [1.0, NAN, NAN]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # delta_2 = 2 - 1.5 = 0.5; delta_1 = 0.5 * 1.5 - 1 = -0.25; delta_0 = 1 + 0.5 * 1 - 0.5 = 1
    # A_2 = 0.5; A_1 = -0.25 + 0.25 * 0.5 = -0.125; A_0 = 1 + 0.25 * -0.125 = 0.96875. Second row: 4 - 1 = 3.
    assert advantages.tolist() == [[0.96875, -0.125, 0.5], [3.0, 0.0, 0.0]]
    assert returns.tolist() == [[1.46875, 0.875, 2.0], [4.0, 0.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.9, 0.0)])
def test_as_the_papers_sum_written_out(gamma: float, lam: float) -> None:
    """A_t = sum_l (gamma * lam)^l * delta_{t+l} (eq. 16), one response at a time and never past its end."""
    rewards, values, mask = rollouts()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b, length in enumerate(LENGTHS):
        r, v = rewards[b].tolist()[:length], [*values[b].tolist()[:length], 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(6):
            expected = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length)) if t < length else 0.0
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[b, t].item() == pytest.approx(expected + v[t] if t < length else 0.0, abs=1e-5)


def test_law_with_gamma_and_lambda_1_it_is_the_return_minus_the_value() -> None:
    rewards, values, mask = rollouts()
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    rewards, values = rewards * mask, values * mask
    to_go = rewards.flip(1).cumsum(1).flip(1) * mask
    assert torch.allclose(returns, to_go, atol=1e-5)
    assert torch.allclose(advantages, to_go - values, atol=1e-5)


def test_law_padding_never_leaks_in() -> None:
    rewards, values, mask = rollouts()
    wider = torch.full((4, 3), NAN)
    plain = gae(rewards, values, mask, 0.9, 0.8)
    padded = gae(
        torch.cat([rewards.masked_fill(mask == 0, NAN), wider], 1),
        torch.cat([values.masked_fill(mask == 0, NAN), wider], 1),
        torch.cat([mask, torch.zeros_like(wider).long()], 1),
        0.9,
        0.8,
    )
    for narrow, wide in zip(plain, padded, strict=True):
        assert torch.equal(wide[:, :6], narrow)
        assert wide[:, 6:].eq(0).all()


def test_a_critic_that_foresees_all_leaves_no_advantage() -> None:
    advantages, _ = gae(torch.tensor([[0.0, 0.0, 3.0]]), torch.full((1, 3), 3.0), torch.ones(1, 3), 1.0, 0.95)
    assert advantages.abs().max() == 0


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_no_token(shape: tuple[int, int]) -> None:
    zeros = torch.zeros(shape)
    for result in gae(zeros, zeros, zeros, 1.0, 0.95):
        assert result.shape == shape
        assert result.eq(0).all()


def test_returns_to_go_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0], [4.0, NAN, NAN]])
    found = returns_to_go(rewards, torch.tensor([[1, 1, 1], [1, 0, 0]]), gamma=0.5)
    assert found.tolist() == [[1.5, 1.0, 2.0], [4.0, 0.0, 0.0]]


def test_returns_to_go_as_the_sum_written_out() -> None:
    rewards, _, mask = rollouts()
    found = returns_to_go(rewards, mask, 0.9)
    for b, length in enumerate(LENGTHS):
        for t in range(6):
            expected = sum(0.9 ** (s - t) * rewards[b, s].item() for s in range(t, length))
            assert found[b, t].item() == pytest.approx(expected, abs=1e-5)


GROUPS = torch.tensor([0, 1, 0, 0, 1, 2])
OUTCOMES = torch.tensor([1.0, 5.0, 2.0, 6.0, 5.0, 9.0])


def test_groups_by_hand() -> None:
    """Group 0: 1, 2, 6 with mean 3 and unbiased variance 14 / 2 = 7. Group 1 is all alike, group 2 has one member."""
    centred = [-2.0, 0.0, -1.0, 3.0, 0.0, 0.0]
    assert group_relative(OUTCOMES, GROUPS, scale=False).tolist() == pytest.approx(centred)
    scaled = [value / (7**0.5 + 1e-6) for value in centred]
    assert group_relative(OUTCOMES, GROUPS, scale=True).tolist() == pytest.approx(scaled)
    # Without itself: 1 - 8/2, 2 - 7/2, 6 - 3/2.
    assert leave_one_out(OUTCOMES, GROUPS).tolist() == pytest.approx([-3.0, 0.0, -1.5, 4.5, 0.0, 0.0])


def test_groups_as_plain_loops_do_them() -> None:
    generator = torch.Generator().manual_seed(3)
    outcomes, groups = torch.randn(40, generator=generator), torch.randint(0, 7, (40,), generator=generator)
    scaled, left_out = group_relative(outcomes, groups, scale=True), leave_one_out(outcomes, groups)
    for i in range(40):
        others = outcomes[(groups == groups[i]) & (torch.arange(40) != i)]
        everyone = torch.cat([others, outcomes[i : i + 1]])
        assert left_out[i].item() == pytest.approx(outcomes[i].item() - others.mean().item(), abs=1e-5)
        assert scaled[i].item() == pytest.approx(((outcomes[i] - everyone.mean()) / everyone.std()).item(), abs=1e-4)


@pytest.mark.parametrize("compare", [leave_one_out, lambda o, g: group_relative(o, g, scale=True)])
def test_law_a_shift_of_a_group_and_the_order_of_rows_change_nothing(compare: Any) -> None:
    shifted = OUTCOMES + torch.tensor([7.0, -3.0, 7.0, 7.0, -3.0, 1.0])
    assert torch.allclose(compare(shifted, GROUPS), compare(OUTCOMES, GROUPS), atol=1e-5)
    order = torch.tensor([4, 2, 5, 0, 1, 3])
    assert torch.allclose(compare(OUTCOMES[order], GROUPS[order]), compare(OUTCOMES, GROUPS)[order])
    sums = torch.zeros(3).index_add(0, GROUPS, compare(OUTCOMES, GROUPS))
    assert torch.allclose(sums, torch.zeros(3), atol=1e-5)
