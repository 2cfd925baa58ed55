"""The losses of the three stages.

Takes what a forward pass gave - logprobs, values, scores - and gives sums over tokens, or the mean over one prompt's
pairs. It never divides by a micro-batch: the caller divides by the tokens (or prompts) of the global minibatch, so that
neither the micro-batch split nor the number of ranks changes the gradient. Right-padded [B, T] float32 with a mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_cluster.algo.masked import at_tokens, masked_sum, mean_var, moments
from rlhf_cluster.algo.off_policy import MOST


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """Scalars over the real tokens of one micro-batch; only `losses` and their sum carry a gradient."""

    loss_sum: Tensor
    losses: Tensor  # of each token, 0 where mask is 0
    pg_clipfrac_sum: Tensor  # tokens whose clipped loss is the larger
    dual_clipfrac_sum: Tensor  # tokens that the dual clip holds
    ppo_kl_sum: Tensor  # 0.5 * (logprobs - old_logprobs)^2: distance from the policy before the update
    ratio_max: Tensor  # largest ratio; 0 (no ratio is) where there is no token
    ratio_min: Tensor  # smallest ratio; inf where there is no token


@dataclass(frozen=True, eq=False)
class ValueLoss:
    """Scalars over the real tokens of one micro-batch; only `loss_sum` carries a gradient."""

    loss_sum: Tensor
    vf_clipfrac_sum: Tensor  # tokens whose clipped error is the larger


@dataclass(frozen=True, eq=False)
class RankingLoss:
    """One prompt's ranking: `loss` is the mean over its kept pairs, with gradient; the rest are sums over them."""

    loss: Tensor
    pairs: Tensor  # pairs of unequal rank
    correct_pairs: Tensor  # of these, the pairs whose better response has the higher score; equal ones count half
    margin_sum: Tensor  # score of the better minus score of the worse


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    clip_high: float = 0.0,
    dual_clip: float = 0.0,
    lengths: Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7), as a loss, summed over tokens.

        rho_t = exp(logprobs_t - old_logprobs_t)        L_t = max(-A_t rho_t, -A_t clip(rho_t, 1 - c, 1 + h))

    A token may be made less or more likely by a factor of 1 - c or 1 + h before it stops to pull. h is `clip_high`,
    where it is not 0 (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 10), else c. Where A_t < 0 that bounds nothing from
    above: with a `dual_clip` d > 1 (Ye et al. 2020, arXiv:1912.09729, eq. 5) L_t is -A_t d at most there.
    With `lengths` [S] everything is flat, [N], one response after the other, and rho is the response's: the geometric
    mean of its tokens' ratios (GSPO: Zheng et al. 2025, arXiv:2507.18071, eq. 7). Ratios beyond e^20 or below e^-20
    count as that, and pull no more.
    Else all [B, T]; the gradient flows into `logprobs` alone. An empty mask gives zero loss and zero gradient.
    """
    log_ratio = at_tokens(logprobs - old_logprobs.detach(), mask).clamp(-MOST, MOST)
    if lengths is not None:
        log_ratio = _response_means(log_ratio, lengths)
    ratio = log_ratio.exp()
    advantages = at_tokens(advantages.detach(), mask)
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + (clip_high or clip))
    losses = torch.maximum(free, held)
    dual = (advantages < 0) & (losses > -advantages * dual_clip) if dual_clip else torch.zeros_like(mask).bool()
    seen = ratio.detach()[mask.bool()]
    losses = at_tokens(torch.where(dual, -advantages * dual_clip, losses), mask)
    return PolicyLoss(
        loss_sum=masked_sum(losses, mask),
        losses=losses,
        pg_clipfrac_sum=masked_sum((held > free).float(), mask),
        dual_clipfrac_sum=masked_sum(dual.float(), mask),
        ppo_kl_sum=masked_sum(0.5 * log_ratio.detach().square(), mask),
        ratio_max=torch.cat([seen, seen.new_zeros(1)]).max(),
        ratio_min=torch.cat([seen, seen.new_full((1,), float("inf"))]).min(),
    )


def _response_means(values: Tensor, lengths: Tensor) -> Tensor:
    """Each response's mean at each of its tokens: [N] and [S] -> [N]."""
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    return (values.new_zeros(len(lengths)).index_add(0, owner, values) / lengths)[owner]


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, value_clip: float) -> ValueLoss:
    """The clipped squared error of the critic, summed over tokens (lm-human-preferences, Ziegler et al. 2019).

        L = sum_t 1/2 max((V_t - R_t)^2, (clip(V_t, Vold_t - c, Vold_t + c) - R_t)^2)

    A value that has moved more than c towards its return stops to be pulled; c = 0 holds none. Not in InstructGPT. All
    [B, T]; the gradient flows into `values` alone. An empty mask gives zero loss and zero gradient.
    """
    values, old_values = at_tokens(values, mask), at_tokens(old_values.detach(), mask)
    returns = at_tokens(returns.detach(), mask)
    held = values.clamp(old_values - value_clip, old_values + value_clip) if value_clip else values
    free_error, held_error = (values - returns).square(), (held - returns).square()
    return ValueLoss(
        loss_sum=masked_sum(0.5 * torch.maximum(free_error, held_error), mask),
        vf_clipfrac_sum=masked_sum((held_error > free_error).float(), mask),
    )


