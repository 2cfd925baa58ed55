"""The log of a run: numbers by stage and step, checked once and handed to every sink.

Takes a mapping of metric names to numbers, gives one `MetricsRecord` to each sink: `metrics.jsonl` (always),
TensorBoard (by config), the console. Knows nothing of who measured what. Names are those that dashboards know
(`actor/pg_loss`); `a/b` beside `a/b/c` is refused, since a dashboard cannot show a number and a folder by one name.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, SupportsFloat, TextIO

FILE = "metrics.jsonl"
NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


class MetricError(ValueError):
    """A metric that cannot be logged under its name or with its value."""


@dataclass(frozen=True)
class MetricsRecord:
    """What was logged at once. `seconds` since the run began, over all attempts; `time` Unix; None: was not finite."""

    stage: str
    step: int
    seconds: float
    time: float
    metrics: Mapping[str, float | None]


class Sink(Protocol):
    """Where records go."""

    def write(self, record: MetricsRecord) -> None: ...

    def cut(self, stage: str, after_step: int) -> None:
        """Forgets what lies past the commit `after_step` of `stage`."""
        ...

    def close(self) -> None: ...


class MetricsLog:
    """Checks names and numbers, then fans out to `sinks`. `warn` takes a sentence for the console.

    A value that is NaN or infinite is written as null, counted in `non_finite` by name, and warned of: once when it
    first happens, once with the count at the end.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        warn: Callable[[str], None],
        elapsed: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._sinks = list(sinks)
        self._warn = warn
        self._clock = clock
        self._wall = wall
        self._start = clock() - elapsed
        self._names: set[str] = set()
        self._folders: set[str] = set()
        self.non_finite: Counter[str] = Counter()

    def log(self, stage: str, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Raises MetricError on a bad name or on a value that is no number; nothing is written then."""
        for name in metrics:
            self._admit(name)
        values = {name: self._finite(stage, step, name, value) for name, value in metrics.items()}
        record = MetricsRecord(stage, step, self._clock() - self._start, self._wall(), values)
        for sink in self._sinks:
            sink.write(record)

    def cut(self, stage: str, after_step: int) -> None:
        """Drops what lies past a commit, in every sink, when a run resumes at `after_step` of `stage`."""
        for sink in self._sinks:
            sink.cut(stage, after_step)

    def close(self) -> None:
        for name, count in sorted(self.non_finite.items()):
            self._warn(f"{name} was not finite {count} times in this attempt")
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _admit(self, name: str) -> None:
        if name in self._names:
            return
        if not NAME.fullmatch(name):
            raise MetricError(f"metric name {name!r} must be words of letters, digits, _ . - joined by /")
        folders = {name[:i] for i, char in enumerate(name) if char == "/"}
        below = sorted(other for other in self._names if other.startswith(name + "/"))
        above = sorted(folders & self._names)
        if name in self._folders or above:
            raise MetricError(
                f"metric {name!r} beside {(below + above)[0]!r}: one is a number, and a folder of the other"
            )
        self._names.add(name)
        self._folders |= folders

    def _finite(self, stage: str, step: int, name: str, value: SupportsFloat) -> float | None:
        if isinstance(value, str):  # float("1") would pass
            raise MetricError(f"metric {name} is the text {value!r}; it must be a number")
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise MetricError(f"metric {name} is {value!r}; it must be a number") from error
        if math.isfinite(number):
            return number
        self.non_finite[name] += 1
        if self.non_finite[name] == 1:
            self._warn(
                f"{name} is {number} at step {step} of {stage}; written as null from here on wherever it is not finite"
            )
        return None


class JsonlSink:
    """`metrics.jsonl`: one JSON object per line, flushed line by line. A line torn by a crash is dropped on opening."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()

    def write(self, record: MetricsRecord) -> None:
        line = {
            "stage": record.stage,
            "step": record.step,
            "seconds": round(record.seconds, 3),
            "time": round(record.time, 3),
            "metrics": record.metrics,
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def cut(self, stage: str, after_step: int) -> None:
        """Ends the file before the first record of `stage` with a step beyond `after_step`.

        The file is in order of time and stages follow each other, so all that comes later lies past the commit too.
        Stages of several rounds therefore need names of their own.
        """
        self._file.close()
        start = 0
        with self._path.open("rb") as file:
            for line in file:
                record = json.loads(line)
                if record["stage"] == stage and record["step"] > after_step:
                    os.truncate(self._path, start)
                    break
                start += len(line)
        self._file = self._open()

    def elapsed(self) -> float:
        """Seconds of the last record: where the clock of a resumed run goes on. 0 in a new file."""
        records = read_metrics(self._path)
        return records[-1].seconds if records else 0.0

    def close(self) -> None:
        self._file.close()

    def _open(self) -> TextIO:
        if self._path.exists():
            content = self._path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(self._path, whole)
        return self._path.open("a", encoding="utf-8", buffering=1)


def read_metrics(path: Path) -> list[MetricsRecord]:
    """All records of a `metrics.jsonl`, without a torn last line. Raises MetricError naming a line that is none."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(MetricsRecord(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise MetricError(f"{path}, line {number} is not a record of metrics: {error}") from error
    return records
