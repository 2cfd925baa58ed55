"""The minibatch updates of one batch: the clipped policy loss and, with a critic, its value loss; a step of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_cluster.algo.losses import sft_loss
from rlhf_cluster.config import PPOConfig
from rlhf_cluster.learner.experience import Experience
from rlhf_cluster.learner.gradient import PolicyGradient, Size
from rlhf_cluster.learner.mix import PretrainingMix
from rlhf_cluster.learner.models import ActorCritic
from rlhf_cluster.learner.plan import BatchPlan
from rlhf_cluster.learner.statistics import effective_samples, seconds_by_part, tally_experience
from rlhf_cluster.models.batching import PackedBatch
from rlhf_cluster.records import Controls


@dataclass(frozen=True)
class StepRates:
    """Learning rates of one update (constant over its minibatches: InstructGPT C.4 counts warm-up in iterations); a
    policy at 0 is left alone."""

    policy: float
    critic: float


class Updater:
    """Runs one batch's updates on this rank. All ranks build and run one together."""

    def __init__(
        self,
        models: ActorCritic,
        experience: Experience,
        controls: Controls,
        cfg: PPOConfig,
        gradient: PolicyGradient,
        mix: PretrainingMix | None = None,
    ) -> None:
        self._models, self._experience, self._controls = models, experience, controls
        self._cfg, self._gradient, self._mix = cfg, gradient, mix
        self._tally, self._seconds = gradient.tally, gradient.seconds

    def run(self, plan: BatchPlan, seed: int, weight_version: int, rates: StepRates, step: int) -> dict[str, float]:
        """All epochs over all minibatches, or none where it is not to `learn`; the batch's metrics over all ranks."""
        tally_experience(self._tally, self._experience, weight_version, self._cfg.kl.kind != "none")
        judged = self._models.critic.judged(self._experience, self._tally)
        samples = effective_samples(self._experience, self._models.ranks)
        own = [[self._experience.index[i] for i in ids if i in self._experience.index] for ids in plan.minibatches]
        sizes = self._sizes(own)
        minibatches = [minibatch for order in plan.orders(self._cfg.epochs, seed) for minibatch in order]
        todo, done = minibatches if self._controls.learn else [], 0
        if self._cfg.streams_gradients and not (todo and rates.policy):
            self._models.policy.forget_gradient()
        for done, minibatch in enumerate(todo, start=1):
            if not sizes[minibatch].responses:
                continue  # the batch runs short: all of its rows have failed
            share = self._mix.share(step * len(minibatches) + done - 1, self._models.ranks) if self._mix else None
            kl = self._minibatch(own[minibatch], sizes[minibatch], rates, share, first=done == 1)
            if self._cfg.target_kl and kl > self._cfg.target_kl:
                break
        self._tally.mean("actor/minibatches_done", done, len(minibatches))
        metrics = self._tally.over(self._models.ranks)
        metrics |= {"actor/lr": rates.policy, "rollout/ess": samples, **judged}
        return metrics | seconds_by_part(self._seconds)

    def _sizes(self, minibatches: Sequence[Sequence[int]]) -> list[Size]:
        """Of each minibatch over all ranks. A collective."""
        own = [(sum(len(self._experience.rows[i].response_ids) for i in rows), len(rows)) for rows in minibatches]
        return [Size(*whole) for whole in self._models.ranks.sum(torch.tensor(own, dtype=torch.float64)).tolist()]

    def _minibatch(
        self, rows: Sequence[int], size: Size, rates: StepRates, text: Sequence[np.ndarray] | None, first: bool
    ) -> float:
        """Gradients of policy and critic over this rank's rows, then one step of each; returns how far the policy was
        from the one before the update, over all ranks (`actor/ppo_kl`). A collective."""
        divisor = size.divisor(self._cfg.loss_mean)
        streamed = self._cfg.streams_gradients
        scale = self._cfg.batch_size / divisor if streamed else 1.0  # of the gradient that is there already
        if text is not None and rates.policy:
            self._mix_gradient(text, scale)
        sums = torch.zeros(2, dtype=torch.float64)
        if not streamed:
            sums = self._gradients(rows, size.tokens, divisor, rates, first)
        moved, clipped = (self._models.ranks.sum(sums) / size.tokens).tolist()
        start = time.perf_counter()
        if rates.policy:
            rails = self._cfg.guardrails
            self._tally.top("actor/pg_clipfrac_max", clipped)
            step = self._models.step_policy(rates.policy, rails, scale, withheld=rails.clipfrac.withholds(clipped))
            step.tally(self._tally, "actor")
        self._models.critic.step(rates.critic, self._cfg.guardrails, self._tally)
        self._seconds["optimizer"] += time.perf_counter() - start
        return float(moved)

    def _gradients(
        self, rows: Sequence[int], tokens: float, divisor: float, rates: StepRates, first: bool
    ) -> torch.Tensor:
        """Into the buffers of policy and critic; returns this rank's share of the sums over tokens behind
        `actor/ppo_kl` and `actor/pg_clipfrac`, f64 [2]."""
        members = [self._experience.rows[row] for row in rows]
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self._models.micro_batches([m.prompt_ids for m in members], [m.response_ids for m in members]):
            if rates.policy:
                terms = self._gradient.terms(batch, self._experience, rows, moved=True)
                computed = self._gradient.add(batch, terms, divisor, self._controls.kl_loss_coef, first)
                sums += torch.tensor([computed.moved, computed.clipped], dtype=torch.float64)
            self._value_gradient(batch, rows, tokens)
        return sums

    def _mix_gradient(self, blocks: Sequence[np.ndarray], scale: float) -> None:
        """Into the policy's gradient that the minibatch adds to, which the step multiplies by `scale`: coefficient x
        the mean over all ranks' tokens of the language model's loss. The paper does not say what its 27.8 multiplies;
        here both losses are means over tokens. A collective."""
        start = time.perf_counter()
        firsts, rests = [block[:1] for block in blocks], [block[1:] for block in blocks]
        tokens = float(self._models.ranks.sum(torch.tensor(sum(map(len, rests)), dtype=torch.float64)))
        for batch in self._models.micro_batches(firsts, rests, text=True):
            logprobs, _ = self._models.policy(*batch.policy_arguments(), 1.0)
            mask = self._models.token_mask(batch)
            loss = sft_loss(logprobs, mask)
            self._models.policy.backward(self._cfg.ptx.coef * loss / tokens / scale)
            self._tally.mean("ptx/loss", loss.detach(), float(mask.sum()))
        self._seconds["ptx"] += time.perf_counter() - start

    def _value_gradient(self, batch: PackedBatch, rows: Sequence[int], tokens: float) -> None:
        start = time.perf_counter()
        old = self._models.flat(batch, [self._experience.rows[row].values for row in rows])
        returns = self._models.flat(batch, [self._experience.returns[row] for row in rows])
        mask = self._models.token_mask(batch)
        self._models.critic.gradient(batch, old, returns, mask, tokens, self._cfg, self._tally)
        self._seconds["critic"] += time.perf_counter() - start
