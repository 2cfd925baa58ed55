"""Learning from rankings without a reward model: DPO, IPO and KTO, an offline stage on the comparisons of stage 2.

The policy's own log-ratio to where it started is the reward (Rafailov et al. 2023, arXiv:2305.18290): with it, DPO's
loss is the reward model's, InstructGPT eq. (1), and here too all pairs of a prompt are one batch element. Every rank
runs `train`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rlhf_cluster.algo.logprobs import logprobs_from_logits
from rlhf_cluster.algo.losses import RankingLoss, ipo_loss, kto_loss, ranking_loss
from rlhf_cluster.config import DPOConfig, ModelConfig
from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.engine.schedule import learning_rate
from rlhf_cluster.models.batching import Layout, PackedBatch
from rlhf_cluster.models.forward import PolicyModule
from rlhf_cluster.models.load import load_policy, resolve_attention, resolve_dtype
from rlhf_cluster.models.rankings import (
    RankedRows,
    accumulate,
    layout_of,
    means,
    of_all_sequences,
    prompt_batches,
    tally,
)
from rlhf_cluster.models.trained import leave_policy
from rlhf_cluster.records import Comparisons

STAGE = "dpo"
Report = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class DPOJob:
    """What every rank needs. The policy at `policy_path` is also the reference."""

    cfg: DPOConfig
    model: ModelConfig
    seed: int
    policy_path: Path
    comparisons: Comparisons
    heldout: Comparisons
    output: Path

    def steps(self) -> int:
        """Optimizer steps in all."""
        return math.ceil(len(self.comparisons) / self.cfg.batch_size) * self.cfg.epochs

    def batches(self) -> Iterator[np.ndarray]:
        """The prompts of each optimizer step, reshuffled in every epoch, the same on all ranks."""
        return prompt_batches(len(self.comparisons), self.cfg.batch_size, self.cfg.epochs, self.seed)


@dataclass(frozen=True, eq=False)
class Reference:
    """Log-probabilities of whole responses under the policy as it starts: [K] for each prompt of the comparisons, and
    for KTO's estimate of the KL of each prompt with another one's response."""

    of_rankings: Sequence[np.ndarray]
    mismatches: Sequence[np.ndarray]  # another prompt's response [R] for each prompt; none but for KTO
    of_mismatches: np.ndarray


def train(ranks: Ranks, job: DPOJob, report: Report) -> None:
    """One rank's run; rank 0 reports each step and leaves a plain Hugging Face directory at `job.output`, float32."""
    torch.manual_seed(job.seed)
    dtype = resolve_dtype(job.model.dtype)
    policy = load_policy(job.policy_path, None, resolve_attention(job.model.attention))
    engine = TrainEngine(PolicyModule(policy, logprobs_from_logits), job.cfg.engine, job.cfg.optimizer, dtype, ranks)
    reference, heldout = refer(engine, job), _of_rankings(engine, job, job.heldout)
    total = job.steps()
    for step, prompts in enumerate(job.batches()):
        began = time.perf_counter()
        metrics = gradient(engine, job, prompts, reference)
        rate = learning_rate(job.cfg.optimizer, step, total)
        metrics |= {"dpo/grad_norm": engine.step(rate), "dpo/lr": rate, "timing_s/step": time.perf_counter() - began}
        if step + 1 == total:
            metrics |= evaluate(engine, job, heldout, metrics.get("dpo/kl", 0.0))
        if ranks.rank == 0:
            report(step, metrics)
    leave_policy(engine, policy.config, job.policy_path, job.model.chat_template, job.output)


def refer(engine: TrainEngine, job: DPOJob) -> Reference:
    """The reference's word on everything that will be asked, once: no second model is kept. A collective."""
    shown = job.comparisons
    mismatches = _mismatches(shown, job.model.context) if job.cfg.loss == "kto" else []
    of_mismatches = of_responses(engine, job, shown.prompt_ids[: len(mismatches)], mismatches)
    return Reference(_of_rankings(engine, job, shown), mismatches, of_mismatches)


def _of_rankings(engine: TrainEngine, job: DPOJob, comparisons: Comparisons) -> list[np.ndarray]:
    prompts = [comparisons.prompt_ids[i] for i, ranked in enumerate(comparisons.responses) for _ in ranked]
    responses = [response for ranked in comparisons.responses for response in ranked]
    found = of_responses(engine, job, prompts, responses)
    return np.split(found, np.cumsum([len(ranks) for ranks in comparisons.ranks])[:-1]) if len(comparisons) else []


