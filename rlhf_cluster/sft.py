"""Stage 1: supervised fine-tuning on demonstrations (InstructGPT section 3.5, C.1).

The loss is on response tokens only, with EOS as a label; a cosine schedule down to a tenth; several demonstrations
share a row, kept apart by their positions. Every rank runs `train`; Ray Train starts them, DeepSpeed is the engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rlhf_cluster.algo.logprobs import logprobs_from_logits
from rlhf_cluster.algo.losses import sft_loss
from rlhf_cluster.config import ModelConfig, SFTConfig
from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.engine.schedule import learning_rate
from rlhf_cluster.models.batching import filled_up, micro_batches, pack, singles
from rlhf_cluster.models.forward import PolicyModule
from rlhf_cluster.models.load import load_policy, resolve_attention, resolve_dtype, save_policy
from rlhf_cluster.models.tokenizer import load_tokenizer
from rlhf_cluster.records import Demonstrations

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
        rows = self.rows()
        for epoch in range(self.cfg.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(rows))
            for start in range(0, len(rows), self.cfg.batch_size):
                yield [rows[i] for i in order[start : start + self.cfg.batch_size]]


def train(ranks: Ranks, job: SFTJob, report: Report) -> None:
    """One rank's run; rank 0 reports each step and leaves a plain Hugging Face directory at `job.output`, in float32:
    the next stage's masters."""
    torch.manual_seed(job.seed)
    dtype = resolve_dtype(job.model.dtype)
    policy = load_policy(job.base_path, None, resolve_attention(job.model.attention))
    engine = TrainEngine(PolicyModule(policy, logprobs_from_logits), job.cfg.engine, job.cfg.optimizer, dtype, ranks)
    total = job.steps()
    for step, rows in enumerate(job.batches()):
        began = time.perf_counter()
        loss, tokens = gradient(engine, job, rows)
        rate = learning_rate(job.cfg.optimizer, step, total)
        norm = engine.step(rate)
        if ranks.rank == 0:
            seconds = time.perf_counter() - began
            metrics = {"sft/loss": loss, "sft/grad_norm": norm, "sft/lr": rate}
            report(step, {**metrics, "timing_s/step": seconds, "perf/throughput": tokens / seconds})
    weights = PolicyModule.hf_names(engine.masters_on_rank_0())
    if ranks.rank == 0:
        tokenizer = load_tokenizer(job.base_path, job.model.chat_template)
        save_policy(policy.config, weights, tokenizer, job.output, torch.float32)
    ranks.gather(None)  # nobody ends before the result is written


def gradient(engine: TrainEngine, job: SFTJob, rows: list[list[int]]) -> tuple[float, float]:
    """Accumulates the gradient of one batch over all ranks; (mean loss per response token, tokens trained on)."""
    ranks, shown = engine.ranks, job.demonstrations
    own = rows[ranks.rank :: ranks.world]
    batches = micro_batches(shown.prompt_ids, shown.response_ids, own, job.cfg.engine.tokens_per_micro_batch)
    counts = torch.tensor([sum(int(b.response_lengths.sum()) for b in batches), sum(b.padded_tokens for b in batches)])
    responses, padded = ranks.sum(counts.double()).tolist()
    total = torch.zeros((), dtype=torch.float64)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for batch in filled_up(batches, int(ranks.max(len(batches)))):
        logprobs, _ = engine(*batch.to(device).policy_arguments(), 1.0)
        loss = sft_loss(logprobs, torch.full_like(logprobs, float((batch.sequences >= 0).all())))
        engine.backward(loss / responses)
        total += float(loss.detach())
    return float(ranks.sum(total)) / responses, padded
