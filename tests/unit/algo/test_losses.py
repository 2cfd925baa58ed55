"""The losses of the three stages: hand-worked, against plain loops, their gradients, and no NaN where nothing is."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cluster.algo.losses import (
    explained_variance,
    explained_variance_of,
    ipo_loss,
    kto_loss,
    policy_loss,
    ranking_loss,
    sft_loss,
    value_loss,
)
from rlhf_cluster.algo.masked import moments

NAN = float("nan")


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(5) < torch.randint(1, 6, (6, 1), generator=generator)).long()
    first, second, third = (torch.randn(6, 5, generator=generator) * 0.5 for _ in range(3))
    return first, second, third, mask


class TestPolicyLoss:
    def test_by_hand(self) -> None:
        """Ratios 1.5, 1.5, 0.5, 0.5, 1.1 with clip 0.2."""
        ratios, advantages = [1.5, 1.5, 0.5, 0.5, 1.1], [1.0, -1.0, 1.0, -1.0, 2.0]
        old = torch.full((1, 6), -1.0)
        new = torch.cat([old[:, :5] + torch.tensor([ratios]).log(), torch.tensor([[NAN]])], 1)
        weights = torch.tensor([[*advantages, NAN]])
        mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
        loss = policy_loss(new, old, weights, mask, 0.2)
        # -1.2 (clipped), 1.5 (the pessimist takes the larger loss), -0.5, 0.8 (clipped), -2.2
        assert loss.loss_sum.item() == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8 - 2.2, abs=1e-6)
        assert loss.pg_clipfrac_sum.item() == 2
        assert loss.ppo_kl_sum.item() == pytest.approx(0.5 * sum(math.log(r) ** 2 for r in ratios), abs=1e-6)
        assert loss.ratio_max.item() == pytest.approx(1.5)
        assert loss.ratio_min.item() == pytest.approx(0.5)

    def test_an_upper_clip_of_its_own_by_hand(self) -> None:
        """DAPO: ratios 1.25 and 1.5 with 0.2 below and 0.28 above; 0.5 is held at 0.8."""
        new = torch.tensor([[1.25, 1.5, 0.5]]).log().requires_grad_()
        loss = policy_loss(new, torch.zeros(1, 3), torch.tensor([[1.0, 1.0, -1.0]]), torch.ones(1, 3), 0.2, 0.28)
        loss.loss_sum.backward()
        assert loss.loss_sum.item() == pytest.approx(-1.25 - 1.28 + 0.8, abs=1e-6)
        assert new.grad[0].tolist() == pytest.approx([-1.25, 0.0, 0.0])

    def test_the_ratio_of_responses_by_hand(self) -> None:
        """GSPO: two responses; the ratios of the first, 2 and 8, have the geometric mean 4, that of the second is 1."""
        new = torch.tensor([2.0, 8.0, 1.0]).log().requires_grad_()
        advantages = torch.tensor([-1.0, -1.0, 1.0])
        loss = policy_loss(new, torch.zeros(3), advantages, torch.ones(3), 0.2, lengths=torch.tensor([2, 1]))
        assert loss.losses.tolist() == pytest.approx([4.0, 4.0, -1.0])
        assert loss.ratio_max.item() == pytest.approx(4.0)
        (loss.losses * torch.tensor([0.5, 0.5, 1.0])).sum().backward()  # the mean over each response's tokens
        # d(4)/d(log ratio of a token) = 4 / 2 for each of the first's two.
        assert new.grad.tolist() == pytest.approx([2.0, 2.0, -1.0])

    def test_the_ratio_of_responses_of_one_token_is_that_of_tokens(self) -> None:
        new, old, advantages, _ = (tensor[:, 0] for tensor in batch())
        of_tokens = policy_loss(new, old, advantages, torch.ones(6), 0.2)
        of_responses = policy_loss(new, old, advantages, torch.ones(6), 0.2, lengths=torch.ones(6, dtype=torch.long))
        assert torch.allclose(of_tokens.losses, of_responses.losses)

    def test_losses_of_tokens_add_up_to_their_sum(self) -> None:
        new, old, advantages, mask = batch(2)
        loss = policy_loss(new, old, advantages, mask, 0.2, dual_clip=1.5)
        assert loss.losses.sum().item() == pytest.approx(loss.loss_sum.item(), abs=1e-5)
        assert loss.losses[mask == 0].abs().sum() == 0

    def test_the_dual_clip_by_hand(self) -> None:
        """Ratios 2, 4 and 4 with d = 3: only what is both bad and beyond 3 is held, and does not pull any more."""
        new = torch.tensor([[2.0, 4.0, 4.0]]).log().requires_grad_()
        advantages = torch.tensor([[-1.0, -1.0, 1.0]])
        loss = policy_loss(new, torch.zeros(1, 3), advantages, torch.ones(1, 3), 0.2, dual_clip=3.0)
        loss.loss_sum.backward()
        assert loss.loss_sum.item() == pytest.approx(2.0 + 3.0 - 1.2, abs=1e-6)
        assert loss.dual_clipfrac_sum.item() == 1
        assert new.grad[0].tolist() == pytest.approx([2.0, 0.0, 0.0])

    def test_as_plain_loops_do_it(self) -> None:
        new, old, advantages, mask = batch()
        loss, clipped = 0.0, 0
        for b in range(6):
            for t in range(5):
                if mask[b, t]:
                    ratio, a = math.exp(new[b, t] - old[b, t]), advantages[b, t].item()
                    free, held = -a * ratio, -a * min(max(ratio, 0.8), 1.2)
                    loss, clipped = loss + max(free, held), clipped + (held > free)
        found = policy_loss(new, old, advantages, mask, 0.2)
        assert found.loss_sum.item() == pytest.approx(loss, abs=1e-4)
        assert found.pg_clipfrac_sum.item() == clipped > 0

    def test_law_before_the_first_update_the_ratio_is_1_and_the_gradient_is_minus_the_advantage(self) -> None:
        new, _, advantages, mask = batch()
        new.requires_grad_()
        loss = policy_loss(new, new, advantages, mask, 0.2)
        loss.loss_sum.backward()
        assert loss.ratio_max.item() == loss.ratio_min.item() == 1.0
        assert loss.pg_clipfrac_sum.item() == loss.ppo_kl_sum.item() == 0
        assert torch.allclose(new.grad, -advantages * mask)

    def test_a_clipped_token_does_not_pull(self) -> None:
        new = torch.tensor([[math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)]], requires_grad=True)
        policy_loss(
            new, torch.zeros(1, 4), torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.ones(1, 4), 0.2
        ).loss_sum.backward()
        assert new.grad[0].tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0])

    def test_law_any_split_into_micro_batches_has_the_same_sums_and_gradient(self) -> None:
        new, old, advantages, mask = batch()
        whole, parts = new.clone().requires_grad_(), new.clone().requires_grad_()
        total = policy_loss(whole, old, advantages, mask, 0.2)
        total.loss_sum.backward()
        split = [
            policy_loss(parts[a:b], old[a:b], advantages[a:b], mask[a:b], 0.2) for a, b in ((0, 1), (1, 4), (4, 6))
        ]
        for part in split:
            part.loss_sum.backward()
        assert torch.allclose(whole.grad, parts.grad)
        assert sum(part.loss_sum.item() for part in split) == pytest.approx(total.loss_sum.item(), abs=1e-5)
        assert max(part.ratio_max for part in split) == total.ratio_max

    def test_padding_leaks_neither_into_the_loss_nor_into_the_gradient(self) -> None:
        new = torch.tensor([[0.1, NAN]], requires_grad=True)
        with torch.autograd.set_detect_anomaly(True):
            loss = policy_loss(new, torch.tensor([[0.0, NAN]]), torch.tensor([[1.0, NAN]]), torch.tensor([[1, 0]]), 0.2)
            loss.loss_sum.backward()
        assert loss.loss_sum.item() == pytest.approx(-math.exp(0.1))
        assert new.grad[0].tolist() == pytest.approx([-math.exp(0.1), 0.0])

    def test_no_token(self) -> None:
        new = torch.full((2, 3), NAN, requires_grad=True)
        loss = policy_loss(new, new.detach(), new.detach(), torch.zeros(2, 3), 0.2)
        loss.loss_sum.backward()
        assert loss.loss_sum.item() == loss.pg_clipfrac_sum.item() == loss.ppo_kl_sum.item() == 0
        assert new.grad.eq(0).all()
        assert loss.ratio_max.item() == 0
        assert loss.ratio_min.item() == math.inf


class TestValueLoss:
    def test_by_hand(self) -> None:
        """Moved from 0 to 1 with clip 0.2: towards 2 (held back), away from -1 (not), inside the clip, padding."""
        values, old = torch.tensor([[1.0, 1.0, 0.1, NAN]]), torch.tensor([[0.0, 0.0, 0.0, NAN]])
        returns, mask = torch.tensor([[2.0, -1.0, 0.3, NAN]]), torch.tensor([[1, 1, 1, 0]])
        loss = value_loss(values, old, returns, mask, 0.2)
        # max(1, 1.8^2), max(2^2, 1.2^2), 0.2^2 twice the same
        assert loss.loss_sum.item() == pytest.approx(0.5 * (3.24 + 4.0 + 0.04))
        assert loss.vf_clipfrac_sum.item() == 1

    def test_as_plain_loops_do_it(self) -> None:
        values, old, returns, mask = batch(1)
        loss, clipped = 0.0, 0
        for b in range(6):
            for t in range(5):
                if mask[b, t]:
                    v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
                    free, held = (v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2
                    loss, clipped = loss + 0.5 * max(free, held), clipped + (held > free)
        found = value_loss(values, old, returns, mask, 0.2)
        assert found.loss_sum.item() == pytest.approx(loss, abs=1e-4)
        assert found.vf_clipfrac_sum.item() == clipped > 0

    def test_law_a_clip_that_never_bites_leaves_half_the_squared_error_and_its_gradient(self) -> None:
        values, old, returns, mask = batch(1)
        values.requires_grad_()
        loss = value_loss(values, old, returns, mask, 100.0)
        loss.loss_sum.backward()
        error = (values.detach() - returns) * mask
        assert loss.loss_sum.item() == pytest.approx(0.5 * error.square().sum().item(), abs=1e-4)
        assert torch.allclose(values.grad, error)

    def test_no_token(self) -> None:
        values = torch.full((2, 3), NAN, requires_grad=True)
        loss = value_loss(values, values.detach(), values.detach(), torch.zeros(2, 3), 0.2)
        loss.loss_sum.backward()
        assert loss.loss_sum.item() == loss.vf_clipfrac_sum.item() == 0
        assert values.grad.eq(0).all()

    def test_padding_leaks_into_no_part_of_the_backward_pass(self) -> None:
        values, padded = torch.tensor([[1.0, NAN]], requires_grad=True), torch.tensor([[0.0, NAN]])
        with torch.autograd.set_detect_anomaly(True):
            value_loss(values, padded, padded + 2, torch.tensor([[1, 0]]), 5.0).loss_sum.backward()
        assert values.grad[0].tolist() == [-1.0, 0.0]


class TestRankingLoss:
    def test_by_hand(self) -> None:
        """Ranks 1, 2, 2 and scores 1, 0, 3: pairs (0, 1) with margin 1 and (0, 2) with margin -2; (1, 2) is a tie."""
        loss = ranking_loss(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([1, 2, 2]))
        assert loss.loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2)
        assert (loss.pairs.item(), loss.correct_pairs.item()) == (2, 1)
        assert loss.margin_sum.item() == pytest.approx(-1.0)

    def test_as_plain_loops_do_it(self) -> None:
        generator = torch.Generator().manual_seed(3)
        scores, ranks = torch.randn(9, generator=generator), torch.randint(1, 5, (9,), generator=generator)
        losses, correct, margins = [], 0, 0.0
        for i, j in combinations(range(9), 2):
            if ranks[i] != ranks[j]:
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                margin = scores[better].item() - scores[worse].item()
                losses.append(-math.log(1 / (1 + math.exp(-margin))))
                correct, margins = correct + (margin > 0), margins + margin
        found = ranking_loss(scores, ranks)
        assert 0 < len(losses) < 36  # some pairs are ties
        assert found.loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert (found.pairs.item(), found.correct_pairs.item()) == (len(losses), correct)
        assert found.margin_sum.item() == pytest.approx(margins, abs=1e-4)

    def test_gradient_by_hand(self) -> None:
        """d/dr_w = -sigmoid(r_l - r_w) / pairs: equal scores pull by one half each."""
        scores = torch.zeros(3, requires_grad=True)
        ranking_loss(scores, torch.tensor([1, 2, 3])).loss.backward()
        assert scores.grad.tolist() == pytest.approx([-1 / 3, 0.0, 1 / 3])

    def test_gradient_by_finite_differences(self) -> None:
        scores = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s: ranking_loss(s, torch.tensor([2, 1, 3, 2])).loss, scores)

    def test_law_only_differences_of_scores_and_the_order_of_ranks_matter(self) -> None:
        scores, ranks = torch.tensor([0.3, -1.2, 0.8]), torch.tensor([2, 1, 3])
        plain = ranking_loss(scores, ranks).loss
        assert torch.allclose(ranking_loss(scores + 7, ranks).loss, plain)
        assert torch.equal(ranking_loss(scores, ranks * 10).loss, plain)
        order = torch.tensor([2, 0, 1])
        assert torch.allclose(ranking_loss(scores[order], ranks[order]).loss, plain)

    def test_law_two_responses_are_the_pairwise_loss(self) -> None:
        loss = ranking_loss(torch.tensor([2.0, 0.5]), torch.tensor([1, 2]))
        assert loss.loss.item() == pytest.approx(math.log1p(math.exp(-1.5)))

    @pytest.mark.parametrize("count", [1, 4])
    def test_only_ties(self, count: int) -> None:
        scores = torch.randn(count, requires_grad=True)
        loss = ranking_loss(scores, torch.ones(count, dtype=torch.int32))
        loss.loss.backward()
        assert loss.loss.item() == 0
        assert loss.pairs.item() == loss.correct_pairs.item() == loss.margin_sum.item() == 0
        assert scores.grad.eq(0).all()

    def test_far_apart_scores_stay_finite(self) -> None:
        scores = torch.tensor([-500.0, 500.0], requires_grad=True)
        loss = ranking_loss(scores, torch.tensor([1, 2])).loss
        loss.backward()
        assert loss.item() == pytest.approx(1000.0)
        assert scores.grad.tolist() == pytest.approx([-1.0, 1.0])


class TestSFTLoss:
    def test_by_hand(self) -> None:
        logprobs = torch.tensor([[math.log(0.5), math.log(0.25), NAN]], requires_grad=True)
        loss = sft_loss(logprobs, torch.tensor([[1, 1, 0]]))
        loss.backward()
        assert loss.item() == pytest.approx(math.log(8))
        assert logprobs.grad.tolist() == [[-1.0, -1.0, 0.0]]

    def test_no_token(self) -> None:
        assert sft_loss(torch.full((1, 2), NAN), torch.zeros(1, 2)).item() == 0


class TestExplainedVariance:
    MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    RETURNS = torch.tensor([[1.0, 2.0, 3.0, NAN], [6.0, NAN, NAN, NAN]])  # variance 3.5

    def test_by_hand(self) -> None:
        values = torch.tensor([[1.0, 2.0, 1.0, NAN], [6.0, NAN, NAN, NAN]])  # residuals 0, 0, 2, 0: variance 0.75
        assert explained_variance(values, self.RETURNS, self.MASK).item() == pytest.approx(1 - 0.75 / 3.5)

    def test_law_all_of_it_or_none(self) -> None:
        assert explained_variance(self.RETURNS, self.RETURNS, self.MASK).item() == 1
        assert explained_variance(self.RETURNS + 5, self.RETURNS, self.MASK).item() == pytest.approx(1)
        constant = torch.full_like(self.RETURNS, 3.0)
        assert explained_variance(constant, self.RETURNS, self.MASK).item() == pytest.approx(0)

    def test_law_ranks_add_their_moments(self) -> None:
        values, _, returns, mask = batch(4)
        whole = explained_variance(values, returns, mask)
        residual = sum((moments(returns[r] - values[r], mask[r]) for r in (slice(0, 2), slice(2, 6))), torch.zeros(3))
        total = sum((moments(returns[r], mask[r]) for r in (slice(0, 2), slice(2, 6))), torch.zeros(3))
        assert explained_variance_of(residual, total).item() == pytest.approx(whole.item(), abs=1e-9)

    def test_returns_that_do_not_vary(self) -> None:
        values = torch.randn(3, 7, generator=torch.Generator().manual_seed(5))
        for same in (torch.full((3, 7), number) for number in (0.0, 0.1, -2.3, 1 / 3, 1e4 / 7, 1e6 / 7)):
            assert explained_variance(values, same, torch.ones(3, 7)).item() == 0
            assert explained_variance(values, same, torch.zeros(3, 7)).item() == 0

    def test_rounding_errors_are_no_variance(self) -> None:
        """Three equal numbers, whose float64 sums leave a variance of 1e-16 of their square."""
        total = torch.tensor([3.0, 3.0, 3.0 + 1e-15], dtype=torch.float64)
        assert explained_variance_of(torch.tensor([3.0, 0.0, 3.0], dtype=torch.float64), total).item() == 0


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


RATIOS, RANKS = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1, 3, 2])


class TestPreferenceLosses:
    """h = 2, -1, 0.5 with ranks 1, 3, 2: margins 3 (1 over 3), 1.5 (1 over 2), 1.5 (2 over 3)."""

    def test_dpo_by_hand(self) -> None:
        loss = ranking_loss(0.1 * RATIOS, RANKS)
        assert loss.loss.item() == pytest.approx(-sum(math.log(sigmoid(m)) for m in (0.3, 0.15, 0.15)) / 3)
        assert (loss.pairs.item(), loss.correct_pairs.item()) == (3, 3)
        assert loss.margin_sum.item() == pytest.approx(0.6)

    def test_dpo_of_a_pair_is_the_papers_gradient(self) -> None:
        """Eq. 8: beta x sigmoid(r_l - r_w), up for the better and down for the worse."""
        ratios = torch.tensor([0.4, 1.0], requires_grad=True)
        ranking_loss(0.5 * ratios, torch.tensor([1, 2])).loss.backward()
        weight = 0.5 * sigmoid(0.5 * (1.0 - 0.4))
        assert ratios.grad.tolist() == pytest.approx([-weight, weight])

    def test_smoothing_by_hand(self) -> None:
        loss = ranking_loss(torch.tensor([1.0, 0.0]), torch.tensor([1, 2]), smoothing=0.25)
        assert loss.loss.item() == pytest.approx(-0.75 * math.log(sigmoid(1)) - 0.25 * math.log(sigmoid(-1)))

    def test_ipo_by_hand(self) -> None:
        """With beta 0.25 every margin is driven to 2."""
        loss = ipo_loss(RATIOS, RANKS, 0.25)
        assert loss.loss.item() == pytest.approx((1.0 + 0.25 + 0.25) / 3)
        assert loss.margin_sum.item() == pytest.approx(0.25 * 6)
        still = torch.tensor([2.0, 0.0], requires_grad=True)
        ipo_loss(still, torch.tensor([1, 2]), 0.25).loss.backward()
        assert still.grad.tolist() == [0.0, 0.0]

    def test_kto_by_hand(self) -> None:
        """The best at 2, the worst at -1, the KL at 0.5; the one between says nothing."""
        loss = kto_loss(RATIOS, RANKS, 0.5, 0.1)
        expected = (1 - sigmoid(0.1 * 1.5) + 1 - sigmoid(0.1 * 1.5)) / 2
        assert loss.loss.item() == pytest.approx(expected)
        ratios = RATIOS.clone().requires_grad_()
        kto_loss(ratios, RANKS, 0.5, 0.1).loss.backward()
        assert ratios.grad[0] < 0 < ratios.grad[1] and ratios.grad[2] == 0

    @pytest.mark.parametrize(
        "loss", [ranking_loss, lambda h, r: ipo_loss(h, r, 0.1), lambda h, r: kto_loss(h, r, 0.0, 0.1)]
    )
    def test_ties_alone_teach_nothing(self, loss: Any) -> None:
        ratios = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        found = loss(ratios, torch.ones(3, dtype=torch.long))
        found.loss.backward()
        assert found.loss.item() == 0 and found.pairs.item() == 0 and ratios.grad.tolist() == [0.0, 0.0, 0.0]
