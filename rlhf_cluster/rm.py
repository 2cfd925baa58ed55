"""Stage 2: the reward model, from rankings (InstructGPT section 3.5, eq. 1; C.2).

All pairs of a prompt are one batch element, so a response is passed forward once and not K - 1 times, and the prompt
once for all responses where it can be shared. Ties are dropped.
After training the bias is set so that the demonstrations score 0 on average. Every rank runs `train`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from rlhf_cluster.algo.losses import ranking_loss
from rlhf_cluster.config import ModelConfig, RMConfig
from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.engine.schedule import learning_rate
from rlhf_cluster.models.batching import Layout
from rlhf_cluster.models.load import resolve_attention, resolve_dtype
from rlhf_cluster.models.rankings import accumulate, layout_of, means, of_all_sequences, prompt_batches
from rlhf_cluster.models.score_head import ScalarHeadModel, save_scalar_head_model
from rlhf_cluster.models.tokenizer import load_tokenizer
from rlhf_cluster.records import Comparisons, Demonstrations

STAGE = "rm"
EVALUATION = "rm_evaluation.json"
Report = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class RMJob:
    """What every rank needs. `demonstrations` centre the scores; they may be few."""

    cfg: RMConfig
    model: ModelConfig
    seed: int
    policy_path: Path
    comparisons: Comparisons
    heldout: Comparisons
    demonstrations: Demonstrations
    output: Path

    def steps(self) -> int:
        """Optimizer steps in all."""
        return math.ceil(len(self.comparisons) / self.cfg.batch_size) * self.cfg.epochs

    def batches(self) -> Iterator[np.ndarray]:
        """The prompts of each optimizer step, reshuffled in every epoch, the same on all ranks."""
        return prompt_batches(len(self.comparisons), self.cfg.batch_size, self.cfg.epochs, self.seed)


@dataclass(frozen=True)
class RMEvaluation:
    """Agreement with held-out rankings. Standard errors are over prompts, whose pairs are not independent."""

    accuracy: float
    accuracy_se: float
    shorter_accuracy: float  # of preferring the shorter response: what a model must beat to have read any
    length_controlled_accuracy: float  # the mean over pairs whose preferred response is the shorter, and over those
    # where it is the longer: whoever goes by length alone has 0.5
    length_controlled_accuracy_se: float
    margin: float
    prompts: int
    pairs: int
    margins: list[float]  # one per pair: score of the preferred response minus that of the other

    def metrics(self) -> dict[str, float]:
        """Without those that this evaluation cannot give: where there are no pairs, or all lengths are equal."""
        told = {
            "rm/heldout_accuracy": self.accuracy,
            "rm/heldout_accuracy_se": self.accuracy_se,
            "rm/heldout_shorter_accuracy": self.shorter_accuracy,
            "rm/heldout_length_controlled_accuracy": self.length_controlled_accuracy,
            "rm/heldout_length_controlled_accuracy_se": self.length_controlled_accuracy_se,
            "rm/heldout_margin": self.margin,
        }
        return {name: value for name, value in told.items() if not math.isnan(value)}

    def __str__(self) -> str:
        controlled = f"{self.length_controlled_accuracy:.3f} +- {self.length_controlled_accuracy_se:.3f}"
        if math.isnan(self.length_controlled_accuracy):
            controlled = "not told by these pairs"
        return (
            f"held-out accuracy {self.accuracy:.3f} +- {self.accuracy_se:.3f} on {self.pairs} pairs of "
            f"{self.prompts} prompts (preferring the shorter response: {self.shorter_accuracy:.3f}; "
            f"length-controlled {controlled}), mean margin {self.margin:.2f}"
        )


def read_evaluation(directory: Path) -> RMEvaluation:
    """What `train` left beside the model."""
    return RMEvaluation(**json.loads((directory / EVALUATION).read_text()))


def train(ranks: Ranks, job: RMJob, report: Report) -> None:
    """One rank's run; rank 0 reports each step and leaves the model and its held-out evaluation at `job.output`."""
    torch.manual_seed(job.seed)
    dtype, attention = resolve_dtype(job.model.dtype), resolve_attention(job.model.attention)
    model = ScalarHeadModel.from_policy(job.policy_path, None, attention, job.seed, job.cfg.layers)
    engine = TrainEngine(model, job.cfg.engine, job.cfg.optimizer, dtype, ranks)
    total = job.steps()
    for step, prompts in enumerate(job.batches()):
        began = time.perf_counter()
        metrics = gradient(engine, job, prompts)
        rate = learning_rate(job.cfg.optimizer, step, total)
        metrics |= {"rm/grad_norm": engine.step(rate), "rm/lr": rate, "timing_s/step": time.perf_counter() - began}
        if ranks.rank == 0:
            report(step, metrics)
    evaluation = evaluate(engine, job)
    shown = job.demonstrations
    centre = float(np.mean(score(engine, job, list(shown.prompt_ids), list(shown.response_ids)))) if len(shown) else 0.0
    weights = engine.masters_on_rank_0()
    if ranks.rank == 0:
        weights["score.bias"] = weights["score.bias"] - centre
        tokenizer = load_tokenizer(job.policy_path, job.model.chat_template)
        save_scalar_head_model(model.config, weights, tokenizer, job.output, torch.float32)
        (job.output / EVALUATION).write_text(json.dumps(asdict(evaluation)))
    ranks.gather(None)  # nobody ends before the result is written


