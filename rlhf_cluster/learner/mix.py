"""The pretraining mix of PPO-ptx (InstructGPT eq. 2, C.4): which blocks of text belong to which optimizer step.

A pure function of the step, so a resumed run goes on exactly. Blocks are reshuffled whenever all were seen.
"""

from __future__ import annotations

import numpy as np

from rlhf_cluster.data.seeded import EndlessOrder
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.records import Pretraining


class PretrainingMix:
    """`ratio` blocks for each of the `minibatch_size` responses of an optimizer step, dealt out over the ranks."""

    def __init__(self, blocks: Pretraining, ratio: int, minibatch_size: int, seed: int) -> None:
        self._blocks = blocks.token_ids
        self._count = ratio * minibatch_size
        self._order = EndlessOrder([str(index) for index in range(len(blocks))], seed, "pretraining")

    def share(self, number: int, ranks: Ranks) -> list[np.ndarray]:
        """This rank's blocks of optimizer step `number`, counted from 0 over the whole run."""
        positions = range(number * self._count + ranks.rank, (number + 1) * self._count, ranks.world)
        return [self._blocks[self._order[position]] for position in positions]
