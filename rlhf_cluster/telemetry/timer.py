"""Where the time goes: seconds by part of an iteration, and all spans of a run as a Chrome trace.

Takes `with timer("gen"):` around work, gives `timing_s/gen` and `timeline.json`. Parts may overlap, each other and
themselves (asyncio tasks): a part's seconds are the wall-clock time during which it ran at least once, never the sum
over tasks, so that no part can exceed the iteration. Not for threads. Knows nothing of what the parts are.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cluster.storage.durable import replace_text

MAX_SPANS = 200_000  # a trace viewer gives up beyond; the oldest are dropped and their number stands in the trace


@dataclass(frozen=True)
class Span:
    """One piece of work: seconds since the timeline began."""

    stage: str
    part: str
    start: float
    end: float
    name: str = ""  # what is shown; empty: the part


class Timeline:
    """All spans of this attempt."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, max_spans: int = MAX_SPANS) -> None:
        self._clock = clock
        self._zero = clock()
        self.spans: deque[Span] = deque(maxlen=max_spans)
        self.dropped = 0

    def now(self) -> float:
        """Seconds since the timeline began."""
        return self._clock() - self._zero

    def add(self, span: Span) -> None:
        self.dropped += len(self.spans) == self.spans.maxlen
        self.spans.append(span)

    def write_chrome(self, path: Path, **further: Any) -> None:
        """Writes the Chrome trace format (chrome://tracing, ui.perfetto.dev), whole or not at all."""
        trace = {"traceEvents": list(_events(self.spans)), "otherData": {"dropped_spans": self.dropped, **further}}
        replace_text(path, json.dumps(trace), "the timeline")


class Timer:
    """Seconds by part since the last `take`, and every span into `timeline`."""

    def __init__(self, timeline: Timeline, stage: str) -> None:
        self._timeline = timeline
        self._stage = stage
        self._seconds: dict[str, float] = {}
        self._running: dict[str, int] = {}
        self._since: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str, name: str = "") -> Iterator[None]:
        start = self._timeline.now()
        if not self._running.get(part):
            self._since[part] = start
        self._running[part] = self._running.get(part, 0) + 1
        try:
            yield
        finally:
            end = self._timeline.now()
            self._running[part] -= 1
            if not self._running[part]:
                self._settle(part, end)
                del self._running[part]
            self._timeline.add(Span(self._stage, part, start, end, name))

    def take(self) -> dict[str, float]:
        """`timing_s/<part>` since the last call."""
        return {f"timing_s/{part}": seconds for part, seconds in self.take_seconds().items()}

    def take_seconds(self) -> dict[str, float]:
        """By part, since the last call. A part that still runs is counted up to now and goes on from here."""
        now = self._timeline.now()
        for part in self._running:
            self._settle(part, now)
        taken, self._seconds = self._seconds, {}
        return taken

    def _settle(self, part: str, now: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._since[part]
        self._since[part] = now


def _events(spans: Iterable[Span]) -> Iterator[dict[str, Any]]:
    """Complete ("X") events. A viewer nests what shares a row, so overlapping spans of a part get rows of their own."""
    rows: dict[str, list[tuple[int, float]]] = {}  # part -> (row id, when it is free again)
    count = 0
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        lanes = rows.setdefault(span.part, [])
        lane = next((i for i, (_, free) in enumerate(lanes) if free <= span.start), len(lanes))
        if lane == len(lanes):
            count += 1
            lanes.append((count, 0.0))
            yield {"ph": "M", "name": "thread_name", "pid": 1, "tid": count, "args": {"name": span.part}}
        lanes[lane] = (lanes[lane][0], span.end)
        yield {
            "ph": "X",
            "name": span.name or span.part,
            "cat": span.stage,
            "pid": 1,
            "tid": lanes[lane][0],
            "ts": round(span.start * 1e6, 1),
            "dur": round((span.end - span.start) * 1e6, 1),
        }
