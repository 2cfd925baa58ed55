"""The advantage estimator: one object for each way from rewards to advantages, chosen once from the config.

Takes per-token rewards and values of this rank's rows, gives advantages and returns of the same shape. A response is
measured by the others to its prompt wherever those are: their outcomes are few numbers, and every rank gets them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from rlhf_cluster.algo.advantages import gae, group_relative, leave_one_out, returns_to_go
from rlhf_cluster.algo.masked import at_tokens
from rlhf_cluster.config import AdvantageConfig
from rlhf_cluster.engine.ranks import Ranks


@dataclass(frozen=True)
class Estimate:
    """Both [B, T], 0 where there is no token. `returns` are what a critic should have said."""

    advantages: Tensor
    returns: Tensor


class Estimator(Protocol):
    """rewards, values and mask [B, T]; prompt and sample id of each row. A collective."""

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor,
        prompt_ids: Sequence[str],
        sample_ids: Sequence[str],
        ranks: Ranks,
    ) -> Estimate: ...


@dataclass(frozen=True)
class OfValues:
    """Generalized advantage estimation: what a critic expected is the baseline."""

    gamma: float
    lam: float

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor,
        prompt_ids: Sequence[str],
        sample_ids: Sequence[str],
        ranks: Ranks,
    ) -> Estimate:
        return Estimate(*gae(rewards, values, mask, self.gamma, self.lam))


@dataclass(frozen=True)
class OfReturns:
    """REINFORCE++: no baseline but the whole batch's mean, which whitening takes out."""

    gamma: float

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor,
        prompt_ids: Sequence[str],
        sample_ids: Sequence[str],
        ranks: Ranks,
    ) -> Estimate:
        returns = returns_to_go(rewards, mask, self.gamma)
        return Estimate(returns, returns)


@dataclass(frozen=True)
class OfGroups:
    """The other responses to the same prompt are the baseline. A response's outcome is the sum of its rewards; what it
    did better is every token's advantage."""

    compare: Callable[[Tensor, Tensor], Tensor]  # outcomes [B], groups [B] -> [B]

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor,
        prompt_ids: Sequence[str],
        sample_ids: Sequence[str],
        ranks: Ranks,
    ) -> Estimate:
        outcomes = at_tokens(rewards, mask).double().sum(1)
        own = list(zip(sample_ids, prompt_ids, outcomes.tolist(), strict=True))
        # Sorted: the same sums, to the last bit, whichever rank holds which row.
        everyone = sorted(row for rows in ranks.gather(own) for row in rows)
        number = {prompt_id: n for n, prompt_id in enumerate(dict.fromkeys(prompt_id for _, prompt_id, _ in everyone))}
        advantages = self.compare(
            torch.tensor([outcome for _, _, outcome in everyone], dtype=torch.float64),
            torch.tensor([number[prompt_id] for _, prompt_id, _ in everyone], dtype=torch.int64),
        )
        found = dict(zip((sample_id for sample_id, _, _ in everyone), advantages.tolist(), strict=True))
        of_rows = torch.tensor([found[sample_id] for sample_id in sample_ids], dtype=rewards.dtype)
        spread = at_tokens(of_rows.unsqueeze(1).expand(mask.shape), mask)
        return Estimate(spread, spread)


def make_estimator(cfg: AdvantageConfig) -> Estimator:
    centred = OfGroups(partial(group_relative, scale=False))
    estimators: dict[str, Estimator] = {
        "gae": OfValues(cfg.gamma, cfg.lam),
        "reinforce_plus_plus": OfReturns(cfg.gamma),
        "reinforce_plus_plus_baseline": centred,
        "grpo": OfGroups(partial(group_relative, scale=True)),
        "dr_grpo": centred,
        "rloo": OfGroups(leave_one_out),
    }
    return estimators[cfg.kind]
