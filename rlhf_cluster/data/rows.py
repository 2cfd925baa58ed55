"""The text rows that this room works on before anything is tokenised, and the error that names a bad one.

Takes nothing from disk and knows no tokenizer: `readers` gives the raw rows, `parse` turns them into these types,
`tokenize` turns these types into records.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash


@dataclass(frozen=True)
class Place:
    """Where a row came from: file, index from 0 (-1: the file as a whole), line from 1 (0: the file has no lines)."""

    file: str
    row: int = -1
    line: int = 0

    def __str__(self) -> str:
        if self.line:
            return f"{self.file}, line {self.line}"
        return f"{self.file}, row {self.row} (counting from 0)" if self.row >= 0 else self.file


class DataError(ValueError):
    """Input that cannot be used. `reason` is the short kind that drops are counted by, `detail` what was seen."""

    def __init__(self, place: Place, reason: str, detail: str = "") -> None:
        super().__init__(f"{place}: {reason}: {detail}" if detail else f"{place}: {reason}")
        self.place = place
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class RawRow:
    """One row as the file has it."""

    place: Place
    values: Mapping[str, Any]


def column_names(row: RawRow) -> str:
    """For messages about what is missing."""
    return ", ".join(sorted(row.values)) or "no columns"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


def prompt_id(messages: Iterable[Message]) -> str:
    """16 hex digits that depend on nothing but the conversation: the same on every machine, in every run."""
    turns = [[message.role, message.content] for message in messages]
    return xxhash.xxh3_64_hexdigest(json.dumps(turns, ensure_ascii=True, separators=(",", ":")).encode())


@dataclass(frozen=True)
class PromptRow:
    """A conversation that ends with the user's turn. `columns` are the row's own, for reward functions that ask."""

    id: str
    messages: tuple[Message, ...]
    place: Place = field(compare=False)
    columns: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, messages: Iterable[Message], place: Place, columns: Mapping[str, Any] | None = None) -> PromptRow:
        turns = tuple(messages)
        return cls(prompt_id(turns), turns, place, dict(columns or {}))


@dataclass(frozen=True)
class DemonstrationRow:
    """A prompt and what a person would have answered."""

    prompt: PromptRow
    response: str


@dataclass(frozen=True)
class ComparisonRow:
    """A prompt, K >= 2 responses and their ranks: 1 the best, equal ranks are ties, no rank is left out."""

    prompt: PromptRow
    responses: tuple[str, ...]
    ranks: tuple[int, ...]

    @property
    def decides(self) -> bool:
        """Whether any pair has a winner; where all are tied the loss of InstructGPT eq. 1 has no term."""
        return len(set(self.ranks)) > 1


def dense_ranks(values: Iterable[int]) -> tuple[int, ...]:
    """Ranks from 1 without gaps in the same order: (0, 3, 3) -> (1, 2, 2). Only the order enters InstructGPT eq. 1."""
    seen = tuple(values)
    position = {value: place for place, value in enumerate(sorted(set(seen)), start=1)}
    return tuple(position[value] for value in seen)
