"""Logprobs and entropy: hand-worked, against plain loops, and chunked as unchunked."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_cluster.algo import logprobs as module
from rlhf_cluster.algo.logprobs import logprobs_from_logits, response_logprobs


def inputs(tokens: int, grad: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 4, generator=generator)
    weight, bias = torch.randn(11, 4, generator=generator), torch.randn(11, generator=generator)
    ids = torch.randint(0, 11, (tokens,), generator=generator)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_(grad)
    return hidden, weight, ids, bias


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


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_as_plain_loops_do_it(chunk: int) -> None:
    hidden, weight, ids, bias = inputs(7)
    logprobs, entropy = response_logprobs(hidden, weight, ids, 0.7, chunk, lm_head_bias=bias)
    for i in range(7):
        scores = [
            (sum(hidden[i, h].item() * weight[v, h].item() for h in range(4)) + bias[v].item()) / 0.7 for v in range(11)
        ]
        total = sum(math.exp(s) for s in scores)
        assert logprobs[i].item() == pytest.approx(scores[ids[i]] - math.log(total), abs=1e-5)
        assert entropy[i].item() == pytest.approx(
            -sum(math.exp(s) / total * math.log(math.exp(s) / total) for s in scores), abs=1e-5
        )


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_gradient_of_chunks_is_that_of_the_whole(chunk: int) -> None:
    pull = torch.linspace(-1, 1, 7)
    gradients = []
    for size in (100, chunk):
        hidden, weight, ids, bias = inputs(7, grad=True)
        logprobs, _ = response_logprobs(hidden, weight, ids, 0.7, size, lm_head_bias=bias)
        (logprobs * pull).sum().backward()
        gradients.append((hidden.grad, weight.grad, bias.grad))
    for whole, parts in zip(*gradients, strict=True):
        assert whole.abs().max() > 0.01
        assert torch.allclose(whole, parts, atol=1e-6)


def test_gradient_by_hand() -> None:
    """d log pi(a) / d z_v = ([v = a] - pi(v)) / T."""
    logits = torch.tensor([[0.0, math.log(9.0)]], requires_grad=True)
    logprobs, entropy = logprobs_from_logits(logits, torch.tensor([0]), 2.0)
    logprobs.sum().backward()
    assert logits.grad.tolist()[0] == pytest.approx([(1 - 1 / 4) / 2, (0 - 3 / 4) / 2])
    assert not entropy.requires_grad


@pytest.mark.parametrize("grad", [False, True])
def test_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch, grad: bool) -> None:
    """No more tokens than a chunk are ever multiplied at once, nor kept for the backward pass."""
    hidden, weight, ids, bias = inputs(10, grad)
    seen: list[int] = []
    inner = module.logprobs_from_logits

    def watched(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        seen.append(len(logits))
        return inner(logits, ids, temperature)

    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    monkeypatch.setattr(module, "logprobs_from_logits", watched)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = response_logprobs(hidden, weight, ids, 1.0, 5, lm_head_bias=bias)
    assert seen == [5, 5]
    assert torch.Size([5, 11]) not in kept
    if grad:
        logprobs.sum().backward()
        assert seen == [5, 5, 5, 5]  # computed again, a chunk at a time


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
    hidden, weight, ids, _ = inputs(6)
    logprobs, entropy = response_logprobs(hidden.bfloat16(), weight.bfloat16(), ids, 1.0, 4)
    assert logprobs.dtype == entropy.dtype == torch.float32
    exact, _ = response_logprobs(hidden, weight, ids, 1.0, 4)
    assert torch.allclose(logprobs, exact, atol=0.1)


def test_no_token() -> None:
    hidden, weight, ids, _ = inputs(0, grad=True)
    logprobs, entropy = response_logprobs(hidden, weight, ids, 1.0, 4)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad.eq(0).all()


def test_refuses() -> None:
    hidden, weight, ids, _ = inputs(3)
    with pytest.raises(ValueError, match="temperature=0"):
        response_logprobs(hidden, weight, ids, 0.0, 4)
    with pytest.raises(ValueError, match="chunk=0"):
        response_logprobs(hidden, weight, ids, 1.0, 0)
    with pytest.raises(ValueError, match="3 hidden states for 2"):
        response_logprobs(hidden, weight, ids[:2], 1.0, 4)
