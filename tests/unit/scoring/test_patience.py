"""Deadlines, retries and the breaker on a clock of the test's own: what each sample gets, who is asked how often."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rlhf_cluster.scoring.patience import Patience, Patient
from rlhf_cluster.scoring.samples import Answer, CallFailed, Sample

PATIENCE = Patience(
    deadline_s=2.0,
    retries=1,
    backoff_s=0.5,
    breaker_failures=3,
    breaker_s=30.0,
    batch_size=4,
    concurrency=1,
    budget_s=100.0,
)


@dataclass
class Asked:
    """A reward that answers by rule, and all that it was asked."""

    rule: Callable[[Sequence[str]], Sequence[Answer]]
    calls: list[tuple[list[str], float]] = field(default_factory=list)

    def __call__(self, samples: Sequence[Sample], deadline_s: float) -> Sequence[Answer]:
        names = [sample.sample_id for sample in samples]
        self.calls.append((names, deadline_s))
        return self.rule(names)


@dataclass
class Clock:
    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def patient(asked: Asked, clock: Clock, patience: Patience = PATIENCE) -> Patient:
    return Patient(asked, patience, clock, clock.sleep)


def samples(names: str) -> list[Sample]:
    return [Sample(name, "prompt", "response", True) for name in names]


def scores(names: Sequence[str]) -> list[Answer]:
    return [float(ord(name)) for name in names]


def test_many_are_asked_in_batches_each_with_the_deadline_of_its_samples() -> None:
    asked = Asked(scores)
    found = patient(asked, Clock())(samples("abcdef"))
    assert list(found.scores) == [97.0, 98.0, 99.0, 100.0, 101.0, 102.0] and not any(found.failures)
    assert asked.calls == [(["a", "b", "c", "d"], 8.0), (["e", "f"], 4.0)]


def test_one_that_raises_costs_itself_alone() -> None:
    def rule(names: Sequence[str]) -> Sequence[Answer]:
        if "c" in names:
            raise CallFailed("it raised KeyError: c")
        return scores(names)

    asked, clock = Asked(rule), Clock()
    found = patient(asked, clock)(samples("abcd"))
    assert list(found.scores) == [97.0, 98.0, 0.0, 100.0]
    assert list(found.failures) == ["", "", "it raised KeyError: c", ""]
    assert [names for names, _ in asked.calls] == [["a", "b", "c", "d"], ["a"], ["b"], ["c"], ["c"], ["d"]]
    assert clock.slept == [0.5]
    assert asked.calls[1] == (["a"], 2.0)


def test_backoff_doubles() -> None:
    def rule(names: Sequence[str]) -> Sequence[Answer]:
        raise CallFailed("no")

    clock = Clock()
    patient(
        Asked(rule),
        clock,
        replace(PATIENCE, retries=3, breaker_failures=99, batch_size=1),
    )(samples("a"))
    assert clock.slept == [0.5, 1.0, 2.0]


def test_one_that_is_not_finite_is_asked_again_and_the_others_are_not() -> None:
    asked = Asked(lambda names: [math.nan if name == "b" else 1.0 for name in names])
    found = patient(asked, Clock())(samples("abc"))
    assert list(found.scores) == [1.0, 0.0, 1.0]
    assert list(found.failures) == ["", "it gave nan", ""]
    assert [names for names, _ in asked.calls] == [["a", "b", "c"], ["b"], ["b"]]


def test_a_wrong_count_is_no_answer() -> None:
    asked = Asked(lambda names: [1.0] * (len(names) + 1))
    found = patient(asked, Clock())(samples("ab"))
    assert list(found.failures) == ["it gave 2 scores for 1 samples"] * 2


def test_nothing_to_say_counts_nothing() -> None:
    found = patient(Asked(lambda names: [None, 2.0]), Clock())(samples("ab"))
    assert list(found.scores) == [0.0, 2.0] and not any(found.failures)


def test_a_second_try_may_succeed() -> None:
    answers = iter([CallFailed("busy"), CallFailed("busy"), [5.0]])

    def rule(names: Sequence[str]) -> Sequence[Answer]:
        answer = next(answers)
        if isinstance(answer, CallFailed):
            raise answer
        return answer

    found = patient(Asked(rule), Clock())(samples("a"))
    assert (list(found.scores), list(found.failures)) == ([5.0], [""])


def test_after_failures_in_a_row_nobody_is_asked_for_a_while() -> None:
    def rule(names: Sequence[str]) -> Sequence[Answer]:
        if clock.now < 100:
            raise CallFailed("down")
        return scores(names)

    clock = Clock()
    asked = Asked(rule)
    ask = patient(asked, clock)
    found = ask(samples("abcdef"))
    assert list(found.failures[:3]) == ["down"] * 3
    assert all(failure == "not asked: 3 samples in a row failed, the last: down" for failure in found.failures[3:])
    calls = len(asked.calls)
    ask(samples("ab"))
    assert len(asked.calls) == calls  # still open
    clock.now = 100.0
    assert list(ask(samples("ab")).scores) == [97.0, 98.0]  # asked again, and well


def test_calls_side_by_side_answer_in_order() -> None:
    patience = replace(PATIENCE, retries=0, backoff_s=0.0, batch_size=1, concurrency=4)
    assert list(patient(Asked(scores), Clock(), patience)(samples("abcdefgh")).scores) == [*map(float, range(97, 105))]


def test_what_is_no_number_is_no_answer() -> None:
    """JSON allows integers of any length."""
    for bad in ("five", 10**400, [1.0]):
        found = patient(Asked(lambda names, bad=bad: [bad] * len(names)), Clock())(samples("a"))
        assert list(found.scores) == [0.0]
        assert found.failures[0].startswith("it gave a score that is no number: ")


def test_one_that_hangs_in_every_batch_costs_the_budget_and_no_more() -> None:
    """Each hanging call takes its whole deadline; the last of them what is left. The others of its batch are asked
    alone, and what comes after the budget is not asked at all."""

    def call(batch: Sequence[Sample], deadline_s: float) -> Sequence[Answer]:
        if any(sample.sample_id in "ae" for sample in batch):
            clock.now += deadline_s
            raise CallFailed(f"no answer within {deadline_s:g} s")
        return scores([sample.sample_id for sample in batch])

    clock = Clock()
    patience = replace(PATIENCE, breaker_failures=99, budget_s=21.0)
    ask = Patient(call, patience, clock, clock.sleep)
    found = ask(samples("abcdefghij"))
    # a to d together 8 s, a alone twice 2 s with a pause of 0.5 s: 8.5 s of 21 s are left. e to h together half of
    # that; e alone 2 s, the pause, and the 1.75 s that are left.
    assert clock.now == 21.0
    assert list(found.scores) == [0.0, 98.0, 99.0, 100.0, *[0.0] * 6]
    assert found.failures[0] == "no answer within 2 s" and found.failures[4] == "no answer within 1.75 s"
    assert set(found.failures[5:8]) == {"no answer within 4.25 s"}  # asked together, and not alone any more
    assert all(failure.startswith("not asked: the 21 s for the samples that came") for failure in found.failures[8:])
    assert list(ask(samples("bc")).scores) == [98.0, 99.0]  # the next ones have a budget of their own


def test_a_batch_leaves_time_to_ask_each_alone() -> None:
    """However long the deadline is: one that hangs does not cost the others of its batch."""

    def call(batch: Sequence[Sample], deadline_s: float) -> Sequence[Answer]:
        if any(sample.sample_id == "a" for sample in batch):
            clock.now += deadline_s
            raise CallFailed("it hangs")
        return scores([sample.sample_id for sample in batch])

    clock = Clock()
    ask = Patient(
        call,
        replace(PATIENCE, deadline_s=50.0, retries=0, backoff_s=0.0, breaker_failures=99, budget_s=60.0),
        clock,
        clock.sleep,
    )
    found = ask(samples("bcda"))
    assert list(found.scores) == [98.0, 99.0, 100.0, 0.0] and found.failures[3] == "it hangs"
    assert clock.now == 60.0


def test_samples_whose_batch_took_all_the_time_count_for_the_breaker() -> None:
    """A reward that always hangs costs its budget a few times, not for ever."""

    def call(batch: Sequence[Sample], deadline_s: float) -> Sequence[Answer]:
        clock.now += deadline_s
        raise CallFailed("it hangs")

    clock = Clock()
    ask = Patient(
        call,
        replace(
            PATIENCE, deadline_s=50.0, retries=0, backoff_s=0.0, breaker_failures=4, breaker_s=1000.0, budget_s=60.0
        ),
        clock,
        clock.sleep,
    )
    assert list(ask(samples("abcd")).failures) == ["it hangs"] * 4
    assert clock.now == 60.0
    assert ask(samples("e")).failures[0] == "not asked: 4 samples in a row failed, the last: it hangs"
    assert clock.now == 60.0
