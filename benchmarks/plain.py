"""The loop that one writes first with torch and transformers alone: padded batches, logits of every token over the
whole vocabulary, SDPA, AdamW. Nothing of the package is used, on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

CLIP = 0.2


class PlainLearner:
    """Old logprobs of a batch, then one clipped update on it, in micro-batches of `micro_batch` sequences."""

    def __init__(self, policy: Path, dtype: torch.dtype, micro_batch: int, lr: float) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype, attn_implementation="sdpa")
        self._model.gradient_checkpointing_disable()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=lr, weight_decay=0.0, fused=True)
        self._micro_batch = micro_batch

    def __call__(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], advantages: Sequence[float]
    ) -> None:
        tokens = sum(map(len, responses))
        starts = range(0, len(prompts), self._micro_batch)
        parts = [slice(start, start + self._micro_batch) for start in starts]
        with torch.no_grad():
            old = [self._logprobs(prompts[part], responses[part])[0] for part in parts]
        for part, before in zip(parts, old, strict=True):
            logprobs, mask = self._logprobs(prompts[part], responses[part])
            of_rows = torch.tensor(advantages[part])[:, None]
            ratios = (logprobs - before).exp()
            clipped = ratios.clamp(1 - CLIP, 1 + CLIP)
            loss = -torch.min(ratios * of_rows, clipped * of_rows)
            ((loss * mask).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _logprobs(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every token after the first, and 1 where it is a response's: [B, T - 1] both."""
        rows = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
        width = max(map(len, rows))
        ids, seen, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
            seen[number, : len(row)] = 1
            mask[number, len(prompts[number]) : len(row)] = 1
        logits = self._model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1].float()
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return logprobs, mask[:, 1:].float()
