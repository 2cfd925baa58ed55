"""Logprobs and entropy: hand-worked, and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_cluster.algo.logprobs import logprobs_from_logits


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # probabilities 1/4, 3/4 and 1/2, 1/2
    logprobs, entropy = logprobs_from_logits(logits, torch.tensor([1, 0]), 1.0)
    assert logprobs.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 2)])
    assert entropy.tolist() == pytest.approx([math.log(4) - 0.75 * math.log(3), math.log(2)])


def test_temperature_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(9.0)]])  # at temperature 2: 0, log 3
    logprobs, entropy = logprobs_from_logits(logits, torch.tensor([0]), 2.0)
    assert logprobs.item() == pytest.approx(math.log(1 / 4))
    assert entropy.item() == pytest.approx(math.log(4) - 0.75 * math.log(3))


def test_as_plain_loops_do_it() -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(7)
    logprobs, entropy = logprobs_from_logits(logits, ids, 0.7)
    for i, row in enumerate(logits.tolist()):
        scores = [z / 0.7 for z in row]
        total = sum(math.exp(s) for s in scores)
        assert logprobs[i].item() == pytest.approx(scores[ids[i]] - math.log(total), abs=1e-5)
        assert entropy[i].item() == pytest.approx(
            -sum(math.exp(s) / total * math.log(math.exp(s) / total) for s in scores), abs=1e-5
        )


def test_gradient_by_hand() -> None:
    """d log pi(a) / d z_v = ([v = a] - pi(v)) / T."""
    logits = torch.tensor([[0.0, math.log(9.0)]], requires_grad=True)
    logprobs, entropy = logprobs_from_logits(logits, torch.tensor([0]), 2.0)
    logprobs.sum().backward()
    assert logits.grad.tolist()[0] == pytest.approx([(1 - 1 / 4) / 2, (0 - 3 / 4) / 2])
    assert not entropy.requires_grad


def test_the_entropy_s_gradient_where_it_is_asked_for() -> None:
    """dH/dz_j = -pi_j (log pi_j + H); it is 0 for a uniform distribution, and nothing flows unless asked."""
    logits = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    ids = torch.tensor([0])
    assert not logprobs_from_logits(logits, ids, 1.0)[1].requires_grad
    _, entropy = logprobs_from_logits(logits, ids, 1.0, entropy_gradient=True)
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    log_pi = logits.detach().log_softmax(-1)
    expected = -log_pi.exp() * (log_pi + entropy.detach().unsqueeze(-1))
    torch.testing.assert_close(gradient, expected)


def test_law_logprobs_of_all_tokens_sum_to_one_and_a_shift_of_the_logits_changes_nothing() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    every = torch.stack([logprobs_from_logits(logits, torch.full((3,), v), 1.3)[0] for v in range(5)])
    assert torch.allclose(every.exp().sum(0), torch.ones(3), atol=1e-6)
    ids = torch.tensor([0, 3, 4])
    for mine, shifted in zip(
        logprobs_from_logits(logits, ids, 1.3), logprobs_from_logits(logits + 50, ids, 1.3), strict=True
    ):
        assert torch.allclose(mine, shifted, atol=1e-4)


def test_float32_out_of_bfloat16() -> None:
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(1)).bfloat16()
    logprobs, entropy = logprobs_from_logits(logits, torch.arange(6), 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    exact, _ = logprobs_from_logits(logits.float(), torch.arange(6), 1.0)
    assert torch.equal(logprobs, exact)


def test_no_token() -> None:
    logits = torch.zeros(0, 11, requires_grad=True)
    logprobs, entropy = logprobs_from_logits(logits, torch.zeros(0, dtype=torch.int64), 1.0)
    assert logprobs.shape == entropy.shape == (0,)


def test_refuses_a_temperature_of_zero() -> None:
    with pytest.raises(ValueError, match="temperature=0"):
        logprobs_from_logits(torch.zeros(1, 2), torch.tensor([0]), 0.0)
