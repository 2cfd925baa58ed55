"""Which rows make which minibatch, and on which rank each row lives: decided when a batch opens, from its members
alone.

So neither the order in which rows arrive nor the number of ranks changes what an optimizer step sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BatchPlan:
    """`minibatches[m]` are the sample ids of minibatch m; `owners` says which rank holds a sample."""

    minibatches: list[list[str]]
    owners: dict[str, int]

    def orders(self, epochs: int, seed: int) -> list[list[int]]:
        """For each epoch, the order of the minibatches; as planned in the first, shuffled in the later ones."""
        rng = np.random.default_rng([seed, 1])
        first = list(range(len(self.minibatches)))
        return [first] + [rng.permutation(len(first)).tolist() for _ in range(epochs - 1)]


def plan_batch(sample_ids: Sequence[str], minibatch_size: int, world: int, seed: int) -> BatchPlan:
    """Sorts the ids, permutes them once by `seed`, cuts minibatches, and deals each minibatch out over the ranks."""
    ordered = sorted(sample_ids)
    shuffled = [ordered[i] for i in np.random.default_rng([seed, 0]).permutation(len(ordered))]
    minibatches = [shuffled[i : i + minibatch_size] for i in range(0, len(shuffled), minibatch_size)]
    owners = {sample_id: place % world for minibatch in minibatches for place, sample_id in enumerate(minibatch)}
    return BatchPlan(minibatches, owners)
