"""From rewards to advantages: with a critic's values, or against what the other responses to the same prompt earned.

Takes [B, T] tensors, right-padded with a mask, and gives the same shape; what compares whole responses takes and gives
[B]. Whitening is not done here: it needs the statistics of all ranks (`masked`).
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


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """What each token's response still earned (Williams 1992; REINFORCE++, Hu et al. 2025, arXiv:2501.03262, eq. 5).

        G_t = r_t + gamma * G_{t+1}

    All [B, T], right-padded; zero where mask is 0. With values of 0 and lambda 1 it is what `gae` gives.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def group_relative(outcomes: Tensor, groups: Tensor, scale: bool) -> Tensor:
    """How much better a response did than the others to its prompt (GRPO: Shao et al. 2024, arXiv:2402.03300, 4.1.2).

        A_i = (o_i - mean(o of its group)) / (std(o of its group) + 1e-6)

    Without `scale` nothing is divided by (Dr. GRPO: Liu et al. 2025, arXiv:2503.20783, section 3.2: the deviation would
    give prompts that are too easy or too hard more weight). The deviation is the unbiased one, as in TRL and verl.
    outcomes [B], groups int64 [B] from 0: a number per prompt -> [B]. A group of equal outcomes, or of one, says
    nothing: 0.
    """
    count, mean = _group_means(outcomes, groups)
    centred = outcomes - mean
    if not scale:
        return centred
    squares = torch.zeros_like(outcomes).index_add(0, groups, centred.square())[groups]
    return centred / ((squares / (count - 1).clamp(min=1)).sqrt() + 1e-6)


def leave_one_out(outcomes: Tensor, groups: Tensor) -> Tensor:
    """What a response earned beyond the mean of the others to its prompt (RLOO: Ahmadian et al. 2024, arXiv:2402.14740,
    eq. 6).

        A_i = o_i - 1 / (n - 1) * sum_{j != i} o_j

    outcomes [B], groups int64 [B] from 0 -> [B]. A baseline that does not depend on the response itself leaves the
    policy gradient unbiased. A group of one says nothing: 0.
    """
    count, mean = _group_means(outcomes, groups)
    return (outcomes - mean) * count / (count - 1).clamp(min=1)


def _group_means(outcomes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Size and mean of each response's group, both [B]."""
    zeros = torch.zeros_like(outcomes)
    count = zeros.index_add(0, groups, torch.ones_like(outcomes))[groups]
    return count, zeros.index_add(0, groups, outcomes)[groups] / count
