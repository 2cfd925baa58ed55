"""How many workers a pool should have, from what the roles waited for in the iterations so far.

Takes idle shares and how many work now, gives how many there should be. Knows neither metrics nor configuration.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """`least` to `most` workers. One more where the learner is idle for more than `starved` of an iteration while the
    pool is not for more than `rested`; one fewer where the pool is idle for more than `rested`. After a change nothing
    for `cooldown` iterations, in which what it led to shows."""

    least: int
    most: int
    starved: float
    rested: float
    cooldown: int


class Autoscaler:
    """Of one pool."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds, self._quiet = bounds, 0

    def look(self, now: int, learner_idle: float, pool_idle: float) -> int:
        """After an iteration: how many there should be."""
        bounds = self._bounds
        wanted = now
        if self._quiet:
            self._quiet -= 1
        elif pool_idle > bounds.rested:
            wanted = now - 1
        elif learner_idle > bounds.starved:
            wanted = now + 1
        wanted = min(max(wanted, bounds.least), bounds.most)
        if wanted != now:
            self._quiet = bounds.cooldown
        return wanted