def gradient(engine: TrainEngine, job: RMJob, prompts: np.ndarray) -> dict[str, float]:
    """Accumulates the gradient of the mean over `prompts` of eq. (1), over all ranks."""
    sums = accumulate(
        engine,
        job.comparisons,
        prompts,
        layout(engine, job),
        lambda batch: engine(*batch.score_arguments()),
        lambda scores, ranked: ranking_loss(scores[ranked.rows], ranked.ranks),
    )
    return means(sums, len(prompts), "rm/")


def score(
    engine: TrainEngine, job: RMJob, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
) -> np.ndarray:
    """Scores of all sequences, on every rank. A collective."""
    return of_all_sequences(
        engine.ranks, prompts, responses, layout(engine, job), lambda batch: engine(*batch.score_arguments())
    )


def layout(engine: TrainEngine, job: RMJob) -> Layout:
    return layout_of(job.cfg, job.model, engine.module.body)


def evaluate(engine: TrainEngine, job: RMJob) -> RMEvaluation:
    """Held-out accuracy and margins. A collective."""
    heldout = job.heldout
    if not len(heldout):
        return summarize([], [])
    responses = [response for ranked in heldout.responses for response in ranked]
    prompts = [heldout.prompt_ids[i] for i, ranked in enumerate(heldout.responses) for _ in ranked]
    scores = np.split(score(engine, job, prompts, responses), np.cumsum([len(r) for r in heldout.ranks])[:-1])
    brevity = [np.array([-len(response) for response in ranked]) for ranked in heldout.responses]
    return summarize(margins_by_prompt(scores, heldout.ranks), margins_by_prompt(brevity, heldout.ranks))


def margins_by_prompt(scores: Sequence[np.ndarray], ranks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`pair_margins` of each prompt; prompts without a pair of unequal rank are left out."""
    margins = [pair_margins(own, of_prompt) for own, of_prompt in zip(scores, ranks, strict=True)]
    return [own for own in margins if own.size]


def pair_margins(scores: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Score of the better minus score of the worse, for every pair of unequal rank."""
    better, worse = np.nonzero(ranks[:, None] < ranks[None, :])
    return scores[better] - scores[worse]


def summarize(margins: Sequence[np.ndarray], by_length: Sequence[np.ndarray]) -> RMEvaluation:
    """Both have an array for each prompt: `by_length` is what scores of minus the length would give."""
    pooled = np.concatenate(margins) if margins else np.zeros(0)
    right, brief = [_right(own) for own in margins], [_right(own) for own in by_length]
    everything = [np.ones(own.size, bool) for own in margins]
    accuracy = share_by_strata(right, [everything])
    controlled = share_by_strata(right, [[own > 0 for own in by_length], [own < 0 for own in by_length]])
    shorter, _ = share_by_strata(brief, [everything])
    margin = float(pooled.mean()) if pooled.size else math.nan
    return RMEvaluation(*accuracy, shorter, *controlled, margin, len(margins), int(pooled.size), pooled.tolist())


def share_by_strata(right: Sequence[np.ndarray], strata: Sequence[Sequence[np.ndarray]]) -> tuple[float, float]:
    """The share of pairs that are right, each stratum counting the same, and its standard error.

    `right` and each stratum (bool: which pairs are in it) have an array for each prompt. A prompt's pairs are one
    cluster (a ratio estimator). Not a number where a stratum is empty.
    """
    prompts, shares = len(right), []
    if not all(any(chosen.any() for chosen in stratum) for stratum in strata):
        return math.nan, math.nan
    residual = np.zeros(prompts)
    for stratum in strata:
        own = [pairs[chosen] for pairs, chosen in zip(right, stratum, strict=True)]
        count = sum(pairs.size for pairs in own)
        share = sum(float(pairs.sum()) for pairs in own) / count
        residual += np.array([(pairs - share).sum() for pairs in own]) / count / len(strata)
        shares.append(share)
    spread = math.sqrt((residual**2).sum() * prompts / max(prompts - 1, 1))
    return sum(shares) / len(shares), spread


def _right(margins: np.ndarray) -> np.ndarray:
    """1 where a pair is told apart rightly; a tie of the scores counts as half."""
    return (margins > 0) + 0.5 * (margins == 0)
