"""What a token counts for that another policy sampled than the one that the update starts from: older weights, or the
sampler's own arithmetic.

With d_t = old_logprobs_t - rollout_logprobs_t, the learner's word on a token minus the sampler's, the policy loss of a
token is multiplied by what these functions give, so that PPO's own ratio goes on measuring the distance from the policy
before the update alone: decoupled PPO (Hilton et al. 2021, arXiv:2110.00641, section 3).
"""

from __future__ import annotations

from torch import Tensor

from rlhf_cluster.algo.masked import at_tokens

MOST = 20.0  # of a response's summed d: exp of more is beyond any cap and near the end of float32


def of_responses(difference: Tensor, mask: Tensor, mean: bool = False) -> Tensor:
    """The sum (or mean) of d over each response, at each of its tokens: [B, T] -> [B, T]."""
    total = at_tokens(difference, mask).sum(-1, keepdim=True)
    if mean:
        total = total / mask.sum(-1, keepdim=True).clamp(min=1)
    return at_tokens(total.expand_as(difference), mask)


def truncated_weights(difference: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling (Espeholt et al. 2018, arXiv:1802.01561, section 4.1, rho; for samplers that differ
    from the learner: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").

        w_t = min(exp(d_t), cap)

    [B, T], or of `of_responses` for a weight of whole responses. 0 where mask is 0. No gradient.
    """
    return at_tokens(difference.detach().clamp(max=MOST).exp().clamp(max=cap), mask)


def within(difference: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """Which tokens are near enough to be learnt from: low <= exp(d_t) <= high, bool [B, T], false where mask is 0.

    Of tokens, with a weight of tokens whose cap is `high`: IcePop (Ling team 2025, arXiv:2510.18855). Of
    `of_responses`: whole responses stay or go, by the product of their ratios, or by its geometric mean.
    """
    ratio = difference.detach().clamp(-MOST, MOST).exp()
    return mask.bool() & (ratio >= low) & (ratio <= high)


def effective_share(moments: Tensor) -> float:
    """The effective sample size as a share of the samples (Kong 1992), of the `moments` of importance weights.

        (sum w)^2 / (n sum w^2)

    1 where all weigh the same, 1 / n where one outweighs all others; 0 where there is none.
    """
    count, total, squares = moments.tolist()
    return total**2 / (count * squares) if squares else 0.0
