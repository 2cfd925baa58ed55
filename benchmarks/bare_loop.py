"""One update of policy and critic written with torch and transformers alone: what `throughput.py` compares the learner
with. Nothing of the package is used, on purpose; no Ray, no DeepSpeed, no PPO loss (which costs next to nothing)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM

ROUNDS = 3  # measured, after one to warm up


def bare_update_seconds(
    policy: Path,
    dtype: torch.dtype,
    attention: str,
    threads: int,
    sequences: Sequence[Sequence[int]],
    response_tokens: int,
    micro_batch: int,
) -> float:
    """Median seconds of: forward and backward of both models over all micro-batches, clipping, AdamW, both models.

    `sequences` are prompts with their responses, all of one length; the last `response_tokens` of each are learnt.
    """
    torch.set_num_threads(threads)
    actor = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype, attn_implementation=attention)
    critic = AutoModel.from_pretrained(policy, dtype=dtype, attn_implementation=attention)
    head = torch.nn.Linear(critic.config.hidden_size, 1)
    groups = [list(actor.parameters()), [*critic.parameters(), *head.parameters()]]
    optimizers = [torch.optim.AdamW(group, lr=1e-6, fused=True) for group in groups]
    ids = torch.tensor(sequences)
    tokens = len(ids) * response_tokens

    def once() -> float:
        began = time.perf_counter()
        for rows in ids.split(micro_batch):
            logits = actor(rows, use_cache=False, logits_to_keep=response_tokens + 1).logits[:, :-1].float()
            targets = rows[:, -response_tokens:].flatten()
            (functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / tokens).backward()
            hidden = critic(rows, use_cache=False).last_hidden_state[:, -response_tokens - 1 : -1].float()
            (head(hidden).square().sum() / tokens).backward()
        for group, optimizer in zip(groups, optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(group, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - began

    return statistics.median([once() for _ in range(1 + ROUNDS)][1:])
