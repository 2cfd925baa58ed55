from __future__ import annotations

import asyncio
import itertools
import json
import random
from pathlib import Path

import pytest

from rlhf_cluster.telemetry.timer import Span, Timeline, Timer


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_seconds_by_part_worked_by_hand() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    timer = Timer(timeline, "ppo")
    with timer("step"):
        clock.now = 1.0
        with timer("gen"):
            clock.now = 4.0
        with timer("update"):
            clock.now = 4.5
        with timer("gen"):
            clock.now = 5.0
    assert timer.take() == {"timing_s/step": 5.0, "timing_s/gen": 3.5, "timing_s/update": 0.5}
    assert timer.take() == {}
    assert [span for span in timeline.spans if span.part == "gen"] == [
        Span("ppo", "gen", 1.0, 4.0),
        Span("ppo", "gen", 4.5, 5.0),
    ]


def test_a_part_in_two_tasks_at_once_counts_once_and_other_parts_overlap_it() -> None:
    clock = Clock()
    timer = Timer(Timeline(clock), "ppo")
    entered = asyncio.Event()

    async def first() -> None:
        with timer("reward"):
            await entered.wait()
            clock.now = 3.0

    async def second() -> None:
        clock.now = 1.0
        with timer("reward"), timer("ref"):
            clock.now = 2.0
            entered.set()

    async def both() -> None:
        await asyncio.gather(first(), second())

    asyncio.run(both())
    assert timer.take() == {"timing_s/reward": 3.0, "timing_s/ref": 1.0}


def test_random_spans_agree_with_counting_ticks() -> None:
    """Brute force: a part's seconds are the ticks during which any of its spans was open."""
    rng = random.Random(2)
    clock = Clock()
    timer = Timer(Timeline(clock), "ppo")
    starts = [(rng.randrange(60), rng.randrange(1, 20)) for _ in range(12)]
    open_until: list[tuple[int, object]] = []
    for tick in range(90):
        clock.now = float(tick)
        for end, span in [pair for pair in open_until if pair[0] == tick]:
            span.__exit__(None, None, None)  # type: ignore[attr-defined]
            open_until.remove((end, span))
        for start, length in starts:
            if start == tick:
                span = timer("gen")
                span.__enter__()
                open_until.append((start + length, span))
    busy = sum(any(start <= tick < start + length for start, length in starts) for tick in range(90))
    assert timer.take() == {"timing_s/gen": float(busy)}


def test_what_runs_across_a_take_is_split_and_nothing_is_lost() -> None:
    clock = Clock()
    timer = Timer(Timeline(clock), "ppo")
    with timer("gen"):
        clock.now = 2.0
        assert timer.take() == {"timing_s/gen": 2.0}
        clock.now = 5.0
    assert timer.take() == {"timing_s/gen": 3.0}


def test_an_error_still_ends_the_span() -> None:
    clock = Clock()
    timer = Timer(Timeline(clock), "ppo")

    def fail() -> None:
        with timer("gen"):
            clock.now = 2.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now = 9.0
    assert timer.take() == {"timing_s/gen": 2.0}


def test_chrome_trace_rows_never_overlap(tmp_path: Path) -> None:
    timeline = Timeline(Clock())
    for start, end in [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (0.5, 0.75)]:
        timeline.add(Span("ppo", "reward", start, end))
    timeline.add(Span("ppo", "gen", 0.0, 4.0))
    timeline.write_chrome(tmp_path / "timeline.json")
    trace = json.loads((tmp_path / "timeline.json").read_text())
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == 5
    assert sorted(names.values()) == ["gen", "reward", "reward"]
    for row in names:
        inside = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["tid"] == row)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(inside))
        assert {e["name"] for e in spans if e["tid"] == row} == {names[row]}
    assert {"ts": 1e6, "dur": 2e6}.items() <= next(e for e in spans if e["ts"] == 1e6).items()
    assert [path.name for path in tmp_path.iterdir()] == ["timeline.json"]


def test_the_oldest_spans_go_and_are_counted(tmp_path: Path) -> None:
    timeline = Timeline(Clock(), max_spans=2)
    for i in range(5):
        timeline.add(Span("ppo", "gen", float(i), i + 0.5))
    timeline.write_chrome(tmp_path / "timeline.json")
    assert [span.start for span in timeline.spans] == [3.0, 4.0]
    assert json.loads((tmp_path / "timeline.json").read_text())["otherData"] == {"dropped_spans": 3}
