"""Learning rates by hand."""

from __future__ import annotations

import math

import pytest

from rlhf_cluster.config import OptimizerConfig
from rlhf_cluster.engine.schedule import learning_rate


def rates(cfg: OptimizerConfig, steps: int) -> list[float]:
    return [learning_rate(cfg, step, steps) for step in range(steps)]


def test_constant_is_constant() -> None:
    assert rates(OptimizerConfig(lr=2.0), 4) == [2.0] * 4


def test_warm_up_begins_at_a_tenth_and_is_linear() -> None:
    """InstructGPT C.4: from 10% of the peak to the peak."""
    assert rates(OptimizerConfig(lr=10.0, warmup_steps=3), 5) == pytest.approx([1.0, 4.0, 7.0, 10.0, 10.0])


def test_cosine_ends_at_a_tenth() -> None:
    """Five steps: progress 0, 1/4, 1/2, 3/4, 1; halfway lies the mean of peak and end."""
    found = rates(OptimizerConfig(lr=1.0, schedule="cosine"), 5)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert found == pytest.approx([1.0, quarter, 0.55, 1.1 - quarter, 0.1])


def test_cosine_after_warm_up() -> None:
    cfg = OptimizerConfig(lr=1.0, schedule="cosine", warmup_steps=2, final_lr_ratio=0.0)
    assert rates(cfg, 5) == pytest.approx([0.1, 0.55, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_few_steps_has_no_division_by_zero(steps: int) -> None:
    cfg = OptimizerConfig(lr=1.0, schedule="cosine", warmup_steps=2)
    assert all(0.1 <= rate <= 1.0 for rate in rates(cfg, steps))


def test_past_the_end_the_rate_stays_at_its_last() -> None:
    assert learning_rate(OptimizerConfig(lr=1.0, schedule="cosine"), 99, 5) == pytest.approx(0.1)


def test_linear_by_hand_has_its_share_ahead_of_its_last_step() -> None:
    cfg = OptimizerConfig(lr=1.0, schedule="linear", final_lr_ratio=0.2)
    assert rates(cfg, 4) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert rates(OptimizerConfig(lr=1.0, schedule="linear", final_lr_ratio=0.0), 4)[-1] == 0.25
