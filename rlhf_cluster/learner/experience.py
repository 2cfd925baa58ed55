"""From evaluated rows to what a minibatch trains on: KL-shaped rewards, advantages, whitening over all ranks.

Score and reward are two things: the score is what the reward model said of a response, the rewards are what PPO sees at
each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_cluster.algo.kl import ESTIMATORS
from rlhf_cluster.algo.masked import mean_var, moments, whiten
from rlhf_cluster.algo.rewards import kl_shaped_rewards, overlong_penalty, shape_scores
from rlhf_cluster.config import PPOConfig
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.learner.estimators import Rewarded, make_estimator
from rlhf_cluster.learner.weighing import make_weigher
from rlhf_cluster.models.batching import from_response_frame, response_mask, to_response_frame
from rlhf_cluster.records import Controls, ReferencedRollouts, ScoredRollouts


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluatedRow:
    """A row as the learner holds it before the update; arrays are per response token, [R], unless said otherwise."""

    sample_id: str
    prompt_id: str
    prompt_ids: np.ndarray  # i32 [P]
    response_ids: np.ndarray  # i32 [R]
    rollout_logprobs: np.ndarray
    ref_logprobs: np.ndarray  # the old logprobs where there is no reference: their KL is 0
    old_logprobs: np.ndarray
    values: np.ndarray  # 0 without a critic
    entropies: np.ndarray
    weight_versions: np.ndarray
    score: float
    ended: bool


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What policy and critic say: per response token, one f32 [R] per row."""

    logprobs: list[np.ndarray]
    entropies: list[np.ndarray]
    values: list[np.ndarray]


def evaluated_rows(rows: ScoredRollouts, evaluation: Evaluation) -> list[EvaluatedRow]:
    """Rows as they came, with what was said of them."""
    ref_logprobs = rows.ref_logprobs if isinstance(rows, ReferencedRollouts) else evaluation.logprobs
    columns = {
        "sample_id": rows.sample_id,
        "prompt_id": rows.prompt_id,
        "prompt_ids": rows.prompt_ids,
        "response_ids": rows.response_ids,
        "rollout_logprobs": rows.rollout_logprobs,
        "ref_logprobs": ref_logprobs,
        "old_logprobs": evaluation.logprobs,
        "values": evaluation.values,
        "entropies": evaluation.entropies,
        "weight_versions": rows.weight_versions,
        "score": rows.score.tolist(),
        "ended": [reason == "stop" for reason in rows.finish_reason],
    }
    whole = zip(*columns.values(), strict=True)
    return [EvaluatedRow(**dict(zip(columns, fields, strict=True))) for fields in whole]


@dataclass(frozen=True, eq=False)
class Experience:
    """Evaluated rows with what PPO made of them; row i of each list belongs to `rows[i]`."""

    rows: Sequence[EvaluatedRow]
    rewards: list[np.ndarray]
    non_score_rewards: list[np.ndarray]  # the KL penalty alone
    advantages: list[np.ndarray]
    returns: list[np.ndarray]
    weights: list[np.ndarray]  # what the policy's loss of each token is multiplied by
    index: Mapping[str, int]  # row of a sample id


def make_experience(
    rows: Sequence[EvaluatedRow], cfg: PPOConfig, controls: Controls, ranks: Ranks, max_response_tokens: int
) -> Experience:
    """InstructGPT eq. (2) rewards and the configured advantages; whitening statistics are those of all ranks. A
    collective."""
    lengths = [len(row.response_ids) for row in rows]
    mask = response_mask(lengths)
    old_logprobs = to_response_frame([row.old_logprobs for row in rows])
    sampled = to_response_frame([row.rollout_logprobs for row in rows])
    shaped = _shaped_scores(rows, cfg, controls, max_response_tokens)
    kl = ESTIMATORS[cfg.kl.estimator](old_logprobs, to_response_frame([row.ref_logprobs for row in rows]))
    rewards, non_score_rewards = kl_shaped_rewards(shaped, kl, mask, controls.kl_coef)
    if cfg.advantage.whiten_rewards:
        rewards = _whiten(rewards, mask, ranks, shift_mean=False)
    values = to_response_frame([row.values for row in rows])
    prompts, samples = [row.prompt_id for row in rows], [row.sample_id for row in rows]
    estimate = make_estimator(cfg.advantage)(Rewarded(rewards, values, mask, prompts, samples), ranks)
    advantages = estimate.advantages
    if cfg.advantage.whiten:
        advantages = _whiten(advantages, mask, ranks, shift_mean=True)
    return Experience(
        rows,
        from_response_frame(rewards, lengths),
        from_response_frame(non_score_rewards, lengths),
        from_response_frame(advantages, lengths),
        from_response_frame(estimate.returns, lengths),
        from_response_frame(make_weigher(cfg)(old_logprobs - sampled, mask), lengths),
        {row.sample_id: i for i, row in enumerate(rows)},
    )


def _shaped_scores(
    rows: Sequence[EvaluatedRow], cfg: PPOConfig, controls: Controls, max_response_tokens: int
) -> torch.Tensor:
    """Scores as they enter the rewards, f32 [B]."""
    scores = torch.tensor([row.score for row in rows], dtype=torch.float32)
    ended = torch.tensor([row.ended for row in rows], dtype=torch.bool)
    scores = (scores - controls.score_mean) / controls.score_std
    shaped = shape_scores(scores, ended, cfg.missing_eos_penalty, cfg.score_clip, cfg.missing_eos == "replace")
    if not cfg.overlong_buffer:
        return shaped
    lengths = torch.tensor([len(row.response_ids) for row in rows])
    buffer = cfg.overlong_buffer * max_response_tokens
    return shaped + cfg.overlong_penalty * overlong_penalty(lengths, max_response_tokens, buffer)


def _whiten(values: torch.Tensor, mask: torch.Tensor, ranks: Ranks, shift_mean: bool) -> torch.Tensor:
    mean, var = mean_var(ranks.sum(moments(values, mask)))
    return whiten(values, mask, mean, var, shift_mean)
