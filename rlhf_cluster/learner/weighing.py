"""What a token counts for that another policy sampled: one function for each way, chosen once from the config.

Takes what the learner says of each token minus what the sampler said, gives the weights of the policy's loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from rlhf_cluster.algo.off_policy import of_responses, truncated_weights, within
from rlhf_cluster.config import PPOConfig

Weigher = Callable[[Tensor, Tensor], Tensor]  # old_logprobs - rollout_logprobs, mask -> weights, all [B, T]
Scope = Callable[[Tensor, Tensor], Tensor]  # the same differences, of tokens or of what they belong to


def of_tokens(difference: Tensor, mask: Tensor) -> Tensor:
    return difference


SCOPES: dict[str, Scope] = {
    "token": of_tokens,
    "response": of_responses,
    "response_mean": partial(of_responses, mean=True),
}


def make_weigher(cfg: PPOConfig) -> Weigher:
    asked = cfg.off_policy
    weights, kept = SCOPES.get(cfg.off_policy_weights), SCOPES.get(asked.mask)

    def weigh(difference: Tensor, mask: Tensor) -> Tensor:
        weight = mask.to(difference.dtype)
        if weights is not None:
            weight = truncated_weights(weights(difference, mask), mask, asked.cap)
        if kept is not None:
            weight = weight * within(kept(difference, mask), mask, asked.low, asked.high)
        return weight

    return weigh
