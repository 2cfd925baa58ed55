"""Learning from rankings, which the reward model and DPO share: in what order prompts come, micro-batches that keep the
responses to a prompt together (a loss compares them with each other), and sums over all ranks.

What a sequence is given - a score, a log-probability - and what is made of a ranking is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf_cluster.algo.losses import RankingLoss
from rlhf_cluster.config import DPOConfig, ModelConfig, RMConfig
from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.models.batching import NOBODY, Layout, PackedBatch, filled_up
from rlhf_cluster.models.forward import attends_to_all
from rlhf_cluster.models.load import compute_device
from rlhf_cluster.records import Comparisons


@dataclass(frozen=True, eq=False)
class RankedRows:
    """One prompt's K responses in a micro-batch."""

    prompt: int  # row of the prompt in the comparisons
    rows: torch.Tensor  # i64 [K]: which sequence of the batch each response is
    ranks: torch.Tensor  # i64 [K], 1 the best


def layout_of(cfg: RMConfig | DPOConfig, model: ModelConfig, network: PreTrainedModel) -> Layout:
    """A prompt is shared where that is configured and `network` can be told what a response may see."""
    shares = cfg.share_prompts and attends_to_all(network)
    return Layout(cfg.engine.tokens_per_micro_batch, model.context if shares else 0)


def prompt_batches(count: int, batch_size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """The prompts of each optimizer step, reshuffled in every epoch, the same on all ranks."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        yield from np.split(order, range(batch_size, count, batch_size))


def accumulate(
    engine: TrainEngine,
    comparisons: Comparisons,
    prompts: np.ndarray,
    layout: Layout,
    of_sequences: Callable[[PackedBatch], torch.Tensor],  # [S], with gradient
    loss_of: Callable[[torch.Tensor, RankedRows], RankingLoss],
) -> list[float]:
    """The gradient of the mean loss over `prompts`; `tally` of their losses, summed over all ranks. A collective."""
    ranks, device = engine.ranks, compute_device()
    own = list(whole_prompts(comparisons, prompts[ranks.rank :: ranks.world], layout, device))
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
    layout: Layout,
    of_sequences: Callable[[PackedBatch], torch.Tensor],
) -> np.ndarray:
    """A number for each sequence, f64 [n], on every rank: each computes those of a share of the rows. A collective."""
    rows = layout.rows(prompts, responses)
    own = layout.batches(prompts, responses, rows[ranks.rank :: ranks.world])
    batches = filled_up(own, int(ranks.max(len(own))))
    found = np.zeros(len(prompts))
    for batch in batches:
        mine = batch.sequences != NOBODY
        found[batch.sequences[mine]] = of_sequences(batch.to(compute_device())).double().cpu().numpy()[mine]
    return ranks.sum(torch.from_numpy(found)).numpy()


def whole_prompts(
    comparisons: Comparisons, prompts: Sequence[int] | np.ndarray, layout: Layout, device: str
) -> Iterator[tuple[PackedBatch, list[RankedRows]]]:
    """Micro-batches of `prompts` that never part a prompt's responses, of at most so many padded tokens, where one
    prompt alone has not more."""
    laid = [Laid.out(comparisons, int(i), layout) for i in prompts]
    pending: list[Laid] = []
    for one in sorted(laid, key=lambda one: -one.width):
        rows = sum(len(own.rows) for own in [*pending, one])
        if pending and rows * pending[0].width > layout.tokens_per_micro_batch:
            yield _batch(comparisons, pending, layout, device)
            pending = []
        pending.append(one)
    if pending:
        yield _batch(comparisons, pending, layout, device)


@dataclass(frozen=True)
class Laid:
    """A prompt's responses in rows."""

    prompt: int
    rows: list[list[int]]  # of its responses, counted from 0
    width: int  # tokens of the longest row

    @classmethod
    def out(cls, comparisons: Comparisons, prompt: int, layout: Layout) -> Laid:
        own, responses = comparisons.prompt_ids[prompt], comparisons.responses[prompt]
        rows = layout.rows([own] * len(responses), responses)
        return cls(prompt, rows, len(own) + max(sum(len(responses[k]) for k in row) for row in rows))


def _batch(
    comparisons: Comparisons, laid: Sequence[Laid], layout: Layout, device: str
) -> tuple[PackedBatch, list[RankedRows]]:
    responses = [response for one in laid for response in comparisons.responses[one.prompt]]
    sizes = [len(comparisons.responses[one.prompt]) for one in laid]
    repeated = [comparisons.prompt_ids[one.prompt] for one, size in zip(laid, sizes, strict=True) for _ in range(size)]
    firsts = np.cumsum(sizes) - sizes
    rows = [[first + k for k in row] for first, one in zip(firsts, laid, strict=True) for row in one.rows]
    (batch,) = replace(layout, tokens_per_micro_batch=1 << 60).batches(repeated, responses, rows)
    places = np.split(np.argsort(batch.sequences), firsts[1:])  # where a response stands in the batch
    return batch.to(device), [
        RankedRows(
            one.prompt,
            torch.from_numpy(own).to(device),
            torch.tensor(comparisons.ranks[one.prompt].tolist(), device=device),
        )
        for one, own in zip(laid, places, strict=True)
    ]
