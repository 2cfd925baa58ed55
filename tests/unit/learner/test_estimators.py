"""Advantages without a critic: a response is compared with the others to its prompt, whichever rank holds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.algo.losses import policy_loss
from rlhf_cluster.config import ADVANTAGES, GROUP_ADVANTAGES, AdvantageConfig, PPOConfig
from rlhf_cluster.learner.experience import EvaluatedRow, Experience, make_experience
from rlhf_cluster.learner.gradient import Size, token_shares
from rlhf_cluster.records import Controls

OnRanks = Callable[[int, Callable[[Any], Any]], list[Any]]
LONGEST = 6


def group_rows(row: Callable[..., EvaluatedRow]) -> list[EvaluatedRow]:
    """Two prompts with three responses each, of different lengths, 0.5 nats from the reference at each token."""
    scores = [1.0, 0.0, 2.0, -1.0, -1.0, -1.0]
    lengths = [2, 1, 3, 1, 2, 4]
    return [
        row(f"s{i}", [-1.0] * n, [-1.5] * n, [9.0] * n, score=score, prompt_id="ab"[i // 3])
        for i, (score, n) in enumerate(zip(scores, lengths, strict=True))
    ]


def over(
    world: int, rows: list[EvaluatedRow], on_ranks: OnRanks, kl_coef: float = 0.0, **changed: Any
) -> dict[str, np.ndarray]:
    """Advantages by sample id, the rows dealt out over `world` ranks."""
    cfg = PPOConfig(advantage=AdvantageConfig(**changed))

    def work(ranks: Any) -> Experience:
        return make_experience(rows[ranks.rank :: world], cfg, Controls(kl_coef), ranks, LONGEST)

    parts = on_ranks(world, work)
    return {i: part.advantages[place] for part in parts for i, place in part.index.items()}


def test_groups_by_hand(row: Callable[..., EvaluatedRow], on_ranks: OnRanks) -> None:
    """Prompt a: scores 1, 0, 2 (mean 1, deviation 1); every token of a response has its response's advantage."""
    found = over(1, group_rows(row), on_ranks, kind="grpo", whiten=False)
    assert [found[f"s{i}"].tolist() for i in range(3)] == [
        [0.0] * 2,
        pytest.approx([-1.0], abs=1e-5),
        pytest.approx([1.0] * 3, abs=1e-5),
    ]
    assert all(not found[f"s{i}"].any() for i in range(3, 6))  # equal scores say nothing
    left_out = over(1, group_rows(row), on_ranks, kind="rloo", whiten=False)
    assert left_out["s1"].tolist() == [-1.5] and left_out["s2"].tolist() == [1.5] * 3


def test_a_penalty_in_the_rewards_is_part_of_the_outcome(row: Callable[..., EvaluatedRow], on_ranks: OnRanks) -> None:
    """beta = 0.2: each token costs 0.1. Outcomes of prompt a: 0.8, -0.1, 1.7, their mean 0.8."""
    found = over(1, group_rows(row), on_ranks, kl_coef=0.2, kind="dr_grpo", whiten=False)
    assert [found[f"s{i}"][0] for i in range(3)] == pytest.approx([0.0, -0.9, 0.9], abs=1e-6)


def test_reinforce_plus_plus_by_hand(row: Callable[..., EvaluatedRow], on_ranks: OnRanks) -> None:
    """Returns to go, not whitened: the last token has the score less its own penalty, the one before one more."""
    found = over(1, group_rows(row), on_ranks, kl_coef=0.2, kind="reinforce_plus_plus", whiten=False)
    assert found["s2"].tolist() == pytest.approx([1.7, 1.8, 1.9])


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_ranks_changes_nothing(
    row: Callable[..., EvaluatedRow], on_ranks: OnRanks, kind: str, world: int
) -> None:
    """Dealt out so that no rank holds a whole group. Groups: to the last bit."""
    rows = group_rows(row)
    whole, parts = (over(n, rows, on_ranks, kl_coef=0.1, kind=kind, whiten=False) for n in (1, world))
    assert whole.keys() == parts.keys()
    assert all((whole[i] == parts[i]).all() for i in whole)
    whitened, in_parts = (over(n, rows, on_ranks, kl_coef=0.1, kind=kind, whiten=True) for n in (1, world))
    assert all(np.allclose(whitened[i], in_parts[i], atol=1e-6) for i in whitened)


