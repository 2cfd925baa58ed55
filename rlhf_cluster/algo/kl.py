"""How far the policy is from the reference: per-token estimators of the KL divergence, and who sets its coefficient.

Takes logprobs of the same sampled tokens under both; gives estimates of the same shape. The coefficient belongs to an
object with `coef` and `update(kl, batch_size)`, so that the loop never asks which kind it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The plain estimator of KL(policy || reference), per token (Schulman 2020, "Approximating KL Divergence").

        logr = log ref - log pol        k1 = -logr

    Unbiased, high variance, may be negative. This is the one that the reward uses. Any shape, both alike.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The squared estimator, per token (Schulman 2020).

        k2 = logr^2 / 2

    Biased, low variance, never negative. For watching. Any shape, both alike.
    """
    return 0.5 * (ref_logprobs - logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The estimator with a control variate, per token (Schulman 2020).

        k3 = (r - 1) - log r,  r = ref / pol

    Unbiased, low variance, never negative. For watching, or as a loss. Any shape, both alike.
    """
    logr = ref_logprobs - logprobs
    # expm1 keeps the digits that r - 1 loses where the two policies nearly agree.
    return torch.expm1(logr) - logr


@dataclass(frozen=True)
class FixedKL:
    """A coefficient that stays what it is: beta of InstructGPT eq. (2) (Ouyang et al. 2022, arXiv:2203.02155, C.4)."""

    coef: float

    def __post_init__(self) -> None:
        if not (self.coef >= 0 and math.isfinite(self.coef)):
            raise ValueError(f"KL coefficient {self.coef}; it must be a finite number of at least 0")

    def update(self, kl: float, batch_size: int) -> None:
        """Told after a batch of `batch_size` responses; `kl` is the mean over them of k1 summed over tokens."""
