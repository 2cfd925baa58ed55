"""The split of workers that makes an iteration shortest, by a model of what it is made of.

Takes what an iteration costs each role, gives seconds for any number of workers and the best of them:

    synchronous   longest of (generation, scoring, reference, evaluation) + update + publish
    asynchronous  longest of (generation, scoring, reference, evaluation + update + publish)

as far as work divides by workers, which decoding does while a worker has more to do than it samples at once. Knows
neither metrics nor configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

FURTHER = 16  # times as many workers of a role as there are, at most, are looked at


@dataclass(frozen=True)
class Work:
    """Of one iteration: seconds that one worker of a role alone would take, `publish` as it is for any number."""

    generation: float
    reward: float
    reference: float
    evaluation: float  # of the learner, as rows arrive
    update: float
    publish: float


@dataclass(frozen=True)
class Machines:
    """What there is for all roles together. `costs`: GPUs of a worker by role, or cores where there are no GPUs: those
    it computes with. GPUs are a worker's own; cores are shared by roles that take turns."""

    amount: float
    costs: Mapping[str, float]
    own: bool  # whether a worker keeps what it has


@dataclass(frozen=True)
class Split:
    """Workers by role, and the seconds of an iteration with them."""

    workers: Mapping[str, int]
    seconds: float


def seconds(work: Work, workers: Mapping[str, int], machines: Machines, asynchronous: bool) -> float:
    """Of an iteration. Where cores are shared, what goes on side by side cannot take less than all of it on all
    cores."""
    learner = workers["learner"]
    at_first = {role: getattr(work, role) for role in ("generation", "reward", "reference") if role in workers}
    early = [alone / workers[role] for role, alone in at_first.items()]
    evaluation, late = work.evaluation / learner, work.update / learner + work.publish
    computed = sum(alone * machines.costs[role] for role, alone in at_first.items())
    computed += work.evaluation * machines.costs["learner"]
    if asynchronous:
        computed += work.update * machines.costs["learner"]
        side_by_side = [*early, evaluation + late]
    else:
        side_by_side = [*early, evaluation]
    whole = max(side_by_side) if machines.own else max(*side_by_side, computed / machines.amount)
    return whole if asynchronous else whole + late


def best(
    work: Work, roles: Mapping[str, int], machines: Machines, asynchronous: bool, minibatch_size: int = 0
) -> Split:
    """Of all splits over `roles` that there is room for; of equals that which changes least. The learner's ranks divide
    `minibatch_size`, where one is given."""
    counts = {role: _counts(now, machines, role) for role, now in roles.items()}
    counts["learner"] = [n for n in counts["learner"] if not minibatch_size % n]
    splits = (Split(one, seconds(work, one, machines, asynchronous)) for one in _splits(roles, counts, machines))

    def changes(split: Split) -> int:
        return sum(abs(count - roles[role]) for role, count in split.workers.items())

    return min(splits, key=lambda split: (round(split.seconds, 6), changes(split)))


def _counts(now: int, machines: Machines, role: str) -> list[int]:
    """Numbers of workers of one role that are looked at: all small ones, then about a fourth more each time."""
    most = max(1, min(now * FURTHER, int(machines.amount / machines.costs[role])))
    counts = [1]
    while counts[-1] < most:
        counts.append(min(most, max(counts[-1] + 1, counts[-1] * 5 // 4)))
    return counts


def _splits(roles: Mapping[str, int], counts: Mapping[str, list[int]], machines: Machines) -> Iterator[dict[str, int]]:
    """What runs now is among them, whatever it takes."""
    yield dict(roles)
    for chosen in itertools.product(*(counts[role] for role in roles)):
        taken = [count * machines.costs[role] for role, count in zip(roles, chosen, strict=True)]
        if (sum(taken) if machines.own else max(taken)) <= machines.amount:
            yield dict(zip(roles, chosen, strict=True))
