"""Our functions against those of TRL and torch, on random input. TRL is there for this alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cross_entropy
from trl import DPOTrainer, KTOTrainer
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import entropy_from_logits, nanstd, selective_log_softmax

from rlhf_cluster.algo.advantages import group_relative, leave_one_out
from rlhf_cluster.algo.kl import k1, k2, k3
from rlhf_cluster.algo.logprobs import logprobs_from_logits
from rlhf_cluster.algo.losses import RankingLoss, ipo_loss, kto_loss, policy_loss, ranking_loss, sft_loss
from rlhf_cluster.algo.masked import at_tokens
from rlhf_cluster.algo.rewards import overlong_penalty
from rlhf_cluster.learner.gradient import Size, token_shares

LENGTHS, LONGEST = np.array([3, 7, 1, 5]), 9
MASK = (torch.arange(7) < torch.from_numpy(LENGTHS)[:, None]).float()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy(temperature: float) -> None:
    logits = random(4, 6, 50)
    ids = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(1))
    logprobs, entropy = logprobs_from_logits(logits, ids, temperature)
    assert torch.allclose(logprobs, selective_log_softmax(logits / temperature, ids), atol=1e-5)
    assert torch.allclose(entropy, entropy_from_logits(logits / temperature), atol=1e-5)
    assert torch.allclose(entropy, Categorical(logits=logits / temperature).entropy(), atol=1e-5)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_estimators_of_the_kl_have_torchs_in_the_mean(estimator: object) -> None:
    """Over samples of the policy; both are unbiased. Four standard errors."""
    policy, reference = Categorical(logits=random(5)), Categorical(logits=random(5, seed=1))
    torch.manual_seed(0)
    tokens = policy.sample((200_000,))
    found = estimator(policy.log_prob(tokens), reference.log_prob(tokens))  # type: ignore[operator]
    error = float(found.std()) / len(found) ** 0.5
    assert float(found.mean()) == pytest.approx(float(kl_divergence(policy, reference)), abs=4 * error)


def test_estimators_of_the_kl_have_torchs_gradients_in_the_mean() -> None:
    """As losses, over the whole vocabulary: k1's is nothing, k2's that of KL(policy || reference), k3's that of
    KL(reference || policy)."""
    logits = random(5).requires_grad_()
    policy, reference = Categorical(logits=logits), Categorical(logits=random(5, seed=1))

    def gradient(of: Tensor) -> Tensor:
        return torch.autograd.grad(of, logits, retain_graph=True)[0]

    found = [gradient((policy.probs.detach() * one(policy.logits, reference.logits)).sum()) for one in (k1, k2, k3)]
    assert torch.allclose(found[0], torch.zeros(5), atol=1e-6)
    assert torch.allclose(found[1], gradient(kl_divergence(policy, reference)), atol=1e-6)
    assert torch.allclose(found[2], gradient(kl_divergence(reference, policy)), atol=1e-6)


def test_the_loss_of_demonstrations_and_its_gradient() -> None:
    """torch's cross entropy, which leaves out what has the label -100."""
    logits, ids = random(4, 7, 20).requires_grad_(), torch.arange(28).view(4, 7) % 20
    labels = ids.masked_fill(MASK == 0, -100)
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    found = sft_loss(logprobs_from_logits(logits, ids, 1.0)[0], MASK)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_groups() -> None:
    """As in GRPOTrainer and RLOOTrainer: rows of a prompt stand side by side there."""
    outcomes = random(12)
    grouped, groups = outcomes.view(4, 3), torch.arange(4).repeat_interleave(3)
    deviations = nanstd(grouped, dim=1).repeat_interleave(3)
    centred = (grouped - grouped.mean(1, keepdim=True)).flatten()
    assert torch.allclose(group_relative(outcomes, groups, scale=False), centred, atol=1e-6)
    assert torch.allclose(group_relative(outcomes, groups, scale=True), centred / deviations, atol=1e-4)
    baselines = ((grouped.sum(1, keepdim=True) - grouped) / 2).flatten()
    assert torch.allclose(leave_one_out(outcomes, groups), outcomes - baselines, atol=1e-5)


def test_the_penalty_of_length() -> None:
    lengths = list(range(1, 41))
    theirs = get_soft_overlong_punishment(max_completion_len=40, soft_punish_cache=12)
    ours = overlong_penalty(torch.tensor(lengths), limit=40, buffer=12)
    assert ours.tolist() == pytest.approx(theirs([[0] * length for length in lengths]))


