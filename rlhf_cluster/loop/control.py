"""What the driver carries from one iteration to the next: the KL coefficients, and what scores are normalised by.

It watches each batch, gives the `Controls` of its update, and is saved with every checkpoint as plain numbers. It knows
neither rooms nor configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

from rlhf_cluster.algo.kl import AdaptiveKL, FixedKL
from rlhf_cluster.algo.rewards import ScoreMoments
from rlhf_cluster.records import Controls

KLCoefficient = FixedKL | AdaptiveKL


class Control:
    """`before` an update and `after` it, once per batch and in order. `kl` is the coefficient of the penalty in the
    rewards, `kl_loss` that of the term in the loss; one of them at most steers itself."""

    def __init__(self, kl: KLCoefficient, kl_loss: KLCoefficient, normalise_scores: bool) -> None:
        self._kl, self._kl_loss, self._normalise = kl, kl_loss, normalise_scores
        self._scores = ScoreMoments()

    def before(self, scores: np.ndarray, learn: bool = True) -> Controls:
        """scores [B] of the batch that the update is for; they count among those that they are normalised by."""
        self._scores.tell(scores)
        mean, std = (self._scores.mean, self._scores.std) if self._normalise else (0.0, 1.0)
        return Controls(self._kl.coef, self._kl_loss.coef, mean, std, learn)

    def after(self, kl: float, responses: int) -> None:
        """`kl` in nats per response, the mean over the batch."""
        for coefficient in (self._kl, self._kl_loss):
            coefficient.update(kl, responses)

    def state(self) -> dict[str, float]:
        """All that `restore` needs."""
        return {"kl_coef": self._kl.coef, "kl_loss_coef": self._kl_loss.coef, **asdict(self._scores)}

    def restore(self, state: Mapping[str, float]) -> None:
        """Goes on where `state` was taken. A fixed coefficient stays the one that it was made with."""
        for coefficient, name in ((self._kl, "kl_coef"), (self._kl_loss, "kl_loss_coef")):
            if isinstance(coefficient, AdaptiveKL):
                coefficient.coef = state[name]
        self._scores = ScoreMoments(state["count"], state["mean"], state["squares"])
