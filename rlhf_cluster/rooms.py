"""What the PPO loop may ask of a room: five Protocols, kept by the in-process fakes of the tests and by the real
rooms alike.

The calling convention: methods are `async`; whoever implements them owns its waits, each with a deadline. A call that
changes something carries its `step` or `version`, and repeating one that was applied returns the stored answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rlhf_cluster.records import Controls, Members, RefLogprobs, Rollouts, ScoredRollouts, Scores, UpdateStats


class Generation(Protocol):
    """The pool of generation workers: samples from the policy."""

    def sample(self, members: Members) -> AsyncIterator[Rollouts]:
        """Samples one response per member; yields small tables as responses end, in no promised order."""
        ...

    async def receive(self, version: int) -> Mapping[str, float]:
        """Loads the published weights of `version`; returns when every serving worker samples from them, with the
        metrics of it (`sync/`)."""
        ...


class RewardModel(Protocol):
    """The pool of scorers: a reward model, a function, a server; one scalar per response."""

    async def score(self, rollouts: Rollouts) -> Scores:
        """A row for every rollout, scored or failed."""
        ...


class Reference(Protocol):
    """The frozen policy that the KL penalty is measured from."""

    async def logprobs(self, rollouts: Rollouts) -> RefLogprobs: ...


class Learner(Protocol):
    """Policy and critic. Collectives happen only inside `add`, `update`, `publish`, `load` and `save`."""

    async def begin(self, step: int, sample_ids: Sequence[str]) -> None:
        """Opens the batch `step` with its members, which fixes the minibatches."""
        ...

    async def add(self, step: int, rows: ScoredRollouts) -> None:
        """Takes rows of the open batch, in any order, and evaluates them: old logprobs and values."""
        ...

    async def replace(self, step: int, gone: Sequence[str], come: Sequence[str]) -> None:
        """Gives the places of members that will not be trained on to others, in order; where fewer come, the batch runs
        short. Its minibatches stay as many."""
        ...

    async def update(self, step: int, controls: Controls) -> UpdateStats:
        """KL-shaped rewards, advantages, whitening, minibatch updates; the policy becomes version `step + 1`."""
        ...

    async def publish(self, version: int) -> None:
        """Leaves one full snapshot of the policy in the weight store under `version`."""
        ...

    async def load(self, directory: Path, version: int) -> None:
        """Back to what `save` wrote below `directory`, which is `version` from now on; older batches are closed."""
        ...

    async def save(self, directory: Path) -> None:
        """Writes `policy/`, `critic/` and `state/` below `directory`."""
        ...


@dataclass(frozen=True)
class Rooms:
    """The rooms of one PPO run. Without a KL penalty there is no reference: `NoReference` stands in its place."""

    generation: Generation
    reward: RewardModel
    reference: Reference | NoReference
    learner: Learner


class NoReference:
    """The reference of a run whose KL coefficient is 0: nothing is computed, rows stay `ScoredRollouts`."""

    async def logprobs(self, rollouts: Rollouts) -> None:
        return None
