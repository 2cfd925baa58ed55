"""Which prompts make up the batch of a step, as a pure function of the step: a resumed run goes on exactly.

Takes `Prompts`, gives `Members` (a batch's members are fixed at admission). Keeps no state and draws no random number:
the order of an epoch and every sampling seed are hashes of names.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import pyarrow as pa

from rlhf_cluster.data.rows import DataError, Place
from rlhf_cluster.data.seeded import EndlessOrder, stable_seed
from rlhf_cluster.records import Members, Prompts

NONE: AbstractSet[str] = frozenset()


class PromptOrder:
    """An endless order of the prompts, reshuffled in every epoch; an epoch has each prompt exactly once."""

    def __init__(self, prompts: Prompts, seed: int) -> None:
        if not len(prompts):
            raise DataError(Place("prompts"), "no prompts to make batches of")
        self._prompts = prompts
        self._seed = seed
        self._order = EndlessOrder(prompts.prompt_id, seed, "epoch")

    def members(self, step: int, batch_size: int, samples_per_prompt: int) -> Members:
        """The `batch_size` responses to sample in `step` (from 0): P = batch_size / samples_per_prompt prompts, the
        i-th of them at position `step * P + i` of the order, its samples side by side.

        Raises DataError where `samples_per_prompt` does not divide `batch_size`.
        """
        if samples_per_prompt < 1 or batch_size < 1 or batch_size % samples_per_prompt:
            detail = f"samples_per_prompt={samples_per_prompt} does not divide batch_size={batch_size}"
            raise DataError(Place("config"), "bad batch", detail)
        count = batch_size // samples_per_prompt
        rows = [self._order[position] for position in range(step * count, (step + 1) * count)]
        return _members(self._prompts, rows, step, samples_per_prompt, self._seed)

    def refill(
        self, step: int, attempt: int, count: int, samples_per_prompt: int, taken: AbstractSet[str] = NONE
    ) -> Members:
        """`count` prompts more for the batch of `step`, in the places of some that cannot be trained on; `attempt` is
        the how manieth refill it is. From an order of their own, so what the other steps get does not change. Prompts
        that were `taken` come again only where there are no others."""
        ids = self._prompts.prompt_id
        order = EndlessOrder(ids, self._seed, "refill", step, attempt)
        fresh = (row for row in map(order.__getitem__, range(len(ids))) if ids[row] not in taken)
        rows = list(itertools.islice(fresh, count))
        rows += [order[position] for position in range(count - len(rows))]
        return _members(self._prompts, rows, step, samples_per_prompt, self._seed, f"{step}+{attempt + 1}")


def heldout_members(prompts: Prompts, label_step: int, samples_per_prompt: int, seed: int) -> Members:
    """Every prompt, `samples_per_prompt` times, in the order given. `label_step` marks the evaluation (below 0 it meets
    no training step); the same label gives the same seeds, so before and after are sampled alike."""
    return _members(prompts, range(len(prompts)), label_step, samples_per_prompt, seed)


def _members(
    prompts: Prompts, rows: Sequence[int], step: int, samples_per_prompt: int, seed: int, label: str = ""
) -> Members:
    """`label` begins the sample ids and is what seeds are made from; the step where none is given."""
    label = label or str(step)
    ids = prompts.prompt_id
    index = _sample_indices([ids[row] for row in rows], samples_per_prompt)
    picked = prompts.table.take(pa.array(np.repeat(np.asarray(rows, dtype=np.int64), samples_per_prompt)))
    names = picked.column("prompt_id").to_pylist()
    samples = list(zip(names, index, strict=True))
    columns = {
        "step": [step] * len(samples),
        "sample_index": index,
        "sample_id": [f"{label}/{name}/{sample}" for name, sample in samples],
        "seed": [stable_seed(seed, label, name, sample) for name, sample in samples],
    }
    for name, values in columns.items():
        picked = picked.append_column(name, pa.array(values, Members.COLUMNS[name].type))
    return Members(picked)


def _sample_indices(ids: Sequence[str], samples_per_prompt: int) -> list[int]:
    """Counts on where a prompt comes again in the batch (few prompts, or the seam of two epochs): ids stay unique."""
    seen: Counter[str] = Counter()
    indices: list[int] = []
    for name in ids:
        indices.extend(range(seen[name], seen[name] + samples_per_prompt))
        seen[name] += samples_per_prompt
    return indices
