"""What the driver carries from one iteration to the next: the KL coefficient, and what scores are normalised by.

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


class Control:
    """`before` an update and `after` it, once per batch and in order."""

    def __init__(self, kl: FixedKL | AdaptiveKL, normalise_scores: bool) -> None:
        self._kl, self._normalise = kl, normalise_scores
        self._scores = ScoreMoments()

    def before(self, scores: np.ndarray, learn: bool = True) -> Controls:
        """scores [B] of the batch that the update is for; they count among those that they are normalised by."""
        self._scores.tell(scores)
        if not self._normalise:
            return Controls(self._kl.coef, learn=learn)
        return Controls(self._kl.coef, self._scores.mean, self._scores.std, learn)

    def after(self, kl: float, responses: int) -> None:
        """`kl` in nats per response, the mean over the batch."""
        self._kl.update(kl, responses)

    def state(self) -> dict[str, float]:
        """All that `restore` needs."""
        return {"kl_coef": self._kl.coef, **asdict(self._scores)}

    def restore(self, state: Mapping[str, float]) -> None:
        """Goes on where `state` was taken. A fixed coefficient stays the one that it was made with."""
        if isinstance(self._kl, AdaptiveKL):
            self._kl.coef = state["kl_coef"]
        self._scores = ScoreMoments(state["count"], state["mean"], state["squares"])
