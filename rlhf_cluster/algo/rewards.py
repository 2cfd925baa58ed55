"""From one score per response to one reward per token.

Takes scores [B], and [B, T] logprobs of policy and reference, right-padded with a mask; gives the per-token rewards
that advantages are made of. It knows neither who scored nor how the KL coefficient is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cluster.algo.kl import k1
from rlhf_cluster.algo.masked import at_tokens


def shape_scores(scores: Tensor, ended: Tensor, missing_eos_penalty: float, clip: float) -> Tensor:
    """Scores as PPO sees them: clipped, then lowered where the response did not end.

        s' = clip(s, -c, c) - penalty * [no EOS]

    scores [B], ended bool [B]; returns [B]. Subtracted, as in TRL's `missing_eos_penalty`; lm-human-preferences puts a
    constant in the score's place instead. The clip comes first so that it never hides the penalty; clip = 0 is no clip.
    Not in InstructGPT. Raises ValueError for a negative clip or penalty.
    """
    if clip < 0 or missing_eos_penalty < 0:
        raise ValueError(f"clip={clip}, missing_eos_penalty={missing_eos_penalty}; neither may be negative")
    clipped = scores.clamp(-clip, clip) if clip else scores
    return torch.where(ended, clipped, clipped - missing_eos_penalty)


def kl_shaped_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """InstructGPT eq. (2) (Ouyang et al. 2022, arXiv:2203.02155), as Ziegler et al. 2019 (arXiv:1909.08593, eq. 2).

        r_t = -beta * (log pi(a_t) - log pi_ref(a_t)) + [t is the last token] * score

    Leaving the reference costs at every token; what the reward model says comes at the end. `logprobs` are those of the
    policy before the update. scores [B], the rest [B, T], right-padded.
    Returns (rewards, non_score_rewards) [B, T], the latter without the score; zero where mask is 0.
    Raises ValueError for a row without a token: its score would be lost.
    """
    lengths = mask.bool().sum(1)
    if bool((lengths == 0).any()):
        rows = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows} of {len(lengths)} have a score but no response token to put it on; drop them")
    non_score_rewards = at_tokens(-kl_coef * k1(logprobs, ref_logprobs), mask)
    last = (lengths - 1).unsqueeze(1)
    rewards = non_score_rewards.scatter_add(1, last, scores.to(non_score_rewards.dtype).unsqueeze(1))
    return rewards, non_score_rewards
