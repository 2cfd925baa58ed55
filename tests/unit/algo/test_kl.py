"""KL estimators: hand-worked, and against the divergence summed over the whole vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_cluster.algo.kl import AdaptiveKL, FixedKL, k1, k2, k3


def test_by_hand() -> None:
    policy, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])  # r = ref / pol = 1/2
    assert k1(policy, reference).item() == pytest.approx(math.log(2))
    assert k2(policy, reference).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(policy, reference).item() == pytest.approx(-0.5 + math.log(2))


def test_k1_and_k3_are_unbiased() -> None:
    """Their mean under the policy, token by token, is the divergence itself."""
    policy, reference = [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]
    exact = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    weights, p, q = torch.tensor(policy), torch.tensor(policy).log(), torch.tensor(reference).log()
    assert (weights * k1(p, q)).sum().item() == pytest.approx(exact, abs=1e-6)
    assert (weights * k3(p, q)).sum().item() == pytest.approx(exact, abs=1e-6)


def test_law_zero_where_they_agree_and_k2_k3_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = -torch.rand(200, generator=generator) * 5, -torch.rand(200, generator=generator) * 5
    assert (k2(policy, reference) >= 0).all()
    assert (k3(policy, reference) >= 0).all()
    assert (k1(policy, reference) < 0).any()
    for estimator in (k1, k2, k3):
        assert estimator(policy, policy).eq(0).all()


def test_k3_keeps_its_digits_near_zero() -> None:
    """exp(x) - 1 - x = x^2 / 2 + ...; plain float32 arithmetic gives 0 or noise here."""
    policy = torch.tensor([1e-3])
    assert k3(policy, torch.zeros(1)).item() == pytest.approx(5e-7, rel=1e-2)


def test_fixed_coefficient_stays() -> None:
    controller = FixedKL(0.02)
    controller.update(kl=100.0, batch_size=512)
    assert controller.coef == 0.02
    assert FixedKL(0.0).coef == 0


def test_adaptive_coefficient_by_hand() -> None:
    """Ziegler et al.'s numbers: target 6, horizon 10,000, batches of 500."""
    controller = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    controller.update(kl=6.6, batch_size=500)  # error 0.1
    assert controller.coef == pytest.approx(0.15 * 1.005)
    controller.update(kl=60.0, batch_size=500)  # error held at 0.2
    assert controller.coef == pytest.approx(0.15 * 1.005 * 1.01)
    controller.update(kl=0.0, batch_size=500)  # error held at -0.2
    assert controller.coef == pytest.approx(0.15 * 1.005 * 1.01 * 0.99)


def test_law_an_adaptive_coefficient_reaches_a_working_target() -> None:
    """Where the policy's KL falls as the coefficient rises (here KL = 1 / beta), the target is met and kept."""
    controller = AdaptiveKL(0.01, target=5.0, horizon=1000)
    for _ in range(1000):
        controller.update(kl=1 / controller.coef, batch_size=64)
    assert controller.coef == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("changed", [{"coef": 0.0}, {"target": 0.0}, {"horizon": -1.0}, {"coef": float("nan")}])
def test_refuses_an_adaptive_coefficient_that_could_not_move(changed: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="it must be a finite number above 0"):
        AdaptiveKL(**({"coef": 0.1, "target": 6.0, "horizon": 100.0} | changed))


@pytest.mark.parametrize("coef", [-0.1, float("nan"), float("inf")])
def test_refuses_what_is_no_coefficient(coef: float) -> None:
    with pytest.raises(ValueError, match="KL coefficient"):
        FixedKL(coef)
