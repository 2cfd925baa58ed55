"""The loops that one writes first with torch, transformers and vLLM alone: padded batches, logits of every token over
the whole vocabulary, SDPA, AdamW. Nothing of the package is used, on purpose."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM

CLIP = 0.2
Ids = Sequence[np.ndarray]


class PlainLearner:
    """Old logprobs of a batch, and values where there is a critic; then one clipped update on it, in micro-batches of
    `micro_batch` sequences."""

    def __init__(self, policy: Path, dtype: torch.dtype, micro_batch: int, lr: float, critic: bool = False) -> None:
        self._model = _causal(policy, dtype)
        self._critic = PlainScorer(policy, dtype, micro_batch) if critic else None
        self._models: list[torch.nn.Module] = [self._model, *([self._critic.body] if self._critic else [])]
        self._optimizers = [
            torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True) for model in self._models
        ]
        self._micro_batch = micro_batch

    @torch.no_grad()
    def evaluate(self, prompts: Ids, responses: Ids) -> list[torch.Tensor]:
        """Old logprobs by micro-batch; what the critic says is of no use here."""
        old = []
        for part in _parts(prompts, self._micro_batch):
            ids, seen, _ = _padded(prompts[part], responses[part])
            old.append(_logprobs(self._model, ids, seen))
            if self._critic:
                self._critic.at_tokens(ids, seen)
        return old

    def update(self, prompts: Ids, responses: Ids, advantages: Sequence[float], old: Sequence[torch.Tensor]) -> None:
        tokens = sum(map(len, responses))
        for part, before in zip(_parts(prompts, self._micro_batch), old, strict=True):
            ids, seen, mask = _padded(prompts[part], responses[part])
            of_rows = torch.tensor(advantages[part])[:, None]
            ratios = (_logprobs(self._model, ids, seen) - before).exp()
            clipped = ratios.clamp(1 - CLIP, 1 + CLIP)
            loss = -torch.min(ratios * of_rows, clipped * of_rows)
            ((loss * mask).sum() / tokens).backward()
            if self._critic:
                errors = self._critic.at_tokens(ids, seen)[:, :-1] - of_rows
                ((errors.square() * mask).sum() / tokens).backward()
        for model, optimizer in zip(self._models, self._optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


class PlainScorer:
    """A body under a scalar head: reward model or critic."""

    def __init__(self, policy: Path, dtype: torch.dtype, micro_batch: int) -> None:
        self.body = AutoModel.from_pretrained(policy, dtype=dtype, attn_implementation="sdpa")
        self._head = torch.nn.Linear(self.body.config.hidden_size, 1).requires_grad_(False)
        self._micro_batch = micro_batch

    def at_tokens(self, ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        hidden = self.body(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
        return self._head(hidden.float()).squeeze(-1)

    @torch.no_grad()
    def score(self, prompts: Ids, responses: Ids) -> None:
        for part in _parts(prompts, self._micro_batch):
            ids, seen, _ = _padded(prompts[part], responses[part])
            self.at_tokens(ids, seen)


class PlainReference:
    def __init__(self, policy: Path, dtype: torch.dtype, micro_batch: int) -> None:
        self._model, self._micro_batch = _causal(policy, dtype), micro_batch

    @torch.no_grad()
    def logprobs(self, prompts: Ids, responses: Ids) -> None:
        for part in _parts(prompts, self._micro_batch):
            ids, seen, _ = _padded(prompts[part], responses[part])
            _logprobs(self._model, ids, seen)


def plain_seconds(
    policy: Path, dtype: torch.dtype, micro_batch: int, batches: Sequence[tuple[Ids, Ids]]
) -> list[dict[str, float]]:
    """Of PPO on each of the batches of prompts and responses, by part: reward model, reference, learner with critic."""
    learner = PlainLearner(policy, dtype, micro_batch, 1e-6, critic=True)
    scorer, reference = PlainScorer(policy, dtype, micro_batch), PlainReference(policy, dtype, micro_batch)

    def once(prompts: Ids, responses: Ids) -> dict[str, float]:
        kept: list[torch.Tensor] = []
        advantages = np.linspace(-1, 1, len(prompts)).tolist()
        parts: dict[str, Callable[[], Any]] = {
            "score": lambda: scorer.score(prompts, responses),
            "reference": lambda: reference.logprobs(prompts, responses),
            "learner evaluate": lambda: kept.extend(learner.evaluate(prompts, responses)),
            "learner update": lambda: learner.update(prompts, responses, advantages, kept),
        }
        return {part: _seconds(work) for part, work in parts.items()}

    return [once(*batch) for batch in batches]


class PlainGeneration:
    """`vllm.LLM` with `flags`, all requests at once; `sampling`: beside each request's seed."""

    def __init__(self, flags: Mapping[str, Any], sampling: Mapping[str, Any]) -> None:
        from vllm import LLM

        self._engine, self._sampling = LLM(**flags, disable_log_stats=True), sampling

    def sample(self, prompts: Ids, seeds: Sequence[int]) -> None:
        from vllm import SamplingParams

        asked: list[Any] = [{"prompt_token_ids": ids.tolist()} for ids in prompts]
        how = [SamplingParams(seed=int(seed), logprobs=0, detokenize=False, **self._sampling) for seed in seeds]
        assert len(self._engine.generate(asked, how, use_tqdm=False)) == len(asked)


def plain_generation_seconds(
    flags: Mapping[str, Any], sampling: Mapping[str, Any], batches: Sequence[tuple[Ids, Sequence[int]]]
) -> list[float]:
    """Of each batch of prompts and seeds."""
    generation = PlainGeneration(flags, sampling)
    return [_seconds(partial(generation.sample, *batch)) for batch in batches]


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _causal(policy: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(policy, dtype=dtype, attn_implementation="sdpa")


def _parts(rows: Sequence[Any], micro_batch: int) -> Iterator[slice]:
    return (slice(start, start + micro_batch) for start in range(0, len(rows), micro_batch))


def _padded(prompts: Ids, responses: Ids) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and which are seen, [B, T]; 1 where the next token is a response's, [B, T - 1]."""
    rows = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    ids, seen, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
        seen[number, : len(row)] = 1
        mask[number, len(prompts[number]) : len(row)] = 1
    return ids, seen, mask[:, 1:].float()


def _logprobs(model: Any, ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Of every token after the first: [B, T - 1]."""
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
