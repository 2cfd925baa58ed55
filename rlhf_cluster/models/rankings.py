"""Learning from rankings, which the reward model and DPO share: in what order prompts come, micro-batches that keep the
responses to a prompt together (a loss compares them with each other), and sums over all ranks.

What a sequence is given - a score, a log-probability - and what is made of a ranking is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_cluster.algo.losses import RankingLoss
from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.models.batching import PackedBatch, filled_up, in_order, micro_batches, singles
from rlhf_cluster.models.load import compute_device
from rlhf_cluster.records import Comparisons


@dataclass(frozen=True, eq=False)
class RankedRows:
    """One prompt's K responses in a micro-batch."""

    prompt: int  # row of the prompt in the comparisons
    rows: torch.Tensor  # i64 [K]: which sequence of the batch each response is
    ranks: torch.Tensor  # i64 [K], 1 the best


def prompt_batches(count: int, batch_size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """The prompts of each optimizer step, reshuffled in every epoch, the same on all ranks."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        yield from np.split(order, range(batch_size, count, batch_size))


def accumulate(
    engine: TrainEngine,
    comparisons: Comparisons,
    prompts: np.ndarray,
    tokens_per_micro_batch: int,
    of_sequences: Callable[[PackedBatch], torch.Tensor],  # [S], with gradient
    loss_of: Callable[[torch.Tensor, RankedRows], RankingLoss],
) -> list[float]:
    """The gradient of the mean loss over `prompts`; `tally` of their losses, summed over all ranks. A collective."""
    ranks, device = engine.ranks, compute_device()
    own = list(whole_prompts(comparisons, prompts[ranks.rank :: ranks.world], tokens_per_micro_batch, device))
    sums = torch.zeros(4, dtype=torch.float64)
    for index, batch in enumerate(filled_up([batch for batch, _ in own], int(ranks.max(len(own))))):
        found = of_sequences(batch.to(device))
        losses = [loss_of(found, ranked) for ranked in (own[index][1] if index < len(own) else [])]
        loss = torch.stack([one.loss for one in losses]).sum() if losses else 0.0 * found.sum()
        engine.backward(loss / len(prompts))
        for one in losses:
            sums += tally(one)
    return ranks.sum(sums).tolist()


def tally(loss: RankingLoss) -> torch.Tensor:
    """(loss, pairs, correct pairs, margins) of one prompt, f64 [4], to be added up."""
    return torch.stack([loss.loss.detach(), loss.pairs, loss.correct_pairs, loss.margin_sum]).double().cpu()


def means(sums: Sequence[float], prompts: int, prefix: str) -> dict[str, float]:
    """The metrics of summed tallies: loss by prompt, accuracy and margin by pair."""
    loss, pairs, correct, margin = sums
    pairs = max(pairs, 1.0)
    return {f"{prefix}loss": loss / prompts, f"{prefix}accuracy": correct / pairs, f"{prefix}margin": margin / pairs}


@torch.no_grad()
def of_all_sequences(
    ranks: Ranks,
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    tokens_per_micro_batch: int,
    of_sequences: Callable[[PackedBatch], torch.Tensor],
) -> np.ndarray:
    """A number for each sequence, f64 [n], on every rank: each computes a share. A collective."""
    mine = range(ranks.rank, len(prompts), ranks.world)
    own = micro_batches(
        [prompts[i] for i in mine], [responses[i] for i in mine], singles(len(mine)), tokens_per_micro_batch
    )
    batches = filled_up(own, int(ranks.max(len(own))))
    parts = [list(of_sequences(batch.to(compute_device())).float().cpu().numpy()) for batch in batches]
    found = np.zeros(len(prompts))
    for rank, share in enumerate(ranks.gather(in_order(batches, parts, len(mine)))):
        found[rank :: ranks.world] = share
    return found


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
