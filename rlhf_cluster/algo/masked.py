"""Sums, means and whitening over the real tokens of right-padded tensors.

Takes values and a mask of the same shape (1 on real response tokens), gives sums that padding cannot reach, not even by
a NaN. Statistics travel as additive moments, so that ranks can add theirs up: this module knows nothing of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8  # inside the square root, as in lm-human-preferences


def at_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where the mask is set, 0 elsewhere, same shape. Selects, for NaN times 0 is NaN."""
    return torch.where(mask.bool(), values, torch.zeros_like(values))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over real tokens.

        sum_{b,t} mask_{bt} * values_{bt}

    Any shape, both alike. Returns a scalar, at least float32; 0 where there is no token.
    """
    return at_tokens(values, mask).sum(dtype=torch.promote_types(values.dtype, torch.float32))


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """The additive statistics of real tokens: float64 [3].

        (sum mask,  sum mask * values,  sum mask * values^2)

    Adding the moments of any split of the rows gives the moments of the whole, up to float64 rounding: an all-reduce
    with SUM makes them those of all ranks, and what is whitened by them does not depend on the number of ranks.
    """
    real = at_tokens(values.detach(), mask).double()
    return torch.stack([mask.bool().sum().double(), real.sum(), real.square().sum()])


def mean_var(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of `moments`, float64 scalars; both 0 where there was no token.

        mean = S1 / n        var = S2 / n - mean^2

    Biased, as `tf.nn.moments` is in lm-human-preferences (Ziegler et al. 2019, arXiv:1909.08593).
    """
    count, total, squares = moments.unbind()
    count = count.clamp(min=1.0)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0.0)


def whiten(values: Tensor, mask: Tensor, mean: Tensor, var: Tensor, shift_mean: bool = True) -> Tensor:
    """Scales real tokens to variance 1, and with `shift_mean` to mean 0 (Ziegler et al. 2019, their code's `whiten`).

        (values - mean) / sqrt(var + 1e-8)        [+ mean where the mean is kept]

    The statistics are arguments, for they are those of the whole batch over all ranks (`moments`, `mean_var`).
    Any shape, values and mask alike; returns that shape and dtype, 0 where the mask is 0.
    """
    whitened = (values - mean) * torch.rsqrt(var + EPS)
    return at_tokens(whitened if shift_mean else whitened + mean, mask).to(values.dtype)
