"""How contenders are compared: in turn, round after round in one run, so that whatever slows the machine slows them
all; medians of the rounds after a first one that warms up; a table, and JSON with what it was measured on."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_cluster.environment import describe_environment

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measured:
    """Seconds of one contender, round by round: of the clock, and of the processor in all threads."""

    seconds: list[float]
    cpu_seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def born_with(variables: Mapping[str, str]) -> None:
    """This process with these variables from its start, as a worker has them: OpenMP reads them once."""
    if any(os.environ.get(name) != value for name, value in variables.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **variables})


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Measured]:
    """Calls each of them once a round. The order turns, so that none always comes after the same other."""
    found = {name: Measured([], []) for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            began, cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            if number:
                found[name].seconds.append(time.perf_counter() - began)
                found[name].cpu_seconds.append(time.process_time() - cpu)
    return found


def ratio(of: Measured, over: Measured) -> dict[str, float]:
    """Of the medians, and the smallest and largest of a round."""
    each = [one / other for one, other in zip(of.seconds, over.seconds, strict=True)]
    return {"median": of.median / over.median, "min": min(each), "max": max(each)}


def show(title: str, columns: list[str], rows: list[list[str]], notes: list[str]) -> None:
    """`rows` of text, numbers among it already with their digits."""
    console, table = Console(highlight=False, width=max(120, Console().width)), Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in [*notes, f"load average {os.getloadavg()[0]:.2f}"]:
        console.print(note, soft_wrap=True)


def write(name: str, found: Mapping[str, Any]) -> Path:
    """`benchmarks/results/<name>-<utc>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%S}.json"
    path.write_text(json.dumps({**found, "environment": describe_environment()}, indent=1) + "\n")
    return path


def compare(
    name: str, title: str, tokens: int, found: Mapping[str, Measured], goal: float, args: Mapping[str, Any]
) -> None:
    """Prints and writes the second contender over the first, in tokens a second."""
    first, second = found
    gain = ratio(found[first], found[second])
    lines = [
        [name, f"{one.median:.2f}", f"{min(one.seconds):.2f}", f"{max(one.seconds):.2f}", f"{tokens / one.median:.0f}"]
        for name, one in found.items()
    ]
    last = [f"{second} over {first}", *(f"{gain[of]:.3f}" for of in ("median", "min", "max")), f">= {goal}"]
    show(title, ["", "seconds, median", "min", "max", "tokens/s"], [*lines, last], [])
    seconds = {name: vars(one) for name, one in found.items()}
    write(name, {"arguments": args, "tokens": tokens, "contenders": seconds, "ratio": gain, "goal": goal})
