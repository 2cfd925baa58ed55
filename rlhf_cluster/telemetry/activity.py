"""What every worker is at, as the driver knows it, and what the others did while one waited.

A call is under way from when it is sent until its answer is here, on one clock for all nodes. Gives `idle/<role>`,
spans in the timeline, and the table of bubbles. Workers are named `<role> <number>`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rlhf_cluster.telemetry.timer import Span, Timeline, Timer

WORKERS = "workers"  # the stage of their spans
LEFT_OUT = ("store",)  # never a bottleneck: it copies
# Of what is under way elsewhere, the first of these is what an idle worker waits for.
CAUSES = {
    ("learner", "update"): "update",
    ("learner", "publish"): "publish",
    ("generation", "fetch"): "weights",
    ("generation", "load"): "weights",
    ("generation", "digests"): "weights",
    ("generation", "sample"): "generation",
    ("reward", "score"): "scoring",
    ("reference", "logprobs"): "reference",
    ("learner", "add"): "evaluation",
    ("learner", "save"): "checkpoint",
}
NOBODY = "driver"


def role_of(worker: str) -> str:
    return worker.rpartition(" ")[0] or worker


class Activity:
    """Of the workers that it was told of."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._timer = Timer(timeline, WORKERS)
        self._workers: list[str] = []
        self._doing: dict[str, list[str]] = defaultdict(list)
        self._since = timeline.now()

    def know(self, worker: str) -> None:
        if role_of(worker) not in LEFT_OUT:
            self._workers.append(worker)

    def forget(self, worker: str) -> None:
        """It is no longer there to be idle."""
        if worker in self._workers:
            self._workers.remove(worker)

    @contextmanager
    def at(self, worker: str, verb: str) -> Iterator[None]:
        self._doing[worker].append(verb)
        try:
            with self._timer(worker, verb):
                yield
        finally:
            self._doing[worker].remove(verb)

    def doing(self, worker: str) -> str:
        """What it was asked first of what it has not answered yet; nothing where there is no such."""
        return next(iter(self._doing[worker]), "")

    def idle(self) -> dict[str, float]:
        """`idle/<role>`: the share of the time since the last call that its workers had nothing to do."""
        now, busy = self._timeline.now(), self._timer.take_seconds()
        window, self._since = max(now - self._since, 1e-9), now
        shares = defaultdict(list)
        for worker in self._workers:
            shares[role_of(worker)].append(max(0.0, 1 - busy.get(worker, 0.0) / window))
        return {f"idle/{role}": sum(own) / len(own) for role, own in shares.items()}


@dataclass(frozen=True)
class Bubbles:
    """Of one role: its workers, and shares of their time between the first batch's begin and the last update: busy, and
    idle by what was waited for."""

    role: str
    workers: int
    busy: float
    causes: Mapping[str, float]


def bubbles(spans: Iterable[Span]) -> list[Bubbles]:
    """Role by role; nothing where no batch was trained on."""
    spans = [span for span in spans if span.stage == WORKERS and role_of(span.part) not in LEFT_OUT]
    began = min((span.start for span in spans if span.name == "begin"), default=math.inf)
    ended = max((span.end for span in spans if span.name == "update"), default=-math.inf)
    within = [
        replace(span, start=max(began, span.start), end=min(ended, span.end))
        for span in spans
        if span.start < ended and span.end > began
    ]
    if not within:
        return []
    sizes = Counter(role_of(worker) for worker in dict.fromkeys(span.part for span in within))
    waited: dict[str, dict[str, float]] = {role: defaultdict(float) for role in sorted(sizes)}
    for seconds, calls, busy in _intervals(within):
        cause = next((word for call, word in CAUSES.items() if calls[call]), NOBODY)
        for role, of_causes in waited.items():
            of_causes[cause] += seconds * (sizes[role] - busy[role])
    window, found = ended - began, []
    for role, of_causes in waited.items():
        whole = window * sizes[role]
        largest_first = sorted(of_causes.items(), key=lambda pair: -pair[1])
        shares = {cause: idle / whole for cause, idle in largest_first if idle > 1e-9 * window}
        found.append(Bubbles(role, sizes[role], 1 - sum(of_causes.values()) / whole, shares))
    return found


def _intervals(spans: Sequence[Span]) -> Iterator[tuple[float, Counter[tuple[str, str]], Counter[str]]]:
    """Between every two moments at which something begins or ends: seconds, calls under way by role and verb, and busy
    workers by role."""
    changes = [(when, change, i) for i, span in enumerate(spans) for when, change in ((span.start, 1), (span.end, -1))]
    calls: Counter[tuple[str, str]] = Counter()
    of_worker: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    changes.sort()
    last = changes[0][0]
    for when, change, index in changes:
        if when > last:
            yield when - last, calls, busy
        last, worker = when, spans[index].part
        calls[role_of(worker), spans[index].name] += change
        of_worker[worker] += change
        if of_worker[worker] == (1 if change > 0 else 0):
            busy[role_of(worker)] += change
