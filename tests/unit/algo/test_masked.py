"""Masked sums and whitening: padding never leaks in, and the split over ranks never shows."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_cluster.algo.masked import masked_sum, mean_var, moments, whiten

NAN = float("nan")
VALUES = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_by_hand_with_nan_in_the_padding() -> None:
    assert masked_sum(VALUES, MASK).item() == 9.0
    assert moments(VALUES, MASK).tolist() == [3.0, 9.0, 41.0]
    mean, var = mean_var(moments(VALUES, MASK))
    assert mean.item() == 3.0  # over tokens; a mean of row means would be 3.75
    assert var.item() == pytest.approx(14 / 3)  # biased: (4 + 1 + 9) / 3; the unbiased one is 7


def test_whitened_by_hand() -> None:
    mean, var = mean_var(moments(VALUES, MASK))
    scale = math.sqrt(14 / 3)
    expected = torch.tensor([[-2 / scale, -1 / scale, 0.0], [3 / scale, 0.0, 0.0]])
    assert torch.allclose(whiten(VALUES, MASK, mean, var), expected)
    kept = torch.tensor([[3 - 2 / scale, 3 - 1 / scale, 0.0], [3 + 3 / scale, 0.0, 0.0]])
    assert torch.allclose(whiten(VALUES, MASK, mean, var, shift_mean=False), kept)


def test_whitened_as_plain_loops_do_it() -> None:
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.randn(5, 7, generator=generator), (torch.rand(5, 7, generator=generator) < 0.6).long()
    tokens = [values[b, t].item() for b in range(5) for t in range(7) if mask[b, t]]
    mean = sum(tokens) / len(tokens)
    var = sum((x - mean) ** 2 for x in tokens) / len(tokens)
    whitened = whiten(values, mask, *mean_var(moments(values, mask)))
    for b in range(5):
        for t in range(7):
            expected = (values[b, t].item() - mean) / math.sqrt(var + 1e-8) if mask[b, t] else 0.0
            assert whitened[b, t].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("cuts", [[8], [3, 5], [1, 1, 6], [1] * 8, [0, 8]])
def test_law_any_split_of_the_rows_over_ranks_whitens_alike(cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    values = 100 + torch.randn(8, 6, generator=generator)  # far from 0: where sums of squares lose digits
    mask = (torch.arange(6) < torch.randint(1, 7, (8, 1), generator=generator)).long()
    whole = whiten(values, mask, *mean_var(moments(values, mask)))
    ranks = list(zip(values.split(cuts), mask.split(cuts), strict=True))
    reduced = torch.stack([moments(v, m) for v, m in ranks]).sum(0)
    parts = torch.cat([whiten(v, m, *mean_var(reduced)) for v, m in ranks])
    assert torch.allclose(parts, whole, rtol=0, atol=1e-6)
    assert masked_sum(whole, mask).item() / mask.sum() == pytest.approx(0, abs=1e-5)
    assert masked_sum(whole.square(), mask).item() / mask.sum() == pytest.approx(1, abs=1e-5)


def test_values_that_do_not_vary_become_zero() -> None:
    values, mask = torch.full((4, 5), 0.1), torch.ones(4, 5)
    assert whiten(values, mask, *mean_var(moments(values, mask))).abs().max().item() < 1e-3


def test_no_token_at_all() -> None:
    values, mask = torch.full((2, 3), NAN), torch.zeros(2, 3)
    assert masked_sum(values, mask).item() == 0
    assert moments(values, mask).tolist() == [0, 0, 0]
    assert whiten(values, mask, *mean_var(moments(values, mask))).eq(0).all()
    assert moments(values[:0], mask[:0]).tolist() == [0, 0, 0]


def test_types() -> None:
    values, mask = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3)
    assert moments(values, mask).dtype == torch.float64
    assert masked_sum(torch.ones(1, 1001, dtype=torch.bfloat16), torch.ones(1, 1001)).item() == 1001  # bf16 holds 1000
    assert whiten(values, mask, *mean_var(moments(values, mask))).dtype == torch.bfloat16
