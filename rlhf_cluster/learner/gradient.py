"""The policy's gradient of one micro-batch: the clipped loss with what is added to it, and what is told of it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_cluster.algo.kl import ESTIMATORS
from rlhf_cluster.algo.losses import policy_loss
from rlhf_cluster.algo.masked import at_tokens
from rlhf_cluster.config import GenerationConfig, PPOConfig
from rlhf_cluster.learner.experience import Experience
from rlhf_cluster.learner.models import ActorCritic
from rlhf_cluster.learner.statistics import Tally
from rlhf_cluster.learner.weighing import make_weigher
from rlhf_cluster.models.batching import PackedBatch, response_mask


@dataclass(frozen=True)
class Size:
    """Of a minibatch over all ranks: what its losses are means over."""

    tokens: float
    responses: float

    def divisor(self, loss_mean: str) -> float:
        """What the sum of all tokens' losses, each counted as in `token_shares`, is divided by."""
        return self.tokens if loss_mean == "token" else self.responses


def token_shares(lengths: np.ndarray, loss_mean: str, longest: int) -> np.ndarray:
    """What the loss of each token counts for, by `ppo.loss_mean`, before the sum is divided by `Size.divisor`: i64 [S]
    -> f32 [N].

    token: 1 (DAPO: Yu et al. 2025, arXiv:2503.14476, eq. 12). response: 1 / the tokens of its response (GRPO: Shao et
    al. 2024, arXiv:2402.03300, eq. 3). constant: 1 / the longest allowed (Dr. GRPO: Liu et al. 2025, arXiv:2503.20783,
    section 3.2).
    """
    of_responses = {
        "token": np.ones(len(lengths)),
        "response": 1 / lengths,
        "constant": np.full(len(lengths), 1 / longest),
    }
    return np.repeat(of_responses[loss_mean], lengths).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Terms:
    """What the loss of a micro-batch's tokens takes beside the policy itself: f32 [N] each."""

    mask: torch.Tensor  # 0 for a dummy's
    sampled: torch.Tensor  # logprobs of the sampler
    ref: torch.Tensor  # logprobs of the reference
    advantages: torch.Tensor
    old: torch.Tensor | None  # logprobs before the update; None: the policy has not moved, and its own are the old ones


@dataclass(frozen=True, eq=False)
class Computed:
    """What the policy said on the way, f32 [N] without gradient, and the sums over tokens that `actor/ppo_kl` and
    `actor/pg_clipfrac` are the means of."""

    logprobs: torch.Tensor
    entropies: torch.Tensor
    moved: float
    clipped: float


class PolicyGradient:
    """Of one batch, into the buffers of the policy's engine. `tally` and `seconds` are what it says of itself."""

    def __init__(self, models: ActorCritic, cfg: PPOConfig, generation: GenerationConfig) -> None:
        self._models, self._cfg, self._generation = models, cfg, generation
        self._weigh = make_weigher(cfg)
        self.tally = Tally()
        self.seconds: dict[str, float] = defaultdict(float)

    def terms(self, batch: PackedBatch, experience: Experience, rows: Sequence[int], moved: bool) -> Terms:
        """Of the sequences in `batch`, which are those of `rows` of the experience. `moved`: the policy may be another
        than the one that evaluated them."""
        members = [experience.rows[row] for row in rows]
        return Terms(
            self._models.token_mask(batch),
            self._models.flat(batch, [member.rollout_logprobs for member in members]),
            self._models.flat(batch, [member.ref_logprobs for member in members]),
            self._models.flat(batch, [experience.advantages[row] for row in rows]),
            self._models.flat(batch, [member.old_logprobs for member in members]) if moved else None,
        )

    def add(self, batch: PackedBatch, terms: Terms, divisor: float, kl_coef: float, first: bool) -> Computed:
        """`divisor`: what the sum of losses is divided by; `kl_coef`: of the KL in the loss; `first`: no step was made
        on the batch before. A collective."""
        start = time.perf_counter()
        cfg, mask = self._cfg, terms.mask
        logprobs, entropies = self._models.policy(*batch.policy_arguments(), self._generation.temperature)
        own = logprobs.detach()
        old = own if terms.old is None else terms.old
        lengths = torch.from_numpy(batch.response_lengths).to(mask.device) if cfg.ratio == "response" else None
        loss = policy_loss(logprobs, old, terms.advantages, mask, cfg.clip, cfg.clip_high, cfg.dual_clip, lengths)
        counts = token_shares(batch.response_lengths, cfg.loss_mean, self._generation.max_response_tokens)
        shares = torch.from_numpy(counts).to(mask.device)
        whole = weighted = loss.losses * self._weights(old - terms.sampled, batch)
        if cfg.entropy_coef:
            whole = whole - cfg.entropy_coef * at_tokens(entropies, mask)
        if kl_coef:
            whole = whole + kl_coef * self._kl(logprobs, terms)
        self._models.policy.backward((whole * shares).sum() / divisor)
        tokens = float(mask.sum())
        size = Size(tokens, float((batch.sequences >= 0).sum()))
        self.tally.mean("actor/pg_loss", float((weighted.detach() * shares).sum()), size.divisor(cfg.loss_mean))
        self.tally.mean("actor/pg_clipfrac", loss.pg_clipfrac_sum, tokens)
        self.tally.mean("actor/ppo_kl", loss.ppo_kl_sum, tokens)
        self.tally.mean("actor/entropy", float((entropies.detach() * mask).sum()), tokens)
        if cfg.dual_clip:
            self.tally.mean("actor/pg_clipfrac_dual", loss.dual_clipfrac_sum, tokens)
        if first and tokens:
            self.tally.mean("actor/first_clipfrac", loss.pg_clipfrac_sum, tokens)
            self.tally.top("actor/first_ratio_max", loss.ratio_max)
            self.tally.bottom("actor/first_ratio_min", loss.ratio_min)
        self.seconds["actor"] += time.perf_counter() - start
        return Computed(own, entropies.detach(), float(loss.ppo_kl_sum), float(loss.pg_clipfrac_sum))

    def _weights(self, difference: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """What each token's loss is multiplied by, given the learner's logprob minus the sampler's: [N] -> [N]."""
        mask = response_mask(batch.response_lengths).to(difference.device)
        frame = difference.new_zeros(mask.shape)
        frame[mask] = difference
        return self._weigh(frame, mask)[mask]

    def _kl(self, logprobs: torch.Tensor, terms: Terms) -> torch.Tensor:
        """How far each token is from the reference, with gradient: [N]."""
        kl = at_tokens(ESTIMATORS[self._cfg.kl.loss_estimator](logprobs, terms.ref), terms.mask)
        self.tally.mean("actor/kl_loss", float(kl.detach().sum()), float(terms.mask.sum()))
        return kl
