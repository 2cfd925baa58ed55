"""An exponential moving average of a model's fp32 masters, kept in the shares that ranks hold of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rlhf_cluster.engine.engine import TrainEngine


class WeightAverage:
    """The average of an engine's weights over its optimizer steps (InstructGPT C.4: decay 0.992).

        average <- decay * average + (1 - decay) * weights

    It begins as the weights themselves. Each rank averages the masters that it holds, so no step gathers anything.
    """

    def __init__(self, engine: TrainEngine, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self._average = [master.clone() for master in engine.local_masters()]

    def update(self) -> None:
        """After an optimizer step."""
        torch._foreach_lerp_(self._average, self._engine.local_masters(), 1 - self._decay)

    def full(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full fp32 average) of every parameter, one at a time. A collective."""
        with self._in_place():
            yield from self._engine.full_masters()

    def load_full(self, average_of: Callable[[str], torch.Tensor]) -> None:
        """Restores what `full` gave. The engine's own weights are changed too: load them after."""
        self._engine.load_full_masters(average_of)
        for average, master in zip(self._average, self._engine.local_masters(), strict=True):
            average.copy_(master)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """For the length of the block the engine's masters are the average (its working copy stays what it is)."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def weights_on_rank_0(self) -> dict[str, torch.Tensor]:
        """The average by parameter name, fp32 in host memory on rank 0, nothing on the others. A collective."""
        rank = self._engine.ranks.rank
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.full() if rank == 0}

    def _swap(self) -> None:
        for average, master in zip(self._average, self._engine.local_masters(), strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
