"""Stage 1: supervised fine-tuning on demonstrations (InstructGPT section 3.5, C.1).

The loss is on response tokens only, with EOS as a label; a cosine schedule down to a tenth; several demonstrations
share a row, kept apart by their positions. Text may be mixed in, of which every token is a label (C.3): its share is
one of the loss, since a block of text has many more labels than a response. Every rank runs `train`; Ray Train starts
them, DeepSpeed is the engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from rlhf_cluster.algo.logprobs import logprobs_from_logits
from rlhf_cluster.algo.losses import sft_loss
from rlhf_cluster.config import ModelConfig, SFTConfig
from rlhf_cluster.data.seeded import EndlessOrder
from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.engine.schedule import learning_rate
from rlhf_cluster.models.batching import PackedBatch, filled_up, micro_batches, pack, singles
from rlhf_cluster.models.forward import PolicyModule
from rlhf_cluster.models.load import (
    add_residual_dropout,
    compute_device,
    load_policy,
    resolve_attention,
    resolve_dtype,
)
from rlhf_cluster.models.trained import leave_policy
from rlhf_cluster.records import Demonstrations, Pretraining

STAGE = "sft"
Report = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class SFTJob:
    """What every rank needs: the model to start from, the demonstrations, and where the result goes."""

    cfg: SFTConfig
    model: ModelConfig
    seed: int
    base_path: Path
    demonstrations: Demonstrations
    output: Path
    pretraining: Pretraining = field(default_factory=Pretraining.empty)  # mixed in where `pretraining_share` is not 0

    @cached_property
    def sequences(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(prompts, responses): the demonstrations, and after them the blocks of text, of which all but the first token
        is to be said."""
        blocks = self.pretraining.token_ids
        prompts = [*self.demonstrations.prompt_ids, *(block[:1] for block in blocks)]
        return prompts, [*self.demonstrations.response_ids, *(block[1:] for block in blocks)]

    def masks(self, batch: PackedBatch) -> torch.Tensor:
        """Whether a token is a label of a demonstration, or of text; neither of a dummy: f32 [2, N]."""
        own = np.repeat(batch.sequences, batch.response_lengths)
        text = own >= len(self.demonstrations)
        return torch.from_numpy(np.stack([(own >= 0) & ~text, text])).float()

    def rows(self) -> list[list[int]]:
        """Which demonstrations share a row."""
        if not self.cfg.packing:
            return singles(len(self.demonstrations))
        pairs = zip(self.demonstrations.prompt_ids, self.demonstrations.response_ids, strict=True)
        return pack([len(prompt) + len(response) for prompt, response in pairs], self.model.context)

    def steps(self) -> int:
        """Optimizer steps in all."""
        return math.ceil(len(self.rows()) / self.cfg.batch_size) * self.cfg.epochs

    def batches(self) -> Iterator[list[list[int]]]:
        """The rows of each optimizer step, reshuffled in every epoch, the same on all ranks."""
        rows, step, shown = self.rows(), 0, len(self.demonstrations)
        texts = EndlessOrder([*map(str, range(len(self.pretraining)))], self.seed, "pretraining")
        for epoch in range(self.cfg.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(rows))
            for start in range(0, len(rows), self.cfg.batch_size):
                places = range(step * self.cfg.texts_per_step, (step + 1) * self.cfg.texts_per_step)
                mixed_in = [[shown + texts[place]] for place in places]
                yield [rows[i] for i in order[start : start + self.cfg.batch_size]] + mixed_in
                step += 1

    def epoch_output(self, epoch: int) -> Path:
        """Where the policy after `epoch`, counted from 1, waits to be chosen."""
        return self.output.parent / f"epoch-{epoch}"


def train(ranks: Ranks, job: SFTJob, report: Report) -> None:
    """One rank's run; rank 0 reports each step and leaves a plain Hugging Face directory at `job.output`, or one for
    each epoch beside it, of which another is to choose."""
    torch.manual_seed(job.seed + ranks.rank)  # dropout's masks: each rank its own
    dtype = resolve_dtype(job.model.dtype)
    policy = load_policy(job.base_path, None, resolve_attention(job.model.attention))
    if job.cfg.dropout:
        add_residual_dropout(policy, job.cfg.dropout)
    engine = TrainEngine(PolicyModule(policy, logprobs_from_logits), job.cfg.engine, job.cfg.optimizer, dtype, ranks)
    leave = partial(leave_policy, engine, policy.config, job.base_path, job.model.chat_template)
    total = job.steps()
    for step, rows in enumerate(job.batches()):
        began = time.perf_counter()
        losses, tokens = gradient(engine, job, rows)
        rate = learning_rate(job.cfg.optimizer, step, total)
        norm = engine.step(rate)
        if ranks.rank == 0:
            seconds = time.perf_counter() - began
            metrics = {"sft/grad_norm": norm, "sft/lr": rate, "timing_s/step": seconds}
            report(step, {**losses, **metrics, "perf/throughput": tokens / seconds})
        epoch, left = divmod(step + 1, total // job.cfg.epochs)
        if job.cfg.select == "reward" and not left:
            leave(job.epoch_output(epoch))
    if job.cfg.select == "last":
        leave(job.output)


def gradient(engine: TrainEngine, job: SFTJob, rows: list[list[int]]) -> tuple[dict[str, float], float]:
    """Accumulates the gradient of one batch over all ranks; (its mean losses, tokens trained on).

        L = (1 - share) * mean over response tokens + share * mean over the tokens of text

    The share is 0 for a batch without text.
    """
    ranks, own = engine.ranks, rows[engine.ranks.rank :: engine.ranks.world]
    batches = micro_batches(*job.sequences, own, job.cfg.engine.tokens_per_micro_batch)
    counts = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        counts[:2] += job.masks(batch).sum(1)
        counts[2] += batch.padded_tokens
    counts = ranks.sum(counts)
    labels = counts[:2]  # of demonstrations, of text
    share = job.cfg.pretraining_share if labels[1] else 0.0
    weights = torch.tensor([1 - share, share], dtype=torch.float64) / labels.clamp(min=1)
    total, device = torch.zeros(2, dtype=torch.float64), compute_device()
    for batch in filled_up(batches, int(ranks.max(len(batches)))):
        logprobs, _ = engine(*batch.to(device).policy_arguments(), 1.0)
        masks = job.masks(batch).to(logprobs)
        losses = torch.stack([sft_loss(logprobs, mask) for mask in masks])
        engine.backward((losses * weights.to(losses)).sum())
        total += losses.detach().double().cpu()
    means = (ranks.sum(total) / labels.clamp(min=1)).tolist()
    told = {"sft/loss": means[0]} | ({"sft/pretraining_loss": means[1]} if share else {})
    return told, float(counts[2])
