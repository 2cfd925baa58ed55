"""What workers were at, and what they waited for, by hand."""

from __future__ import annotations

import pytest

from rlhf_cluster.telemetry.activity import Activity, Bubbles, bubbles
from rlhf_cluster.telemetry.timer import Span, Timeline


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def at(worker: str, verb: str, start: float, end: float) -> Span:
    return Span("workers", worker, start, end, verb)


def test_idle_shares_are_means_over_the_workers_of_a_role() -> None:
    clock = Clock()
    activity = Activity(Timeline(clock))
    for worker in ("generation 0", "generation 1", "learner 0", "store 0"):
        activity.know(worker)
    with activity.at("generation 0", "sample"):
        clock.now = 4.0
        with activity.at("learner 0", "add"), activity.at("learner 0", "add"):
            clock.now = 6.0
    clock.now = 8.0
    assert activity.idle() == {"idle/generation": pytest.approx(1 - 6 / 8 / 2), "idle/learner": 0.75}
    clock.now = 10.0
    assert activity.idle() == {"idle/generation": 1.0, "idle/learner": 1.0}


def test_a_call_that_is_under_way_counts_up_to_now() -> None:
    clock = Clock()
    activity = Activity(Timeline(clock))
    activity.know("learner 0")
    with activity.at("learner 0", "update"):
        clock.now = 2.0
        assert activity.idle() == {"idle/learner": 0.0}
        clock.now = 3.0
    clock.now = 4.0
    assert activity.idle() == {"idle/learner": 0.5}


def test_idle_time_is_put_down_to_what_went_on_elsewhere() -> None:
    """Ten seconds: sampling until 4, scoring until 5, nothing until 6, the update until 9, and until 10 it is saved."""
    spans = [
        at("generation 0", "start", -30.0, -1.0),
        at("learner 0", "begin", 0.0, 0.0),
        at("generation 0", "sample", 0.0, 4.0),
        at("generation 1", "sample", 0.0, 2.0),
        at("reward 0", "score", 4.0, 5.0),
        at("learner 0", "update", 6.0, 10.0),
        at("learner 0", "publish", 10.0, 11.0),
        at("store 0", "add", 0.0, 10.0),
        Span("ppo", "step", 0.0, 10.0),
    ]
    found = bubbles(spans)
    assert found == [
        Bubbles(
            "generation",
            2,
            pytest.approx(0.3),
            pytest.approx({"update": 0.4, "generation": 0.1, "scoring": 0.1, "driver": 0.1}),
        ),
        Bubbles("learner", 1, pytest.approx(0.4), pytest.approx({"generation": 0.4, "scoring": 0.1, "driver": 0.1})),
        Bubbles("reward", 1, pytest.approx(0.1), pytest.approx({"generation": 0.4, "update": 0.4, "driver": 0.1})),
    ]
    for one in found:
        assert one.busy + sum(one.causes.values()) == pytest.approx(1.0)
    assert next(iter(found[0].causes)) == "update"  # the largest first


def test_overlapping_calls_of_a_worker_are_one_piece_of_work() -> None:
    spans = [
        at("learner 0", "begin", 0.0, 0.0),
        at("reward 0", "score", 0.0, 4.0),
        at("reward 0", "score", 2.0, 6.0),
        at("learner 0", "update", 6.0, 8.0),
    ]
    (reward,) = [one for one in bubbles(spans) if one.role == "reward"]
    assert reward.busy == pytest.approx(0.75) and reward.causes == pytest.approx({"update": 0.25})


def test_without_a_batch_there_are_none() -> None:
    assert bubbles([at("generation 0", "start", 0.0, 5.0), Span("sft", "step", 0.0, 1.0)]) == []
    assert bubbles([]) == []