def ranking_loss(scores: Tensor, ranks: Tensor, smoothing: float = 0.0) -> RankingLoss:
    """The reward model's loss on one prompt (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

        L = -1 / |kept pairs| * sum_{(w, l)} log sigmoid(r_w - r_l)

    scores [K], ranks [K], 1 the best. All pairs of a prompt are one batch element; pairs of equal rank say nothing and
    are dropped, so C(K, 2) becomes the number of kept pairs. Only ties (or K = 1): zero loss, zero gradient, zero
    pairs. The caller takes the mean over prompts, not over pooled pairs.
    With scores of beta x log-ratio to a reference it is DPO's loss (Rafailov et al. 2023, arXiv:2305.18290, eq. 7);
    `smoothing` is the share of pairs taken to be ranked the wrong way round (the conservative DPO of Mitchell 2023).
    """
    margins = _margins(scores, ranks)
    losses = -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)
    return _over_pairs(losses, margins)


def ipo_loss(log_ratios: Tensor, ranks: Tensor, beta: float) -> RankingLoss:
    """Identity preference optimization on one prompt (Azar et al. 2023, arXiv:2310.12036, eq. 17; tau is beta).

        L = 1 / |kept pairs| * sum_{(w, l)} (h_w - h_l - 1 / (2 beta))^2        h = log pi(y|x) / pi_ref(y|x)

    log_ratios [K], ranks [K], 1 the best. The margin is driven to a finite place, which no sure preference moves on.
    Margins are those of the rewards beta x h. The log ratios are sums over tokens, as in the paper; TRL divides each by
    its response's length, so its beta is not this one.
    """
    margins = _margins(log_ratios, ranks)
    return _over_pairs((margins - 1 / (2 * beta)).square(), beta * margins)


def kto_loss(log_ratios: Tensor, ranks: Tensor, kl: float, beta: float) -> RankingLoss:
    """Kahneman-Tversky optimization on one prompt (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).

        L = mean of 1 - sigmoid(beta (h - kl)) over the best, 1 - sigmoid(beta (kl - h)) over the worst responses

    log_ratios h [K], ranks [K], 1 the best; what is neither best nor worst says nothing, as where all tie. `kl`, at
    least 0, is the distance of policy and reference over the batch, without gradient; both weights are 1.
    """
    best, worst = ranks == ranks.min(), ranks == ranks.max()
    sides = torch.where(best, 1.0, -1.0).to(log_ratios)
    told = (best | worst) & (ranks.min() < ranks.max())
    losses = 1 - torch.sigmoid(beta * sides * (log_ratios - kl))
    whole = _over_pairs(losses.new_zeros(0), beta * _margins(log_ratios, ranks))
    return replace(whole, loss=masked_sum(losses, told) / max(int(told.sum()), 1))


def _margins(scores: Tensor, ranks: Tensor) -> Tensor:
    """Score of the better minus score of the worse, for every pair of unequal rank: [pairs]."""
    margins = scores.unsqueeze(1) - scores.unsqueeze(0)
    return margins[ranks.unsqueeze(1) < ranks.unsqueeze(0)]


def _over_pairs(losses: Tensor, margins: Tensor) -> RankingLoss:
    return RankingLoss(
        loss=losses.sum() / max(len(losses), 1),
        pairs=torch.tensor(len(margins), device=margins.device),
        correct_pairs=(margins.detach() > 0).sum() + 0.5 * (margins.detach() == 0).sum(),
        margin_sum=margins.detach().sum(),
    )


def sft_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of the demonstrations' response tokens, EOS among them (Ouyang et al. 2022, section 3.5).

        L = -sum_t log pi(a_t)

    Both [B, T] or [N]. Returns the scalar sum, with gradient; 0 for an empty mask.
    """
    return -masked_sum(logprobs, mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """How much of the returns' variance the critic foresaw: 1 all, 0 no better than a constant, negative worse.

        1 - Var(R - V) / Var(R)

    All [B, T]; returns a float64 scalar, 0 where the returns do not vary (or there is no token).
    """
    return explained_variance_of(moments(returns - values, mask), moments(returns, mask))


def explained_variance_of(residual_moments: Tensor, return_moments: Tensor) -> Tensor:
    """`explained_variance` of `moments(returns - values, mask)` and `moments(returns, mask)`, added up over ranks."""
    (_, residual), (mean, total) = mean_var(residual_moments), mean_var(return_moments)
    # Equal returns leave a variance of rounding errors, not always of 0.
    varied = total > 1e-12 * mean.square()
    return torch.where(varied, 1 - residual / total.where(varied, torch.ones_like(total)), torch.zeros_like(total))
