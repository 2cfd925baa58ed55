"""Scores and KL-shaped rewards: hand-worked, against plain loops, and what must add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf_cluster.algo.kl import k1
from rlhf_cluster.algo.rewards import ScoreMoments, kl_shaped_rewards, overlong_penalty, shape_scores

NAN = float("nan")


def test_by_hand() -> None:
    rewards, non_score = kl_shaped_rewards(
        scores=torch.tensor([10.0, -4.0]),
        kl=torch.tensor([[1.0, -0.5, NAN], [0.0, 1.0, -2.0]]),
        mask=torch.tensor([[1, 1, 0], [1, 1, 1]]),
        kl_coef=0.1,
    )
    assert torch.allclose(non_score, torch.tensor([[-0.1, 0.05, 0.0], [0.0, -0.1, 0.2]]))
    assert torch.allclose(rewards, torch.tensor([[-0.1, 10.05, 0.0], [0.0, -0.1, -3.8]]))


def test_as_plain_loops_do_it() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, ref = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    scores, lengths = torch.randn(6, generator=generator), [1, 5, 3, 2, 4, 1]
    mask = (torch.arange(5) < torch.tensor(lengths).unsqueeze(1)).float()
    rewards, non_score = kl_shaped_rewards(scores, k1(logprobs, ref), mask, 0.3)
    for b, length in enumerate(lengths):
        for t in range(5):
            penalty = -0.3 * (logprobs[b, t].item() - ref[b, t].item()) if t < length else 0.0
            score = scores[b].item() if t == length - 1 else 0.0
            assert non_score[b, t].item() == pytest.approx(penalty, abs=1e-6)
            assert rewards[b, t].item() == pytest.approx(penalty + score, abs=1e-6)


def test_law_a_row_adds_up_to_score_minus_beta_times_the_log_ratio() -> None:
    """InstructGPT eq. (2) speaks of the sum: r(x, y) - beta * log(pi(y|x) / pi_ref(y|x))."""
    generator = torch.Generator().manual_seed(1)
    logprobs, ref = torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    scores, mask = torch.randn(4, generator=generator), torch.ones(4, 3)
    rewards, _ = kl_shaped_rewards(scores, k1(logprobs, ref), mask, 0.02)
    assert torch.allclose(rewards.sum(1), scores - 0.02 * (logprobs.sum(1) - ref.sum(1)), atol=1e-5)


def test_without_a_coefficient_only_the_score_is_left() -> None:
    rewards, non_score = kl_shaped_rewards(torch.tensor([2.0]), torch.tensor([[-1.0, -5.0]]), torch.ones(1, 2), 0.0)
    assert rewards.tolist() == [[0.0, 2.0]]
    assert non_score.abs().max() == 0


def test_a_row_without_a_token_is_refused_for_its_score_would_be_lost() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\] of 2"):
        kl_shaped_rewards(torch.ones(2), torch.zeros(2, 2), torch.tensor([[1, 0], [0, 0]]), 0.1)


def test_no_row_at_all() -> None:
    rewards, _ = kl_shaped_rewards(torch.ones(0), torch.zeros(0, 2), torch.zeros(0, 2), 0.1)
    assert rewards.shape == (0, 2)


def test_shaped_scores_by_hand() -> None:
    scores, ended = torch.tensor([7.0, 7.0, -7.0, 0.5]), torch.tensor([True, False, False, True])
    assert shape_scores(scores, ended, 1.0, 5.0).tolist() == [5.0, 4.0, -6.0, 0.5]  # the clip never hides the penalty
    assert shape_scores(scores, ended, 1.0, 0.0).tolist() == [7.0, 6.0, -8.0, 0.5]  # 0: no clip
    assert shape_scores(scores, ended, 0.0, 0.0).tolist() == scores.tolist()


def test_a_missing_eos_may_put_a_constant_in_the_score_s_place() -> None:
    scores, ended = torch.tensor([7.0, 7.0, -7.0]), torch.tensor([True, False, False])
    assert shape_scores(scores, ended, 1.0, 5.0, replace=True).tolist() == [5.0, -1.0, -1.0]


def test_score_moments_are_those_of_all_batches_together() -> None:
    batches = [np.array([1.0, 2.0, 6.0]), np.zeros(0), np.array([-4.0]), np.full(5, 1e4)]
    moments, seen = ScoreMoments(), np.zeros(0)
    assert (moments.mean, moments.std) == (0.0, 1.0)
    for scores in batches:
        moments.tell(scores)
        seen = np.concatenate([seen, scores])
        assert (moments.count, moments.mean) == (len(seen), pytest.approx(seen.mean()))
        assert moments.std == pytest.approx(seen.std())


def test_scores_that_do_not_vary_are_not_blown_up() -> None:
    moments = ScoreMoments()
    moments.tell(np.full(4, 3.0))
    assert (moments.mean, moments.std) == (3.0, 1.0)


def test_shape_scores_refuses_negative_numbers() -> None:
    with pytest.raises(ValueError, match="clip=-1"):
        shape_scores(torch.ones(1), torch.tensor([True]), 0.0, -1.0)
    with pytest.raises(ValueError, match="missing_eos_penalty=-2"):
        shape_scores(torch.ones(1), torch.tensor([True]), -2.0, 0.0)


def test_length_costs_in_the_buffer_alone_by_hand() -> None:
    """DAPO eq. 13 with L = 20 and a buffer of 8: nothing up to 12, half of it at 16, all at 20."""
    found = overlong_penalty(torch.tensor([1, 12, 13, 16, 20]), limit=20, buffer=8)
    assert found.tolist() == [0.0, 0.0, -0.125, -0.5, -1.0]
