"""What a key may be, said where the key is: `steps: int = count(100)`.

A bound is kept beside the field of the dataclass; `within_bounds` looks at all of a tree. What takes words of its own,
or relates several keys, is `validation`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from rlhf_cluster.config.refusal import require


@dataclass(frozen=True)
class Bound:
    """What holds for an allowed value, and how a refusal says it."""

    holds: Callable[[Any], bool]
    words: str


ANYTHING = Bound(lambda value: True, "")


def one_of(*allowed: object, default: object) -> Any:
    return _bounded(default, _choice(allowed))


def at_least(low: int, default: float) -> Any:
    return _bounded(default, Bound(lambda value: value >= low, f"be at least {low}"))


def none_or_at_least(low: int) -> Any:
    """0, which is the default, stands for none."""
    return _bounded(0, Bound(lambda value: value == 0 or value >= low, f"be 0 or at least {low}"))


def count(default: int) -> Any:
    return at_least(1, default)


def not_negative(default: float) -> Any:
    return _bounded(default, Bound(lambda value: value >= 0, "not be negative"))


def positive(default: float) -> Any:
    return _bounded(default, Bound(lambda value: value > 0, "be above 0"))


def share(default: float) -> Any:
    """From 0 to 1."""
    return _bounded(default, Bound(lambda value: 0 <= value <= 1, "be between 0 and 1"))


def fraction(default: float) -> Any:
    """A share that is never all."""
    return _bounded(default, Bound(lambda value: 0 <= value < 1, "be from 0 up to but not 1"))


def _choice(allowed: tuple[object, ...]) -> Bound:
    return Bound(allowed.__contains__, f"be one of {', '.join(str(one) or 'nothing' for one in allowed)}")


def _bounded(default: object, bound: Bound) -> Any:
    return field(default=default, metadata={"bound": bound})


def bounded_leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Bound]]:
    """(key, value, bound) of everything in a tree that is not a section."""
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            yield from bounded_leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value, f.metadata.get("bound", ANYTHING)


def within_bounds(node: Any, prefix: str = "") -> None:
    """Raises ConfigError on the first key whose value is not allowed. Every float has to be finite."""
    for key, value, bound in bounded_leaves(node, prefix):
        require(not isinstance(value, float) or math.isfinite(value), f"{key}={value}: it must be a finite number")
        require(bound.holds(value), f"{key}={value}: it must {bound.words}")
        for index, one in enumerate(value if isinstance(value, list) else ()):
            if is_dataclass(one):
                within_bounds(one, f"{key}[{index}].")


def require_one_of(key: str, value: object, allowed: tuple[object, ...]) -> None:
    bound = _choice(allowed)
    require(bound.holds(value), f"{key}={value}: it must {bound.words}")
