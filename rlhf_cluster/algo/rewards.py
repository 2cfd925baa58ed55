"""From one score per response to one reward per token.

Takes scores [B], and [B, T] estimates of the KL per token, right-padded with a mask; gives the per-token rewards that
advantages are made of. It knows neither who scored nor how the KL is estimated and its coefficient chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_cluster.algo.masked import at_tokens


def shape_scores(
    scores: Tensor, ended: Tensor, missing_eos_penalty: float, clip: float, replace: bool = False
) -> Tensor:
    """Scores as PPO sees them: clipped, then lowered where the response did not end.

        s' = clip(s, -c, c) - penalty * [no EOS]        with `replace`: -penalty where there is no EOS

    scores [B], ended bool [B] -> [B]. Subtracted as in TRL's `missing_eos_penalty`; put in the score's place as in
    lm-human-preferences (Ziegler et al. 2019, their code: -1). The clip comes first, so that it never hides the
    penalty; clip = 0 is no clip. Not in InstructGPT. Raises ValueError for a negative clip or penalty.
    """
    if clip < 0 or missing_eos_penalty < 0:
        raise ValueError(f"clip={clip}, missing_eos_penalty={missing_eos_penalty}; neither may be negative")
    clipped = scores.clamp(-clip, clip) if clip else scores
    unended = torch.full_like(scores, -missing_eos_penalty) if replace else clipped - missing_eos_penalty
    return torch.where(ended, clipped, unended)


def overlong_penalty(lengths: Tensor, limit: int, buffer: float) -> Tensor:
    """What a response loses that comes near the longest allowed (DAPO: Yu et al. 2025, arXiv:2503.14476, eq. 13).

        0 up to length L - B, then falling in a straight line to -1 at L

    lengths [B] in tokens, at most L = `limit`; B = `buffer` > 0 -> f32 [B] in [-1, 0].
    """
    return -((lengths - (limit - buffer)).float() / buffer).clamp(0.0, 1.0)


@dataclass
class ScoreMoments:
    """Mean and variance of all scores that were told, one batch after the other (Chan et al. 1979, eq. 2.1)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared differences from the mean

    def tell(self, scores: np.ndarray) -> None:
        """scores [B], finite."""
        if not len(scores):
            return
        count, mean = float(len(scores)), float(np.mean(scores, dtype=np.float64))
        squares, apart = float(np.square(scores - mean, dtype=np.float64).sum()), mean - self.mean
        total = self.count + count
        self.squares += squares + apart**2 * self.count * count / total
        self.mean += apart * count / total
        self.count = total

    @property
    def std(self) -> float:
        """The biased standard deviation; 1 as long as the scores do not vary, which leaves them as they are."""
        variance = self.squares / self.count if self.count else 0.0
        return variance**0.5 if variance > 1e-12 else 1.0


def kl_shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> tuple[Tensor, Tensor]:
    """InstructGPT eq. (2) (Ouyang et al. 2022, arXiv:2203.02155), as Ziegler et al. 2019 (arXiv:1909.08593, eq. 2).

        r_t = -beta * KL_t + [t is the last token] * score        there: KL_t = log pi(a_t) - log pi_ref(a_t)

    Leaving the reference costs at every token; what the reward model says comes at the end. `kl` estimates the KL of
    the policy before the update at each token (`kl.k1` in the papers). scores [B], the rest [B, T], right-padded.
    Returns (rewards, non_score_rewards) [B, T], the latter without the score; zero where mask is 0.
    Raises ValueError for a row without a token: its score would be lost.
    """
    lengths = mask.bool().sum(1)
    if bool((lengths == 0).any()):
        rows = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows} of {len(lengths)} have a score but no response token to put it on; drop them")
    non_score_rewards = at_tokens(-kl_coef * kl, mask)
    last = (lengths - 1).unsqueeze(1)
    rewards = non_score_rewards.scatter_add(1, last, scores.to(non_score_rewards.dtype).unsqueeze(1))
    return rewards, non_score_rewards
