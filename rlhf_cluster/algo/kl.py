"""How far the policy is from the reference: per-token estimators of the KL divergence, and who sets its coefficient.

Takes logprobs of the same sampled tokens under both; gives estimates of the same shape. The coefficient belongs to an
object with `coef` and `update(kl, batch_size)`, so that the loop never asks which kind it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The plain estimator of KL(policy || reference), per token (Schulman 2020, "Approximating KL Divergence").

        logr = log ref - log pol        k1 = -logr

    Unbiased, high variance, may be negative. The one for rewards: the policy gradient of the penalty is then unbiased.
    As a loss it is useless, since its gradient is 0 in expectation. Any shape, both alike.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The squared estimator, per token (Schulman 2020).

        k2 = logr^2 / 2

    Biased, low variance, never negative. For watching, or as a loss: its gradient is that of the KL. Any shape, both
    alike.
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


ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


@dataclass(frozen=True)
class FixedKL:
    """A coefficient that stays what it is: beta of InstructGPT eq. (2) (Ouyang et al. 2022, arXiv:2203.02155, C.4)."""

    coef: float

    def __post_init__(self) -> None:
        if not (self.coef >= 0 and math.isfinite(self.coef)):
            raise ValueError(f"KL coefficient {self.coef}; it must be a finite number of at least 0")

    def update(self, kl: float, batch_size: int) -> None:
        """Told after a batch of `batch_size` responses; `kl` is the mean over them of k1 summed over tokens."""


@dataclass
class AdaptiveKL:
    """A coefficient that steers towards a KL (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

        e = clip(KL / target - 1, -0.2, 0.2)        beta <- beta * (1 + e * n / horizon)

    `target` in nats per response; `horizon` is the number of responses over which an error of 1 would correct itself.
    """

    coef: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        for name, value in (("KL coefficient", self.coef), ("KL target", self.target), ("KL horizon", self.horizon)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"adaptive {name} {value}; it must be a finite number above 0, or it could never move")

    def update(self, kl: float, batch_size: int) -> None:
        """Told after a batch of `batch_size` responses; `kl` is the mean over them of k1 summed over tokens. A KL that
        is not finite says nothing: the coefficient stays."""
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * batch_size / self.horizon
