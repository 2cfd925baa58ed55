"""The minibatch updates of one batch: the clipped policy loss and, with a critic, its value loss; a step of each."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_cluster.algo.kl import ESTIMATORS
from rlhf_cluster.algo.losses import policy_loss, sft_loss
from rlhf_cluster.algo.masked import at_tokens
from rlhf_cluster.config import GenerationConfig, PPOConfig
from rlhf_cluster.learner.experience import Experience
from rlhf_cluster.learner.mix import PretrainingMix
from rlhf_cluster.learner.models import ActorCritic
from rlhf_cluster.learner.plan import BatchPlan
from rlhf_cluster.learner.statistics import Tally, effective_samples, seconds_by_part, tally_experience
from rlhf_cluster.models.batching import PackedBatch
from rlhf_cluster.records import Controls


@dataclass(frozen=True)
class StepRates:
    """Learning rates of one update (constant over its minibatches: InstructGPT C.4 counts warm-up in iterations); a
    policy at 0 is left alone."""

    policy: float
    critic: float


@dataclass(frozen=True)
class Size:
    """Of a minibatch over all ranks: what its losses are means over."""

    tokens: float
    responses: float


def token_shares(lengths: np.ndarray, loss_mean: str, size: Size, longest: int) -> np.ndarray:
    """What the loss of each token counts for in its minibatch's, by `ppo.loss_mean`: i64 [S] -> f32 [N].

    token: 1 / all tokens (DAPO: Yu et al. 2025, arXiv:2503.14476, eq. 12). response: 1 / (tokens of its response x all
    responses) (GRPO: Shao et al. 2024, arXiv:2402.03300, eq. 3). constant: 1 / (the longest allowed x all responses)
    (Dr. GRPO: Liu et al. 2025, arXiv:2503.20783, section 3.2). All: over all ranks.
    """
    of_responses = {
        "token": np.full(len(lengths), 1 / size.tokens),
        "response": 1 / (lengths * size.responses),
        "constant": np.full(len(lengths), 1 / (longest * size.responses)),
    }
    return np.repeat(of_responses[loss_mean], lengths).astype(np.float32)


class Updater:
    """Runs one batch's updates on this rank. All ranks build and run one together."""

    def __init__(
        self,
        models: ActorCritic,
        experience: Experience,
        controls: Controls,
        cfg: PPOConfig,
        generation: GenerationConfig,
        mix: PretrainingMix | None = None,
    ) -> None:
        self._models, self._experience, self._controls = models, experience, controls
        self._cfg, self._generation, self._mix = cfg, generation, mix
        self._tally = Tally()
        self._seconds: dict[str, float] = defaultdict(float)

    def run(self, plan: BatchPlan, seed: int, weight_version: int, rates: StepRates, step: int) -> dict[str, float]:
        """All epochs over all minibatches, or none where it is not to `learn`; the batch's metrics over all ranks."""
        tally_experience(self._tally, self._experience, weight_version, self._cfg.kl.kind != "none")
        judged = self._models.critic.judged(self._experience, self._tally)
        samples = effective_samples(self._experience, self._models.ranks)
        own = [[self._experience.index[i] for i in ids if i in self._experience.index] for ids in plan.minibatches]
        sizes = self._sizes(own)
        minibatches = [minibatch for order in plan.orders(self._cfg.epochs, seed) for minibatch in order]
        todo, done = minibatches if self._controls.learn else [], 0
        for done, minibatch in enumerate(todo, start=1):
            if not sizes[minibatch].responses:
                continue  # the batch runs short: all of its rows have failed
            if self._mix is not None and rates.policy:
                self._mix_gradient(self._mix.share(step * len(minibatches) + done - 1, self._models.ranks))
            kl = self._minibatch(own[minibatch], sizes[minibatch], rates, first=done == 1)
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

    def _minibatch(self, rows: Sequence[int], size: Size, rates: StepRates, first: bool) -> float:
        """Gradients of policy and critic over this rank's rows, then one step of each; returns how far the policy was
        from the one before the update, over all ranks (`actor/ppo_kl`). A collective."""
        members = [self._experience.rows[row] for row in rows]
        batches = self._models.micro_batches([m.prompt_ids for m in members], [m.response_ids for m in members])
        moved = 0.0
        for batch in batches:
            if rates.policy:
                moved += self._policy_gradient(batch, rows, size, first)
            self._value_gradient(batch, rows, size)
        start = time.perf_counter()
        if rates.policy:
            self._models.step_policy(rates.policy, self._cfg.guardrails).tally(self._tally, "actor")
        self._models.critic.step(rates.critic, self._cfg.guardrails, self._tally)
        self._seconds["optimizer"] += time.perf_counter() - start
        return float(self._models.ranks.sum(torch.tensor(moved, dtype=torch.float64))) / size.tokens

    def _mix_gradient(self, blocks: Sequence[np.ndarray]) -> None:
        """Into the policy's gradient that the minibatch adds to: coefficient x the mean over all ranks' tokens of the
        language model's loss. The paper does not say what its 27.8 multiplies; here both losses are means over tokens.
        A collective."""
        start = time.perf_counter()
        firsts, rests = [block[:1] for block in blocks], [block[1:] for block in blocks]
        tokens = float(self._models.ranks.sum(torch.tensor(sum(map(len, rests)), dtype=torch.float64)))
        for batch in self._models.micro_batches(firsts, rests):
            logprobs, _ = self._models.policy(*batch.policy_arguments(), 1.0)
            mask = self._token_mask(batch)
            loss = sft_loss(logprobs, mask)
            self._models.policy.backward(self._cfg.ptx.coef * loss / tokens)
            self._tally.mean("ptx/loss", loss.detach(), float(mask.sum()))
        self._seconds["ptx"] += time.perf_counter() - start

    def _policy_gradient(self, batch: PackedBatch, rows: Sequence[int], size: Size, first: bool) -> float:
        """Returns the sum over this micro-batch's tokens that `actor/ppo_kl` is the mean of."""
        start = time.perf_counter()
        logprobs, entropies = self._models.policy(*batch.policy_arguments(), self._generation.temperature)
        old = self._flat(batch, [self._experience.rows[row].old_logprobs for row in rows])
        advantages = self._flat(batch, [self._experience.advantages[row] for row in rows])
        mask = self._token_mask(batch)
        cfg = self._cfg
        lengths = torch.from_numpy(batch.response_lengths).to(mask.device) if cfg.ratio == "response" else None
        loss = policy_loss(logprobs, old, advantages, mask, cfg.clip, cfg.clip_high, cfg.dual_clip, lengths)
        longest = self._generation.max_response_tokens
        shares = torch.from_numpy(token_shares(batch.response_lengths, cfg.loss_mean, size, longest)).to(mask.device)
        whole = weighted = loss.losses * self._flat(batch, [self._experience.weights[row] for row in rows])
        if cfg.entropy_coef:
            whole = whole - cfg.entropy_coef * at_tokens(entropies, mask)
        if self._controls.kl_loss_coef:
            whole = whole + self._controls.kl_loss_coef * self._kl_loss(batch, rows, logprobs, mask)
        self._models.policy.backward((whole * shares).sum())
        count = float(mask.sum())
        self._tally.mean("actor/pg_loss", float((weighted.detach() * shares).sum()), count / size.tokens)
        self._tally.mean("actor/pg_clipfrac", loss.pg_clipfrac_sum, count)
        self._tally.mean("actor/ppo_kl", loss.ppo_kl_sum, count)
        self._tally.mean("actor/entropy", float((entropies.detach() * mask).sum()), count)
        if cfg.dual_clip:
            self._tally.mean("actor/pg_clipfrac_dual", loss.dual_clipfrac_sum, count)
        if first and count:
            self._tally.mean("actor/first_clipfrac", loss.pg_clipfrac_sum, count)
            self._tally.top("actor/first_ratio_max", loss.ratio_max)
            self._tally.bottom("actor/first_ratio_min", loss.ratio_min)
        self._seconds["actor"] += time.perf_counter() - start
        return float(loss.ppo_kl_sum)

    def _kl_loss(
        self, batch: PackedBatch, rows: Sequence[int], logprobs: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """How far each of this micro-batch's tokens is from the reference, with gradient: [N]."""
        ref = self._flat(batch, [self._experience.rows[row].ref_logprobs for row in rows])
        kl = at_tokens(ESTIMATORS[self._cfg.kl.loss_estimator](logprobs, ref), mask)
        self._tally.mean("actor/kl_loss", float(kl.detach().sum()), float(mask.sum()))
        return kl

    def _value_gradient(self, batch: PackedBatch, rows: Sequence[int], size: Size) -> None:
        start = time.perf_counter()
        old = self._flat(batch, [self._experience.rows[row].values for row in rows])
        returns = self._flat(batch, [self._experience.returns[row] for row in rows])
        mask = self._token_mask(batch)
        self._models.critic.gradient(batch, old, returns, mask, size.tokens, self._cfg, self._tally)
        self._seconds["critic"] += time.perf_counter() - start

    def _flat(self, batch: PackedBatch, ragged: Sequence[np.ndarray]) -> torch.Tensor:
        """Per-token arrays of this minibatch's rows, in the micro-batch's order: f32 [N]."""
        return torch.from_numpy(np.concatenate(batch.select(ragged))).to(self._models.device)

    def _token_mask(self, batch: PackedBatch) -> torch.Tensor:
        """1 for each response token, 0 for those of a dummy: f32 [N]."""
        real = np.repeat(batch.sequences >= 0, batch.response_lengths).astype(np.float32)
        return torch.from_numpy(real).to(self._models.device)
