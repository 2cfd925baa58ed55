"""From per-token rewards and values to advantages and returns.

Takes [B, T] tensors, right-padded with a mask, and gives the same shape. Whitening is not done here: it needs the
statistics of all ranks (`masked`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cluster.algo.masked import at_tokens


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        delta_t = r_t + gamma * V_{t+1} - V_t        A_t = delta_t + gamma * lam * A_{t+1}        R_t = A_t + V_t

    A_t says how much better token t turned out than the critic thought before it; R_t is what the critic should have
    said. All [B, T], right-padded. The value after a response's last token is 0: a response is an episode.
    Returns (advantages, returns), zero where mask is 0.
    """
    rewards, values = at_tokens(rewards, mask), at_tokens(values, mask)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    later = deltas.new_zeros(deltas.shape[0])
    # Padding needs no branch: rewards and values are 0 there, so nothing but 0 comes back from it.
    for t in reversed(range(deltas.shape[1])):
        later = deltas[:, t] + gamma * lam * later
        advantages[:, t] = later
    return advantages, advantages + values
