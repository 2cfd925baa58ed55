"""Micro-batches of rankings: the responses to a prompt stay together, since a loss compares them with each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_cluster.models.batching import PackedBatch, micro_batches, singles
from rlhf_cluster.records import Comparisons


@dataclass(frozen=True, eq=False)
class RankedRows:
    """One prompt's K responses in a micro-batch."""

    prompt: int  # row of the prompt in the comparisons
    rows: torch.Tensor  # i64 [K]: which sequence of the batch each response is
    ranks: torch.Tensor  # i64 [K], 1 the best


def whole_prompts(
    comparisons: Comparisons, prompts: Sequence[int] | np.ndarray, tokens_per_micro_batch: int, device: str
) -> Iterator[tuple[PackedBatch, list[RankedRows]]]:
    """Micro-batches of `prompts` that never part a prompt's responses, of at most so many padded tokens, where one
    prompt alone has not more."""
    all_prompts, all_responses = comparisons.prompt_ids, comparisons.responses
    widths = {int(i): len(all_prompts[i]) + max(map(len, all_responses[i])) for i in prompts}
    pending: list[int] = []
    rows = widest = 0
    for prompt in sorted(widths, key=lambda prompt: -widths[prompt]):
        responses = len(all_responses[prompt])
        if pending and (rows + responses) * widest > tokens_per_micro_batch:
            yield _batch(comparisons, pending, device)
            pending, rows = [], 0
        widest = widths[prompt] if not pending else widest
        pending.append(prompt)
        rows += responses
    if pending:
        yield _batch(comparisons, pending, device)


def _batch(comparisons: Comparisons, prompts: Sequence[int], device: str) -> tuple[PackedBatch, list[RankedRows]]:
    ranked = [comparisons.responses[i] for i in prompts]
    repeated = [comparisons.prompt_ids[i] for i, responses in zip(prompts, ranked, strict=True) for _ in responses]
    responses = [response for own in ranked for response in own]
    (batch,) = micro_batches(repeated, responses, singles(len(responses)), 1 << 60)
    place = np.argsort(batch.sequences)  # where a sequence stands in the batch, which is sorted by length
    rows = np.split(place, np.cumsum([len(own) for own in ranked])[:-1])
    return batch.to(device), [
        RankedRows(i, torch.from_numpy(own).to(device), torch.tensor(comparisons.ranks[i].tolist(), device=device))
        for i, own in zip(prompts, rows, strict=True)
    ]
