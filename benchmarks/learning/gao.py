"""How far a gold score follows its proxy: the forms of Gao et al. 2022 (arXiv:2210.10760), and best-of-n.

With d = sqrt(KL) from the policy before: R_RL(d) = d (a - b log d) for reinforcement learning, R_bon(d) = d (a - b d)
for best-of-n; R is the gain in gold score over d = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Fit:
    """R(d) = d (a - b g(d)) with g = log for "rl" and g = identity for "bon"."""

    form: Literal["rl", "bon"]
    a: float
    b: float
    r_squared: float

    def __call__(self, distance: ArrayLike) -> NDArray[np.float64]:
        """The gain at each distance d > 0."""
        d = np.asarray(distance, float)
        return d * (self.a - self.b * _growth(self.form, d))

    @property
    def peak(self) -> float:
        """The d where the gold score is highest; infinite where it never falls."""
        if self.b <= 0:
            return float("inf")
        return float(np.exp(self.a / self.b - 1)) if self.form == "rl" else self.a / (2 * self.b)


def _growth(form: str, d: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(d) if form == "rl" else d


def fit(form: Literal["rl", "bon"], distance: ArrayLike, gain: ArrayLike) -> Fit:
    """Least squares in a and b, over points with d > 0."""
    d, r = np.asarray(distance, float), np.asarray(gain, float)
    d, r = d[d > 0], r[d > 0]
    design = np.stack([d, -d * _growth(form, d)], axis=1)
    (a, b), *_ = np.linalg.lstsq(design, r, rcond=None)
    left = float(((r - design @ np.array([a, b])) ** 2).sum())
    return Fit(form, float(a), float(b), 1 - left / float(((r - r.mean()) ** 2).sum()))


def best_of_n(proxy: ArrayLike, value: ArrayLike, n: int) -> float:
    """The mean `value` of the response that `proxy` likes best among n, both [prompts, N >= n].

    Over all subsets of n, not over some draws: the i-th worst of N (from 1) is the best of C(i - 1, n - 1) of the
    C(N, n) subsets (Nakano et al. 2021, arXiv:2112.09332, section 3.2; Gao et al., section 3.1).
    """
    order = np.argsort(np.asarray(proxy, float), axis=1, kind="stable")
    total = order.shape[1]
    share = [math.comb(rank - 1, n - 1) / math.comb(total, n) for rank in range(n, total + 1)]
    best = np.take_along_axis(np.asarray(value, float), order, axis=1)[:, n - 1 :]
    return float((best @ share).mean())


def kl_of_best_of_n(n: int) -> float:
    """log n - (n - 1) / n nats: an upper bound that is near where ties are rare (Gao et al., section 2)."""
    return float(np.log(n) - (n - 1) / n)
