"""An optimizer step of policy or critic, within its guardrail."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_cluster.config import GuardrailsConfig
from rlhf_cluster.engine.engine import NEVER, TrainEngine
from rlhf_cluster.learner.statistics import Tally


@dataclass(frozen=True)
class Step:
    """The gradient norm before clipping, and whether the optimizer's step was taken."""

    norm: float
    taken: bool

    def tally(self, tally: Tally, model: str) -> None:
        """A norm that is not finite counts as such alone: no mean has room for it."""
        finite = math.isfinite(self.norm)
        if finite:
            tally.mean(f"{model}/grad_norm", self.norm, 1)
            tally.top(f"{model}/grad_norm_max", self.norm)
        tally.mean(f"{model}/not_finite", float(not finite), 1)
        tally.mean(f"{model}/steps_skipped", float(not self.taken), 1)


def guarded_step(
    engine: TrainEngine, rate: float, guardrails: GuardrailsConfig, scale: float = 1.0, withheld: bool = False
) -> Step:
    """An optimizer step on the gradient times `scale`, that a gradient beyond its rail does not make, or one that is to
    be `withheld`, and one that is not finite never does. A collective."""
    limit = NEVER if withheld else guardrails.grad_norm.most
    norm = engine.step_within(rate, limit, scale)
    return Step(norm, norm <= limit and math.isfinite(norm))
