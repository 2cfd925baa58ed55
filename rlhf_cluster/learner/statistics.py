"""What an update says of itself, as sums that ranks add up: nothing here is a mean until every rank has spoken."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_cluster.algo.losses import explained_variance_of
from rlhf_cluster.algo.masked import moments
from rlhf_cluster.algo.off_policy import effective_share, truncated_weights
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.learner.experience import Experience
from rlhf_cluster.models.batching import response_mask, to_response_frame

SPREAD = ("mean", "max", "min")


@dataclass
class Tally:
    """Named observations: weighted means (sum and weight), largest and smallest values."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    weights: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tops: dict[str, float] = field(default_factory=dict)
    bottoms: dict[str, float] = field(default_factory=dict)

    def mean(self, name: str, total: float, weight: float) -> None:
        """`total` is a sum over `weight` things; the metric is the mean over all ranks' things."""
        self.sums[name] += float(total)
        self.weights[name] += float(weight)

    def top(self, name: str, value: float) -> None:
        self.tops[name] = max(self.tops.get(name, -np.inf), float(value))

    def bottom(self, name: str, value: float) -> None:
        self.bottoms[name] = min(self.bottoms.get(name, np.inf), float(value))

    def spread(self, prefix: str, values: np.ndarray) -> None:
        """`prefix/mean`, `prefix/max` and `prefix/min`."""
        self.mean(f"{prefix}/mean", values.sum(), values.size)
        if values.size:
            self.top(f"{prefix}/max", values.max())
            self.bottom(f"{prefix}/min", values.min())

    def over(self, ranks: Ranks) -> dict[str, float]:
        """The metrics of all ranks together. A collective."""
        total = Tally()
        for tally in ranks.gather((dict(self.sums), dict(self.weights), self.tops, self.bottoms)):
            sums, weights, tops, bottoms = tally
            for name in sums:
                total.mean(name, sums[name], weights[name])
            for name, value in tops.items():
                total.top(name, value)
            for name, value in bottoms.items():
                total.bottom(name, value)
        means = {name: total.sums[name] / max(total.weights[name], 1e-12) for name in total.sums}
        return means | total.tops | total.bottoms


def tally_experience(tally: Tally, experience: Experience, weight_version: int, referenced: bool) -> None:
    """The batch before the update: scores, rewards, KL to the reference where there is one, lengths, staleness, sampler
    mismatch."""
    rows = experience.rows
    tally.spread("critic/score", np.array([row.score for row in rows]))
    tally.spread("critic/rewards", _flat(experience.rewards))
    tally.spread("critic/advantages", _flat(experience.advantages))
    tally.spread("response_length", np.array([len(row.response_ids) for row in rows]))
    tally.mean("response_length/clip_ratio", sum(not row.ended for row in rows), len(rows))
    tally.mean("objective/scores", sum(row.score for row in rows), len(rows))
    if referenced:
        kl = [float((row.old_logprobs - row.ref_logprobs).sum()) for row in rows]
        tally.mean("objective/kl", sum(kl), len(rows))
    tally.mean("objective/rlhf_reward", _flat(experience.rewards).sum(), len(rows))
    tally.mean("objective/non_score_reward", _flat(experience.non_score_rewards).sum(), len(rows))
    entropies = _flat([row.entropies for row in rows])
    tally.mean("objective/entropy", entropies.sum(), entropies.size)
    difference = _flat([row.old_logprobs for row in rows]) - _flat([row.rollout_logprobs for row in rows])
    # k3 between sampler and learner: never negative, so a mismatch cannot cancel out.
    tally.mean("rollout/mismatch_kl", (np.expm1(difference) - difference).sum(), difference.size)
    tally.top("rollout/logprob_diff_max", np.abs(difference).max(initial=0.0))
    tally.mean("rollout/logprob_diff_mean", np.abs(difference).sum(), difference.size)
    staleness = weight_version - _flat([row.weight_versions for row in rows])
    tally.mean("rollout/staleness", staleness.sum(), staleness.size)
    tally.top("rollout/staleness_max", staleness.max(initial=0))
    weights = _flat(experience.weights)
    tally.mean("rollout/masked", (weights == 0).sum(), weights.size)
    tally.mean("prompt_length/mean", sum(len(row.prompt_ids) for row in rows), len(rows))


def tally_values(tally: Tally, experience: Experience) -> None:
    """What the critic said before the update, and what it should have said."""
    tally.spread("critic/returns", _flat(experience.returns))
    tally.spread("critic/values", _flat([row.values for row in experience.rows]))


def explained_variance(experience: Experience, ranks: Ranks) -> float:
    """Of the values before the update, over all ranks. A collective."""
    mask = response_mask([len(row.response_ids) for row in experience.rows])
    values = to_response_frame([row.values for row in experience.rows])
    returns = to_response_frame(experience.returns)
    residual, total = ranks.sum(moments(returns - values, mask)), ranks.sum(moments(returns, mask))
    return float(explained_variance_of(residual, total))


def effective_samples(experience: Experience, ranks: Ranks) -> float:
    """The share of the batch's tokens that is left when each weighs as the policy before the update weighs it against
    the sampler. A collective."""
    rows = experience.rows
    mask = response_mask([len(row.response_ids) for row in rows])
    difference = to_response_frame([row.old_logprobs - row.rollout_logprobs for row in rows])
    return effective_share(ranks.sum(moments(truncated_weights(difference, mask, math.inf), mask)))


def _flat(ragged: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(ragged).astype(np.float64) if len(ragged) else np.zeros(0)


def seconds_by_part(seconds: Mapping[str, float]) -> dict[str, float]:
    """Of rank 0; not among `timing_s/`, since these lie within the driver's parts `old_log_prob` and `update`."""
    return {f"learner_s/{part}": value for part, value in seconds.items()}
