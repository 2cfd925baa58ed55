"""Who waits for whom, and what comes of it."""

from __future__ import annotations

from rlhf_cluster.planning.autoscale import Autoscaler, Bounds

BOUNDS = Bounds(least=1, most=3, starved=0.3, rested=0.5, cooldown=2)


def test_a_learner_that_waits_gets_another_worker_after_a_while_of_looking() -> None:
    scaler = Autoscaler(BOUNDS)
    assert [scaler.look(1, 0.6, 0.1), scaler.look(2, 0.6, 0.1), scaler.look(2, 0.6, 0.1)] == [2, 2, 2]
    assert scaler.look(2, 0.6, 0.1) == 3
    assert [scaler.look(3, 0.6, 0.1) for _ in range(4)] == [3] * 4  # at most


def test_a_pool_that_rests_loses_one_though_the_learner_waits_too() -> None:
    """For others, then."""
    scaler = Autoscaler(BOUNDS)
    assert scaler.look(2, 0.9, 0.6) == 1
    assert Autoscaler(BOUNDS).look(1, 0.9, 0.6) == 1  # at least


def test_what_is_in_balance_stays() -> None:
    assert Autoscaler(BOUNDS).look(2, 0.2, 0.4) == 2


def test_what_is_outside_of_its_bounds_comes_back_at_once() -> None:
    assert Autoscaler(BOUNDS).look(7, 0.2, 0.4) == 3