def theirs(new: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, **settings: object) -> Tensor:
    """GRPOTrainer's own loss, its model's logprobs given."""
    trainer = MagicMock(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=settings.get("delta"), use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=MagicMock(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        epsilon_low=0.2,
        epsilon_high=settings.get("high", 0.2),
        importance_sampling_level=settings.get("level", "token"),
        loss_type=settings["loss_type"],
        beta=0.3,
        _metrics=MagicMock(),
    )
    ids = torch.zeros_like(MASK).long()
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": MASK,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": MASK.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize(
    ("settings", "loss_mean"),
    [
        ({"loss_type": "grpo"}, "response"),
        ({"loss_type": "bnpo"}, "token"),
        ({"loss_type": "dapo", "high": 0.28}, "token"),
        ({"loss_type": "dr_grpo"}, "constant"),
        ({"loss_type": "bnpo", "delta": 1.5}, "token"),
        ({"loss_type": "grpo", "level": "sequence"}, "response"),
    ],
)
def test_the_policy_loss_and_its_gradient(settings: dict[str, object], loss_mean: str) -> None:
    """Every mean, both ratios, both clips, with a KL term of 0.3 x k3: the whole loss of GRPOTrainer."""
    old, ref = (at_tokens(random(4, 7, seed=seed), MASK) for seed in (1, 2))
    new = (old + 0.4 * random(4, 7, seed=3)).requires_grad_()
    advantages = random(4, seed=4)
    expected = theirs(new, old, ref, advantages, **settings)
    expected.backward()
    gradient, new.grad = new.grad, None

    flat = MASK.bool()
    spread = advantages[:, None].expand(4, 7)[flat]
    lengths = torch.from_numpy(LENGTHS) if settings.get("level") == "sequence" else None
    high, dual = float(settings.get("high", 0.0)), float(settings.get("delta", 0.0))  # type: ignore[arg-type]
    loss = policy_loss(new[flat], old[flat], spread, torch.ones(16), 0.2, high, dual, lengths)
    shares = token_shares(LENGTHS, loss_mean, LONGEST) / Size(16.0, 4.0).divisor(loss_mean)
    weights = torch.from_numpy(shares.astype(np.float32))
    found = ((loss.losses + 0.3 * k3(new[flat], ref[flat])) * weights).sum()
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert torch.allclose(new.grad, gradient * MASK, atol=1e-6)


def of_pairs(kind: Any, better: Tensor, worse: Tensor, **settings: object) -> Tensor:
    """The loss of TRL's trainer of this `kind`, for responses of one token that the reference is sure of."""
    log_ratios = torch.cat([better, worse])[:, None]
    nothing, labels = torch.zeros_like(log_ratios), torch.ones(len(log_ratios)).bool()
    labels[len(better) :] = False
    outputs = SimpleNamespace(log_probs=log_ratios, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    trainer = MagicMock(
        accelerator=MagicMock(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=0.3,
        _compute_kl_logps=lambda *_: torch.tensor([0.4]),
        desirable_weight=1.0,
        undesirable_weight=1.0,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_weights=[1.0],
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    inputs = {
        "input_ids": torch.zeros(len(labels), 2).long(),
        "attention_mask": torch.ones(len(labels), 2).long(),
        "completion_mask": torch.tensor([0, 1]).expand(len(labels), 2),
        "label": labels,
        "ref_logps": nothing[:, 0],
        "ref_KL_logps": torch.zeros(1),
        "ref_chosen_logps": torch.zeros_like(better),
        "ref_rejected_logps": torch.zeros_like(worse),
    }
    return kind._compute_loss(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize(
    ("kind", "settings", "loss"),
    [
        (DPOTrainer, {"loss_types": ["sigmoid"]}, lambda h, ranks: ranking_loss(0.3 * h, ranks)),
        (DPOTrainer, {"loss_types": ["ipo"]}, lambda h, ranks: ipo_loss(h, ranks, 0.3)),
        (KTOTrainer, {"loss_type": "kto"}, lambda h, ranks: kto_loss(h, ranks, 0.4, 0.3)),
    ],
)
def test_the_losses_of_preferences_and_their_gradients(
    kind: Any, settings: dict[str, object], loss: Callable[[Tensor, Tensor], RankingLoss]
) -> None:
    better, worse = (2 * random(6, seed=seed).requires_grad_() for seed in (5, 6))
    expected = of_pairs(kind, better, worse, **settings)
    ranks = torch.tensor([1, 2])
    found = torch.stack([loss(torch.stack(pair), ranks).loss for pair in zip(better, worse, strict=True)]).mean()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for own, other in zip(*(torch.autograd.grad(of, (better, worse)) for of in (found, expected)), strict=True):
        assert torch.allclose(own, other, atol=1e-6)
