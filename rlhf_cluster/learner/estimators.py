"""The advantage estimator: one function for each way from rewards to advantages, chosen once from the config.

Takes per-token rewards and values of this rank's rows, gives advantages and returns of the same shape. A response is
measured by the others to its prompt wherever those are: their outcomes are few numbers, and every rank gets them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf_cluster.algo.advantages import gae, group_relative, leave_one_out, returns_to_go
from rlhf_cluster.algo.masked import at_tokens
from rlhf_cluster.config import AdvantageConfig
from rlhf_cluster.engine.ranks import Ranks


@dataclass(frozen=True, eq=False)
class Rewarded:
    """This rank's rows as an estimator sees them: tensors [B, T], 0 where there is no token, and whose they are."""

    rewards: Tensor
    values: Tensor
    mask: Tensor
    prompt_ids: Sequence[str]
    sample_ids: Sequence[str]


@dataclass(frozen=True)
class Estimate:
    """Both [B, T], 0 where there is no token. `returns` are what a critic should have said."""

    advantages: Tensor
    returns: Tensor


Estimator = Callable[[Rewarded, Ranks], Estimate]  # a collective


def of_values(rows: Rewarded, ranks: Ranks, gamma: float, lam: float) -> Estimate:
    """Generalized advantage estimation: what a critic expected is the baseline."""
    return Estimate(*gae(rows.rewards, rows.values, rows.mask, gamma, lam))


def of_returns(rows: Rewarded, ranks: Ranks, gamma: float) -> Estimate:
    """REINFORCE++: no baseline but the whole batch's mean, which whitening takes out."""
    returns = returns_to_go(rows.rewards, rows.mask, gamma)
    return Estimate(returns, returns)


def of_groups(rows: Rewarded, ranks: Ranks, compare: Callable[[Tensor, Tensor], Tensor]) -> Estimate:
    """The other responses to the same prompt are the baseline. A response's outcome is the sum of its rewards; what it
    did better is every token's advantage. `compare`: outcomes [B], groups [B] -> [B]."""
    outcomes = at_tokens(rows.rewards, rows.mask).double().sum(1)
    own = list(zip(rows.sample_ids, rows.prompt_ids, outcomes.tolist(), strict=True))
    # Sorted: the same sums, to the last bit, whichever rank holds which row.
    everyone = sorted(row for share in ranks.gather(own) for row in share)
    number = {prompt_id: n for n, prompt_id in enumerate(dict.fromkeys(prompt_id for _, prompt_id, _ in everyone))}
    advantages = compare(
        torch.tensor([outcome for _, _, outcome in everyone], dtype=torch.float64),
        torch.tensor([number[prompt_id] for _, prompt_id, _ in everyone], dtype=torch.int64),
    )
    found = dict(zip((sample_id for sample_id, _, _ in everyone), advantages.tolist(), strict=True))
    of_rows = torch.tensor([found[sample_id] for sample_id in rows.sample_ids], dtype=rows.rewards.dtype)
    spread = at_tokens(of_rows.unsqueeze(1).expand(rows.mask.shape), rows.mask)
    return Estimate(spread, spread)


def make_estimator(cfg: AdvantageConfig) -> Estimator:
    centred = partial(of_groups, compare=partial(group_relative, scale=False))
    estimators: dict[str, Estimator] = {
        "gae": partial(of_values, gamma=cfg.gamma, lam=cfg.lam),
        "reinforce_plus_plus": partial(of_returns, gamma=cfg.gamma),
        "reinforce_plus_plus_baseline": centred,
        "grpo": partial(of_groups, compare=partial(group_relative, scale=True)),
        "dr_grpo": centred,
        "rloo": partial(of_groups, compare=leave_one_out),
    }
    return estimators[cfg.kind]
