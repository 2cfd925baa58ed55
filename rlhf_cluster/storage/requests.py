"""What a person asks of a run that is going on: a file in its directory, and beside it what its driver answers.

Takes and gives JSON values; it knows nothing of what is asked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_cluster.storage.durable import replace_text

ANSWERED = ".answer"


@dataclass(frozen=True)
class Request:
    """`number` is the nanosecond that it was asked in: it orders requests, and no two have the same."""

    number: int
    asked: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """`granted`: it was done; else `said` is why not."""

    granted: bool
    said: str


class Requests:
    """In one directory, which need not exist yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def ask(self, asked: Mapping[str, Any]) -> Request:
        self.directory.mkdir(parents=True, exist_ok=True)
        request = Request(time.time_ns(), asked)
        replace_text(self._path(request.number), json.dumps(dict(asked)) + "\n", "the request")
        return request

    def waiting(self) -> list[Request]:
        """Those without an answer, the oldest first."""
        numbers = sorted(int(path.stem) for path in self.directory.glob("*.json") if path.stem.isdigit())
        open_ones = [number for number in numbers if not self._path(number, ANSWERED).exists()]
        return [Request(number, json.loads(self._path(number).read_text())) for number in open_ones]

    def answer(self, request: Request, answer: Answer) -> None:
        replace_text(self._path(request.number, ANSWERED), json.dumps(asdict(answer)) + "\n", "the answer")

    def answer_to(self, request: Request) -> Answer | None:
        path = self._path(request.number, ANSWERED)
        return Answer(**json.loads(path.read_text())) if path.exists() else None

    def _path(self, number: int, kind: str = "") -> Path:
        return self.directory / f"{number}{kind}.json"