def _mismatches(comparisons: Comparisons, context: int) -> list[np.ndarray]:
    """For each prompt a response to the next one, what the policy would hardly say there, as far as it fits: the first
    of the one, the second of the other, so that good and bad ones take turns."""
    each = [own[number % len(own)] for number, own in enumerate(comparisons.responses)]
    pairs = zip(comparisons.prompt_ids, [*each[1:], *each[:1]], strict=True)
    return [response[: context - len(prompt)] for prompt, response in pairs]


def of_responses(
    engine: TrainEngine, job: DPOJob, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]
) -> np.ndarray:
    """Log-probability of each whole response, f64 [n], on every rank. A collective."""
    return of_all_sequences(engine.ranks, prompts, responses, layout(engine, job), partial(response_sums, engine))


def layout(engine: TrainEngine, job: DPOJob) -> Layout:
    return layout_of(job.cfg, job.model, engine.module.model)


def response_sums(engine: TrainEngine, batch: PackedBatch) -> torch.Tensor:
    """The summed logprobs of each sequence's response: [S], with gradient."""
    logprobs, _ = engine(*batch.policy_arguments(), 1.0)
    owner = np.repeat(np.arange(len(batch.sequences)), batch.response_lengths)
    index = torch.from_numpy(owner).to(logprobs.device)
    return logprobs.new_zeros(len(batch.sequences)).index_add(0, index, logprobs)


def gradient(engine: TrainEngine, job: DPOJob, prompts: np.ndarray, reference: Reference) -> dict[str, float]:
    """Accumulates the gradient of the mean over `prompts` of the loss, over all ranks."""
    baseline = _baseline(engine, job, prompts, reference)

    def loss_of(found: torch.Tensor, ranked: RankedRows) -> RankingLoss:
        log_ratios = found[ranked.rows] - torch.from_numpy(reference.of_rankings[ranked.prompt]).to(found)
        return preference_loss(log_ratios, ranked.ranks, baseline, job.cfg)

    sums = accumulate(engine, job.comparisons, prompts, layout(engine, job), partial(response_sums, engine), loss_of)
    return means(sums, len(prompts), "dpo/") | ({"dpo/kl": baseline} if job.cfg.loss == "kto" else {})


def _baseline(engine: TrainEngine, job: DPOJob, prompts: np.ndarray, reference: Reference) -> float:
    """KTO's reference point: how far the policy is from where it started, at least 0. A collective."""
    if job.cfg.loss != "kto":
        return 0.0
    asked = [job.comparisons.prompt_ids[i] for i in prompts]
    found = of_responses(engine, job, asked, [reference.mismatches[i] for i in prompts])
    return max(0.0, float(np.mean(found - reference.of_mismatches[prompts])))


def preference_loss(log_ratios: torch.Tensor, ranks: torch.Tensor, baseline: float, cfg: DPOConfig) -> RankingLoss:
    """One prompt's ranking: `log_ratios` [K] to the reference, `ranks` [K], 1 the best."""
    if cfg.loss == "ipo":
        return ipo_loss(log_ratios, ranks, cfg.beta)
    if cfg.loss == "kto":
        return kto_loss(log_ratios, ranks, baseline, cfg.beta)
    return ranking_loss(cfg.beta * log_ratios, ranks, cfg.label_smoothing)


def evaluate(engine: TrainEngine, job: DPOJob, reference: Sequence[np.ndarray], baseline: float) -> dict[str, float]:
    """The loss on held-out rankings, and how far the policy's own rewards agree with them; KTO's from the `baseline` of
    the last step. A collective."""
    if not len(job.heldout):
        return {}
    sums = torch.zeros(4, dtype=torch.float64)
    found = _of_rankings(engine, job, job.heldout)
    for own, ref, ranks in zip(found, reference, job.heldout.ranks, strict=True):
        log_ratios = torch.from_numpy(own - ref)
        sums += tally(preference_loss(log_ratios, torch.tensor(ranks.tolist()), baseline, job.cfg))
    return means(sums.tolist(), len(found), "dpo/heldout_")
