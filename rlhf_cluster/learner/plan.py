"""Which rows make which minibatch, decided when a batch opens, from its members alone, and on which rank each row
lives, decided as rows come, from their lengths.

So neither the order in which rows arrive nor the number of ranks changes what an optimizer step sees, and ranks are
done with it at about the same time however lengths are spread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlhf_cluster.records import Rollouts


@dataclass(frozen=True)
class BatchPlan:
    """`minibatches[m]` are the sample ids of minibatch m."""

    minibatches: list[list[str]]

    @cached_property
    def places(self) -> dict[str, int]:
        """Every member's minibatch."""
        return {sample_id: number for number, minibatch in enumerate(self.minibatches) for sample_id in minibatch}

    def replaced(self, gone: Sequence[str], come: Sequence[str]) -> BatchPlan:
        """The plan with the members of `gone` out of it and those of `come` in their places, in order. Members that are
        out already are passed over."""
        members = self.places
        leaving = [sample_id for sample_id in gone if sample_id in members]
        successors: dict[str, str | None] = dict.fromkeys(leaving) | dict(zip(leaving, come, strict=False))
        return BatchPlan(
            [
                [one for one in (successors.get(i, i) for i in minibatch) if one is not None]
                for minibatch in self.minibatches
            ]
        )

    def orders(self, epochs: int, seed: int) -> list[list[int]]:
        """For each epoch, the order of the minibatches; as planned in the first, shuffled in the later ones."""
        rng = np.random.default_rng([seed, 1])
        first = list(range(len(self.minibatches)))
        return [first] + [rng.permutation(len(first)).tolist() for _ in range(epochs - 1)]


def plan_batch(sample_ids: Sequence[str], minibatch_size: int, seed: int) -> BatchPlan:
    """Sorts the ids, permutes them once by `seed` and cuts minibatches."""
    ordered = sorted(sample_ids)
    shuffled = [ordered[i] for i in np.random.default_rng([seed, 0]).permutation(len(ordered))]
    return BatchPlan([shuffled[i : i + minibatch_size] for i in range(0, len(shuffled), minibatch_size)])


class Deal:
    """Of one batch's rows to ranks. Of each minibatch whoever has the fewest tokens so far is given the longest that
    came; responses to one prompt stay together, since a rank then computes it once, as far as that leaves no rank
    without its share of rows."""

    def __init__(self, places: Mapping[str, int], ranks: int) -> None:
        self.places = places
        self._tokens: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(ranks, np.int64))
        sizes = np.bincount(list(places.values()), minlength=1)
        self._most = max(1, int(sizes.max()) // ranks)  # rows of a prompt that stay together

    def owners(self, rows: Rollouts) -> np.ndarray:
        """The rank of each row, i64 [B]."""
        owners = np.zeros(len(rows), np.int64)
        together: dict[tuple[int, str], list[int]] = defaultdict(list)
        for row, (sample_id, prompt) in enumerate(zip(rows.sample_id, rows.prompt_id, strict=True)):
            together[self.places[sample_id], prompt].append(row)
        prompts, responses = rows.prompt_ids, rows.response_ids
        pieces = [
            (place, group[start : start + self._most])
            for (place, _), group in together.items()
            for start in range(0, len(group), self._most)
        ]
        sizes = [len(prompts[piece[0]]) + sum(len(responses[row]) for row in piece) for _, piece in pieces]
        for index in sorted(range(len(pieces)), key=lambda index: (-sizes[index], index)):
            place, piece = pieces[index]
            rank = int(self._tokens[place].argmin())
            self._tokens[place][rank] += sizes[index]
            owners[piece] = rank
        return owners
