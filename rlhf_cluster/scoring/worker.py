"""One reward worker around the parts of a score, each chosen once from the config: the score is their weighted sum."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash

from rlhf_cluster.config import COMPUTED_REWARDS, ConfigError, RewardConfig, RewardPart, part_names
from rlhf_cluster.models.batching import Layout, in_order
from rlhf_cluster.models.forward import attends_to_all
from rlhf_cluster.models.load import compute_device, resolve_attention, resolve_dtype
from rlhf_cluster.models.score_head import ScalarHeadModel
from rlhf_cluster.models.tokenizer import around_question, load_tokenizer
from rlhf_cluster.records import Rollouts, Scores
from rlhf_cluster.scoring.function import START_S, FunctionCall
from rlhf_cluster.scoring.function_process import FunctionSpec
from rlhf_cluster.scoring.http import HttpCall
from rlhf_cluster.scoring.patience import Patience, Patient
from rlhf_cluster.scoring.samples import Sample, Verdicts


class Scorer(Protocol):
    """One part of the score. `samples` are the rollouts as text."""

    def __call__(self, rollouts: Rollouts, samples: Sequence[Sample]) -> Verdicts: ...


class ModelScorer:
    """A reward model: the scalar at the true last token of prompt and response (InstructGPT section 3.5)."""

    def __init__(self, path: str, dtype: str, attention: str, tokens_per_micro_batch: int) -> None:
        self._device = compute_device()
        model = ScalarHeadModel.from_directory(Path(path), resolve_dtype(dtype), resolve_attention(attention))
        self._model = model.to(self._device)
        self._layout = Layout(tokens_per_micro_batch, tokens_per_micro_batch if attends_to_all(model.body) else 0)

    @torch.no_grad()
    def __call__(self, rollouts: Rollouts) -> np.ndarray:
        ids = rollouts.prompt_ids, rollouts.response_ids
        batches = self._layout.batches(*ids, self._layout.rows(*ids))
        parts = [list(self._model(*b.to(self._device).score_arguments()).float().cpu().numpy()) for b in batches]
        return np.array(in_order(batches, parts, len(rollouts)), np.float32)


def random_scores(rollouts: Rollouts, seed: int) -> np.ndarray:
    """Standard normal noise from the sample's id: a control that must teach nothing, the same on every worker."""
    seeds = [xxhash.xxh3_64_intdigest(sample_id.encode(), seed) for sample_id in rollouts.sample_id]
    return np.array([np.random.default_rng(seed).standard_normal() for seed in seeds], np.float32)


def lengths(rollouts: Rollouts) -> np.ndarray:
    """Tokens of each response; a weight below 0 makes them a penalty."""
    return np.array([len(ids) for ids in rollouts.response_ids], np.float32)


def repetitions(rollouts: Rollouts, n: int = 3) -> np.ndarray:
    """Share of each response's n-grams of tokens that it has said before: 0 where all differ."""

    def share(ids: Sequence[int]) -> float:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0

    return np.array([share(ids.tolist()) for ids in rollouts.response_ids], np.float32)


class OfRollouts:
    """What is computed from tokens. It fails where it is not finite."""

    def __init__(self, compute: Callable[[Rollouts], np.ndarray]) -> None:
        self._compute = compute

    def __call__(self, rollouts: Rollouts, samples: Sequence[Sample]) -> Verdicts:
        scores = self._compute(rollouts)
        failures = ["" if np.isfinite(score) else f"it gave {score}" for score in scores]
        return Verdicts(np.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0), failures, [0.0] * len(scores))


class OfText:
    """What is asked of somebody else, who may fail."""

    def __init__(self, ask: Patient) -> None:
        self._ask = ask

    def __call__(self, rollouts: Rollouts, samples: Sequence[Sample]) -> Verdicts:
        return self._ask(samples)


@dataclass(frozen=True)
class Part:
    """A scorer with its place in the sum."""

    name: str
    weight: float
    on_failure: str
    scorer: Scorer


class RewardError(RuntimeError):
    """A reward that failed where the config says that the run is to stop then."""


@dataclass(frozen=True)
class ScorerInputs:
    """What scorers are made from besides their config. `model`: stage 2's reward model, or none. `budget_s`: for
    what a part asks somebody else about rows that come at once."""

    model: str
    tokenizer: str
    dtype: str
    attention: str
    seed: int
    budget_s: float
    chat_template: str = ""  # where it is not the tokenizer's own