@pytest.mark.parametrize("kind", [kind for kind in ADVANTAGES if kind != "gae"])
def test_without_a_critic_values_do_not_matter(row: Callable[..., EvaluatedRow], on_ranks: OnRanks, kind: str) -> None:
    rows = group_rows(row)
    found = over(1, rows, on_ranks, kind=kind, whiten=False)
    for own in rows:
        own.values[:] = -3.0
    again = over(1, rows, on_ranks, kind=kind, whiten=False)
    assert all((found[i] == again[i]).all() for i in found)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("kind", ["gae", "reinforce_plus_plus"])
def test_scores_that_are_all_alike_give_no_gradient_in_the_mean(
    row: Callable[..., EvaluatedRow], on_ranks: OnRanks, kind: str, whiten: bool
) -> None:
    """Over every response of up to 3 tokens of which 0 is the end, each as often as the policy says it: a baseline that
    knows nothing of the token leaves only noise, also a critic that is wrong. Below lambda 1 its errors would count."""
    states = [before for length in range(3) for before in product((1, 2), repeat=length)]
    responses = [(*before, token) for before in states for token in range(3) if not token or len(before) == 2]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(states), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    critic = torch.randn(len(states), generator=generator)
    places = [[states.index(response[:t]) for t in range(len(response))] for response in responses]
    logprobs = [logits.log_softmax(-1)[own, response] for own, response in zip(places, responses, strict=True)]
    likely = torch.stack([own.detach().sum().exp() for own in logprobs])
    assert float(likely.sum()) == pytest.approx(1.0)
    lengths = torch.tensor([len(response) for response in responses])
    cfg = PPOConfig(advantage=AdvantageConfig(kind, lam=1.0, whiten=whiten))

    def pull(scores: Sequence[float]) -> float:
        told = zip(logprobs, places, scores, strict=True)
        rows = [row(str(i), *[old.tolist()] * 2, critic[own], score=s) for i, (old, own, s) in enumerate(told)]
        (experience,) = on_ranks(1, lambda ranks: make_experience(rows, cfg, Controls(0.0), ranks, LONGEST))
        advantages, new = torch.from_numpy(np.concatenate(experience.advantages)), torch.cat(logprobs)
        losses = policy_loss(new, new, advantages, torch.ones(len(new)), 0.2).losses
        expected = (losses * likely.repeat_interleave(lengths)).sum()
        return float(torch.autograd.grad(expected, logits, retain_graph=True)[0].abs().max())

    assert pull([3.7] * len(responses)) < 1e-6
    assert pull(lengths.tolist()) > 0.05


def test_every_kind_says_whether_it_needs_a_critic() -> None:
    assert [kind for kind in ADVANTAGES if AdvantageConfig(kind).needs_critic] == ["gae"]
    assert {kind for kind in ADVANTAGES if AdvantageConfig(kind).compares_groups} == set(GROUP_ADVANTAGES)


def test_length_costs_within_the_buffer(row: Callable[..., EvaluatedRow], on_ranks: OnRanks) -> None:
    """Of 6 tokens at most, a buffer of 4: 3 tokens cost a quarter of 2.0, 2 tokens nothing."""
    advantage = AdvantageConfig("reinforce_plus_plus", whiten=False)
    cfg = PPOConfig(overlong_buffer=4 / LONGEST, overlong_penalty=2.0, advantage=advantage)
    (experience,) = on_ranks(1, lambda ranks: make_experience(group_rows(row), cfg, Controls(0.0), ranks, LONGEST))
    assert experience.rewards[0].tolist() == [0.0, 1.0]
    assert experience.rewards[2].tolist() == [0.0, 0.0, 1.5]
    assert experience.rewards[5].tolist() == [0.0, 0.0, 0.0, -2.0]


@pytest.mark.parametrize(
    ("loss_mean", "expected"),
    [("token", [0.1] * 4), ("response", [1 / 6] * 2 + [1 / 3, 1 / 3]), ("constant", [1 / 18] * 4)],
)
def test_what_a_token_counts_for_by_hand(loss_mean: str, expected: list[float]) -> None:
    """Responses of 2, 1 and 1 tokens, of a minibatch of 10 tokens in 3 responses over all ranks; at most 6 tokens."""
    found = token_shares(np.array([2, 1, 1]), loss_mean, LONGEST) / Size(10.0, 3.0).divisor(loss_mean)
    assert found.tolist() == pytest.approx(expected)
