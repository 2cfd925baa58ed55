"""Who ranks responses where no human rankings are given, and how scores become ranks with ties.

A labeler sees text and, for `exact`, the prompt's right answer; nothing else. `vader` is a stated stand-in for a human
labeler: the sentiment lexicon of Hutto and Gilbert (2014, ICWSM), package vaderSentiment. It knows words, not meaning;
what is trained on it learns to sound positive, and no claim beyond that is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class LabelerError(ValueError):
    """A labeler that does not exist, or scores that cannot be ranked."""


class Labeler(Protocol):
    """Gives one score per text, the higher the better. `answers`: the prompts' right ones, None where there is none."""

    def score(self, texts: Sequence[str], answers: Sequence[Any]) -> list[float]: ...


class VaderLabeler:
    """VADER's compound score in [-1, 1]: the summed valence x of a text's words, as x / sqrt(x^2 + 15)."""

    def __init__(self) -> None:
        # Imported here: the package pulls in an HTTP client that nothing else of this room needs.
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, texts: Sequence[str], answers: Sequence[Any]) -> list[float]:
        return [float(self._analyzer.polarity_scores(text)["compound"]) for text in texts]


class LettersLabeler:
    """The share of a text's characters that are letters, in [0, 1]: for the tiny model, whose responses hold no
    words."""

    def score(self, texts: Sequence[str], answers: Sequence[Any]) -> list[float]:
        return [sum(character.isalpha() for character in text) / max(len(text), 1) for text in texts]


class ExactLabeler:
    """1 where the text is the right answer, but for white space around it, else 0: a labeler who knows."""

    def score(self, texts: Sequence[str], answers: Sequence[Any]) -> list[float]:
        return [float(text.strip() == str(answer).strip()) for text, answer in zip(texts, answers, strict=True)]


LABELERS: dict[str, Callable[[], Labeler]] = {
    "vader": VaderLabeler,
    "letters": LettersLabeler,
    "exact": ExactLabeler,
}


def make_labeler(name: str) -> Labeler:
    """Raises LabelerError for an unknown name."""
    if name not in LABELERS:
        raise LabelerError(f"there is no labeler {name!r}; allowed: {', '.join(LABELERS)}")
    return LABELERS[name]()


def rank(scores: Sequence[float], tie_margin: float) -> list[int]:
    """Ranks of K scores, 1 the best, equal ranks for ties, no rank left out.

    From the best score down: the first score that is not yet ranked leads a group, and all that lie at most
    `tie_margin` below the leader tie with it. Ties are therefore transitive, which "closer than the margin to each
    other" is not: of 0.9, 0.5, 0.1 with margin 0.45 the first two tie and the third is below both.

    Raises LabelerError for NaN or infinite scores and for a margin that is negative or not finite.
    """
    if not (math.isfinite(tie_margin) and tie_margin >= 0):
        raise LabelerError(f"tie_margin={tie_margin}; it must be a finite number of at least 0")
    for position, score in enumerate(scores):
        if not math.isfinite(score):
            raise LabelerError(f"score {score} of response {position} (of {len(scores)}) is not finite; cannot rank it")
    ranks = [0] * len(scores)
    group, leader = 0, math.inf
    for position in sorted(range(len(scores)), key=lambda position: -scores[position]):
        if leader - scores[position] > tie_margin:
            group, leader = group + 1, scores[position]
        ranks[position] = group
    return ranks