class RewardWorker:
    """Scores what it is sent. Raises RewardError, naming a sample, where a part fails that may not."""

    def __init__(self, cfg: RewardConfig, inputs: ScorerInputs) -> None:
        self._cfg = cfg
        self._parts = [
            Part(name, part.weight, failure_policy(part), make_scorer(part, cfg, inputs))
            for name, part in part_names(cfg).items()
        ]
        needs_text = any(isinstance(part.scorer, OfText) for part in self._parts)
        self._tokenizer = load_tokenizer(Path(inputs.tokenizer), inputs.chat_template) if needs_text else None
        self._around = around_question(self._tokenizer) if self._tokenizer else ("", "")

    def score(self, rollouts: Rollouts) -> Scores:
        samples = self._samples(rollouts)
        total = np.zeros(len(rollouts), np.float64)
        failures = [""] * len(rollouts)
        columns: dict[str, Any] = {}
        for part in self._parts:
            verdicts = part.scorer(rollouts, samples)
            with np.errstate(over="ignore"):
                scores = np.array(verdicts.scores, np.float32)
            told = [
                failure or ("" if np.isfinite(score) else "it gave a score too large for float32")
                for failure, score in zip(verdicts.failures, scores, strict=True)
            ]
            for row, failure in enumerate(told):
                if failure:
                    scores[row] = self._cfg.neutral_score
                    failures[row] = failures[row] or self._outcome(part, rollouts.sample_id[row], failure)
            total += part.weight * scores
            columns[f"reward/{part.name}"] = scores
            columns[f"reward_s/{part.name}"] = np.array(verdicts.seconds, np.float32)
            columns[f"reward_failure/{part.name}"] = told
        total[[bool(failure) for failure in failures]] = 0.0
        own = {"sample_id": rollouts.sample_id, "score": total.astype(np.float32), "failure": failures}
        return Scores.of(own | columns)

    def _outcome(self, part: Part, sample_id: str, failure: str) -> str:
        """What a failed sample's row says of it; nothing where it goes on with a neutral score."""
        if part.on_failure == "stop":
            raise RewardError(f"the reward {part.name} gave no finite score for sample {sample_id}: {failure}")
        return f"{part.name}: {failure}" if part.on_failure == "drop" else ""

    def _samples(self, rollouts: Rollouts) -> list[Sample]:
        tokenizer = self._tokenizer
        if tokenizer is None:
            return []
        own = [name for name in rollouts.table.column_names if name not in Rollouts.COLUMNS]
        rows = rollouts.table.select(own).to_pylist() if own else [{} for _ in range(len(rollouts))]
        before, behind = self._around

        def texts(ids: list[np.ndarray], special: bool = False) -> list[str]:
            return [tokenizer.decode(row, skip_special_tokens=not special) for row in ids]

        prompts, responses = texts(rollouts.prompt_ids), texts(rollouts.response_ids)
        raw = list(zip(texts(rollouts.prompt_ids, True), texts(rollouts.response_ids, True), strict=True))
        given = [whole.removeprefix(before).removesuffix(behind) for whole, _ in raw]
        ended = [reason == "stop" for reason in rollouts.finish_reason]
        columns = (rollouts.sample_id, prompts, responses, ended, rows, given, raw)
        return [Sample(*fields) for fields in zip(*columns, strict=True)]


def failure_policy(part: RewardPart) -> str:
    """What a part's failure costs: the sample; or the run, where a model of ours is broken."""
    return part.on_failure or ("stop" if part.kind in COMPUTED_REWARDS else "drop")


def make_scorer(part: RewardPart, cfg: RewardConfig, inputs: ScorerInputs) -> Scorer:
    if part.kind == "model":
        path = part.path or cfg.path or inputs.model
        return OfRollouts(ModelScorer(path, inputs.dtype, inputs.attention, cfg.tokens_per_micro_batch))
    of_tokens: Mapping[str, Callable[[Rollouts], np.ndarray]] = {
        "random": partial(random_scores, seed=inputs.seed),
        "length": lengths,
        "repetition": repetitions,
    }
    if part.kind in of_tokens:
        return OfRollouts(of_tokens[part.kind])
    if part.kind == "http":
        call = HttpCall(part.path, _token(cfg.token_env))
        return OfText(Patient(call, _patience(cfg, cfg.concurrency, inputs.budget_s)))
    start_s = min(START_S, inputs.budget_s)
    return OfText(Patient(FunctionCall(function_spec(part), start_s), _patience(cfg, 1, inputs.budget_s)))


def _token(variable: str) -> str:
    """Of this node's environment: one that travelled from the driver would be kept by Ray. Raises ConfigError."""
    token = os.environ.get(variable, "") if variable else ""
    if variable and not token:
        raise ConfigError(
            f"reward.token_env={variable}, but on node {socket.gethostname()}, where a reward worker runs, there is no "
            "such environment variable; set it on every node before Ray starts there"
        )
    return token


def from_here(cfg: RewardConfig) -> RewardConfig:
    """`cfg` with its relative paths made absolute: workers may stand elsewhere than the driver."""
    return replace(cfg, path=_absolute(cfg.path), parts=[_part_from_here(part) for part in cfg.parts])


def _part_from_here(part: RewardPart) -> RewardPart:
    names_file = part.kind == "model" or (part.kind == "function" and ".py:" in part.path)  # no module, no URL
    return replace(part, path=_absolute(part.path) if names_file else part.path, schema=_absolute(part.schema))


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path else ""


def function_spec(part: RewardPart) -> FunctionSpec:
    return FunctionSpec(part.kind, part.path, part.column, part.pattern, part.schema)


def _patience(cfg: RewardConfig, concurrency: int, budget_s: float) -> Patience:
    return Patience(
        deadline_s=cfg.deadline_s,
        retries=cfg.retries,
        backoff_s=cfg.backoff_s,
        breaker_failures=cfg.breaker_failures,
        breaker_s=cfg.breaker_s,
        batch_size=cfg.batch_size,
        concurrency=concurrency,
        budget_s=budget_s,
    )
