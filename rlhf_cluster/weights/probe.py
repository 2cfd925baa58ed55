"""A response that the learner and an engine both say their logprobs of, to see that they compute with the same weights:
digests say that bytes arrived, and that engines hold alike; this says that what is held is the policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Probe:
    """At temperature 1; one logprob for each response token."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def distance(self, logprobs: list[float]) -> float:
        """The mean absolute difference of an engine's logprobs of the response from the learner's, in nats."""
        return float(np.abs(np.array(logprobs) - np.array(self.logprobs)).mean())
