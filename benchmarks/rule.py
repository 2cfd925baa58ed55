"""A reward that is a rule and is quickly learnt: `asynchronous.py` asks for it by `path: benchmarks/rule.py:vowels`."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cluster.scoring.samples import Sample


def vowels(samples: Sequence[Sample]) -> list[float]:
    """The share of a response's characters that are vowels."""
    return [sum(letter in "aeiou" for letter in sample.response) / max(1, len(sample.response)) for sample in samples]
