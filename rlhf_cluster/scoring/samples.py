"""A rollout as a reward function sees it, and what became of the asking. Imports nothing heavy: user functions run in a
process of their own, which should start at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MESSAGES = "prompt"  # a prompt row's own column where it was given as messages: a list of {role, content}
Answer = float | None  # None: the function has nothing to say of this sample


@dataclass(frozen=True)
class Sample:
    """One response with its prompt, what the chat template makes of it, as text without special tokens. `given`: the
    prompt alone, where its row had it as text. `raw`: prompt and response with their special tokens."""

    sample_id: str
    prompt: str
    response: str
    ended: bool  # it stopped by itself, rather than at the longest length
    columns: Mapping[str, Any] = field(default_factory=dict)  # the prompt row's own: an answer, a source, its messages
    given: str = ""
    raw: tuple[str, str] = ("", "")


class CallFailed(Exception):
    """One call got no usable answer; the message says why, in a few words."""


@dataclass(frozen=True)
class Verdicts:
    """One entry per sample: a finite score (0 where there is none), why there is none (or nothing), and the seconds
    that it took."""

    scores: Sequence[float]
    failures: Sequence[str]
    seconds: Sequence[float]


Call = Callable[[Sequence[Sample], float], Sequence[Answer]]  # samples and a deadline in seconds; raises CallFailed
