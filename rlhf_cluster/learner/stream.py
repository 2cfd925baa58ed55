"""Gradients as groups arrive, for batches in which nothing of a group's gradient waits for the rest of the batch: one
minibatch, one epoch, and advantages that compare responses to one prompt alone.

Each row is then computed once: old logprobs are those of the forward that the gradient comes from, and responses to a
prompt share it. The loss's divisor is not known before the batch is whole, so the gradient is one of a sum that the
optimizer's step puts right.
"""

from __future__ import annotations

import numpy as np

from rlhf_cluster.config import GenerationConfig, PPOConfig
from rlhf_cluster.learner.experience import Evaluation, evaluated_rows, make_experience
from rlhf_cluster.learner.gradient import PolicyGradient
from rlhf_cluster.learner.models import ActorCritic
from rlhf_cluster.models.batching import in_order
from rlhf_cluster.records import Controls, ScoredRollouts


class GradientStream:
    """Of all batches of a run."""

    def __init__(self, models: ActorCritic, cfg: PPOConfig, generation: GenerationConfig) -> None:
        self._models, self._cfg, self._generation = models, cfg, generation

    def is_enough(self, tokens: int) -> bool:
        """Whether they fill a micro-batch on some rank: each takes a pass over all of the gradient. A collective."""
        return self._models.ranks.max(tokens) >= self._models.tokens_per_micro_batch

    def evaluate(self, rows: ScoredRollouts, gradient: PolicyGradient) -> Evaluation:
        """What the policy says of whole groups, whose gradient is in its engine then. A collective."""
        unknown = Evaluation(rows.rollout_logprobs, rows.rollout_logprobs, [np.zeros(0)] * len(rows))
        members = evaluated_rows(rows, unknown)
        controls, longest = Controls(0.0), self._generation.max_response_tokens
        experience = make_experience(members, self._cfg, controls, self._models.ranks, longest)
        batches = self._models.micro_batches(rows.prompt_ids, rows.response_ids)
        computed = []
        for batch in batches:
            terms = gradient.terms(batch, experience, range(len(rows)), moved=False)
            divisor, kl_coef = float(self._cfg.batch_size), self._cfg.kl.loss_coef
            computed.append(gradient.add(batch, terms, divisor, kl_coef, first=True))
        pairs = list(zip(batches, computed, strict=True))
        logprobs = [batch.split(one.logprobs) for batch, one in pairs]
        entropies = [batch.split(one.entropies) for batch, one in pairs]
        values = [self._models.critic.values(batch) for batch in batches]  # there is none, and it says 0
        return Evaluation(*(in_order(batches, parts, len(rows)) for parts in (logprobs, entropies, values)))
