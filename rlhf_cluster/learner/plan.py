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

    def replaced(self, gone: Sequence[str], come: Sequence[str]) -> BatchPlan:
        """The plan with the members of `gone` out of it and those of `come` in their places, in order. Members that are
        out already are passed over."""
        places = [sample_id for sample_id in gone if sample_id in self.owners]
        successors = dict(zip(places, come, strict=False))
        leaving = set(places)
        minibatches = [
            [successors.get(i, i) for i in minibatch if i not in leaving or i in successors]
            for minibatch in self.minibatches
        ]
        owners = {successors.get(i, i): rank for i, rank in self.owners.items() if i not in leaving or i in successors}
        return BatchPlan(minibatches, owners)

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
