"""The minibatch updates of one batch: the clipped policy loss and the clipped value loss, one optimizer step each."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_cluster.algo.losses import policy_loss, value_loss
from rlhf_cluster.config import PPOConfig
from rlhf_cluster.learner.experience import Experience
from rlhf_cluster.learner.models import ActorCritic
from rlhf_cluster.learner.plan import BatchPlan
from rlhf_cluster.learner.statistics import Tally, explained_variance, seconds_by_part, tally_experience
from rlhf_cluster.models.batching import PackedBatch


@dataclass(frozen=True)
class StepRates:
    """Learning rates of one update (constant over its minibatches: InstructGPT C.4 counts warm-up in iterations)."""

    policy: float
    critic: float


class Updater:
    """Runs one batch's updates on this rank. All ranks build and run one together."""

    def __init__(self, models: ActorCritic, experience: Experience, cfg: PPOConfig, temperature: float) -> None:
        self._models, self._experience, self._cfg, self._temperature = models, experience, cfg, temperature
        self._tally = Tally()
        self._seconds: dict[str, float] = defaultdict(float)

    def run(self, plan: BatchPlan, seed: int, weight_version: int, rates: StepRates) -> dict[str, float]:
        """All epochs over all minibatches; returns the batch's metrics over all ranks."""
        tally_experience(self._tally, self._experience, weight_version)
        explained = explained_variance(self._experience, self._models.ranks)
        own = [[self._experience.index[i] for i in ids if i in self._experience.index] for ids in plan.minibatches]
        tokens = self._global_tokens(own)
        first = True
        for order in plan.orders(self._cfg.epochs, seed):
            for minibatch in order:
                self._minibatch(own[minibatch], tokens[minibatch], rates, first)
                first = False
        metrics = self._tally.over(self._models.ranks)
        metrics |= {"critic/vf_explained_var": explained, "actor/lr": rates.policy, "critic/lr": rates.critic}
        return metrics | seconds_by_part(self._seconds)

    def _global_tokens(self, minibatches: Sequence[Sequence[int]]) -> list[float]:
        """Response tokens of each minibatch over all ranks: what its losses are divided by."""
        own = [sum(len(self._experience.rows[row].response_ids) for row in rows) for rows in minibatches]
        return self._models.ranks.sum(torch.tensor(own, dtype=torch.float64)).tolist()

    def _minibatch(self, rows: Sequence[int], tokens: float, rates: StepRates, first: bool) -> None:
        """Gradients of policy and critic over this rank's rows, then one step of each. A collective."""
        members = [self._experience.rows[row] for row in rows]
        batches = self._models.micro_batches([m.prompt_ids for m in members], [m.response_ids for m in members])
        for batch in batches:
            self._policy_gradient(batch, rows, tokens, first)
            self._value_gradient(batch, rows, tokens)
        start = time.perf_counter()
        self._tally.mean("actor/grad_norm", self._models.policy.step(rates.policy), 1)
        self._tally.mean("critic/grad_norm", self._models.critic.step(rates.critic), 1)
        self._seconds["optimizer"] += time.perf_counter() - start

    def _policy_gradient(self, batch: PackedBatch, rows: Sequence[int], tokens: float, first: bool) -> None:
        start = time.perf_counter()
        logprobs, entropies = self._models.policy(*batch.policy_arguments(), self._temperature)
        old = self._flat(batch, [self._experience.rows[row].old_logprobs for row in rows])
        advantages = self._flat(batch, [self._experience.advantages[row] for row in rows])
        mask = self._token_mask(batch)
        loss = policy_loss(logprobs, old, advantages, mask, self._cfg.clip)
        self._models.policy.backward(loss.loss_sum / tokens)
        count = float(mask.sum())
        self._tally.mean("actor/pg_loss", loss.loss_sum.detach(), count)
        self._tally.mean("actor/pg_clipfrac", loss.pg_clipfrac_sum, count)
        self._tally.mean("actor/ppo_kl", loss.ppo_kl_sum, count)
        self._tally.mean("actor/entropy", float((entropies * mask).sum()), count)
        if first and count:
            self._tally.mean("actor/first_clipfrac", loss.pg_clipfrac_sum, count)
            self._tally.top("actor/first_ratio_max", loss.ratio_max)
            self._tally.bottom("actor/first_ratio_min", loss.ratio_min)
        self._seconds["actor"] += time.perf_counter() - start

    def _value_gradient(self, batch: PackedBatch, rows: Sequence[int], tokens: float) -> None:
        start = time.perf_counter()
        values = self._models.critic(*batch.value_arguments())
        old = self._flat(batch, [self._experience.rows[row].values for row in rows])
        returns = self._flat(batch, [self._experience.returns[row] for row in rows])
        mask = self._token_mask(batch)
        loss = value_loss(values, old, returns, mask, self._cfg.value_clip)
        self._models.critic.backward(self._cfg.value_coef * loss.loss_sum / tokens)
        count = float(mask.sum())
        self._tally.mean("critic/vf_loss", loss.loss_sum.detach(), count)
        self._tally.mean("critic/vf_clipfrac", loss.vf_clipfrac_sum, count)
        self._seconds["critic"] += time.perf_counter() - start

    def _flat(self, batch: PackedBatch, ragged: Sequence[np.ndarray]) -> torch.Tensor:
        """Per-token arrays of this minibatch's rows, in the micro-batch's order: f32 [N]."""
        return torch.from_numpy(np.concatenate(batch.select(ragged))).to(self._models.device)

    def _token_mask(self, batch: PackedBatch) -> torch.Tensor:
        """1 for each response token, 0 for those of a dummy: f32 [N]."""
        real = np.repeat(batch.sequences >= 0, batch.response_lengths).astype(np.float32)
        return torch.from_numpy(real).to(self._models.device)
