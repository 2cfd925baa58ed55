"""What is done about a reward that may hang, fail or talk nonsense: deadlines, retries with backoff, a circuit breaker.

It costs samples, never the run: where a call for many fails, each of them is asked alone, and what comes at once has a
budget, beyond which the rest go unasked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Lock

from rlhf_cluster.scoring.samples import Answer, Call, CallFailed, Sample, Verdicts


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long, how often and how much at once."""

    deadline_s: float  # for each sample of a call
    retries: int  # of a sample that was asked alone
    backoff_s: float  # before the first retry; doubles with each
    breaker_failures: int  # samples in a row that failed, after which nothing is asked for a while
    breaker_s: float  # that while
    batch_size: int  # samples of a call
    concurrency: int  # calls at once
    budget_s: float  # for all samples that come at once


@dataclass
class Breaker:
    """Opens after so many failures in a row; closes by itself after a while, and one more failure opens it again."""

    failures: int
    seconds: float
    clock: Callable[[], float]
    _in_a_row: int = 0
    _open_until: float = -math.inf
    _last: str = ""
    _lock: Lock = field(default_factory=Lock)

    def tell(self, failure: str) -> None:
        """After each sample; an empty failure is a success."""
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if failure else 0
            if self._in_a_row >= self.failures:
                self._open_until, self._last = self.clock() + self.seconds, failure

    def refusal(self) -> str:
        """Why nothing may be asked now; empty where it may."""
        with self._lock:
            if self.clock() >= self._open_until:
                return ""
            return f"not asked: {self.failures} samples in a row failed, the last: {self._last}"


class Budget:
    """The time for all samples that came at once. It is smaller than what the driver waits for an answer."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds, self._clock, self._end = seconds, clock, clock() + seconds

    def left(self) -> float:
        return max(0.0, self._end - self._clock())

    def refusal(self, left: float) -> str:
        """Why nothing may be asked when `left` is left; empty where something is."""
        spent = f"the {self._seconds:g} s for the samples that came with it are over"
        return "" if left else f"not asked: {spent} (raise cluster.call_timeout_s or reward.resources.workers)"


class Patient:
    """Asks `call` about samples, a batch at a time, and answers for every one of them."""

    def __init__(
        self,
        call: Call,
        patience: Patience,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._call, self._patience, self._clock, self._sleep = call, patience, clock, sleep
        self._breaker = Breaker(patience.breaker_failures, patience.breaker_s, clock)
        self._threads = ThreadPoolExecutor(patience.concurrency, "reward")

    def __call__(self, samples: Sequence[Sample]) -> Verdicts:
        size = self._patience.batch_size
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        budget = Budget(self._patience.budget_s, self._clock)
        # One call at a time stays in this thread: a child process that it starts belongs to it.
        run = self._threads.map if self._patience.concurrency > 1 else map
        parts = list(run(partial(self._batch, budget=budget), batches))
        return Verdicts(
            [score for part in parts for score in part.scores],
            [failure for part in parts for failure in part.failures],
            [seconds for part in parts for seconds in part.seconds],
        )

    def _batch(self, samples: Sequence[Sample], budget: Budget) -> Verdicts:
        left = budget.left()
        if refusal := self._breaker.refusal() or budget.refusal(left):
            return Verdicts([0.0] * len(samples), [refusal] * len(samples), [0.0] * len(samples))
        began, failure = self._clock(), ""
        # Half of what is left stays for those that are then asked alone.
        most = left / 2 if len(samples) > 1 else left
        try:
            answers = _checked(self._call(samples, min(self._patience.deadline_s * len(samples), most)), len(samples))
        except CallFailed as error:
            answers, failure = [math.nan] * len(samples), str(error)
        each = (self._clock() - began) / len(samples)
        return _verdicts([self._settled(s, a, failure, each, budget) for s, a in zip(samples, answers, strict=True)])

    def _settled(
        self, sample: Sample, answer: float, failure: str, seconds: float, budget: Budget
    ) -> tuple[float, str, float]:
        """(score, failure, seconds) of one sample, which is asked alone where its batch gave nothing usable; `failure`:
        of the batch."""
        began, failure = self._clock(), failure or _unusable(answer)
        for attempt in range(self._patience.retries + 1):
            if not failure:
                break
            if attempt:
                self._sleep(min(self._patience.backoff_s * 2 ** (attempt - 1), budget.left()))
            if refusal := self._breaker.refusal():
                return 0.0, refusal, seconds + self._clock() - began
            if not (left := budget.left()):
                break
            answer, failure = self._alone(sample, min(self._patience.deadline_s, left))
        self._breaker.tell(failure)
        return (0.0 if failure else answer), failure, seconds + self._clock() - began

    def _alone(self, sample: Sample, deadline_s: float) -> tuple[float, str]:
        try:
            (answer,) = _checked(self._call([sample], deadline_s), 1)
        except CallFailed as error:
            return math.nan, str(error)
        return answer, _unusable(answer)


def _unusable(answer: float) -> str:
    """Why an answer is no score; empty where it is one."""
    return "" if math.isfinite(answer) else f"it gave {answer}"


def _checked(answers: Sequence[Answer], count: int) -> list[float]:
    """As many numbers as were asked for, finite or not; 0 where there was nothing to say."""
    if len(answers) != count:
        raise CallFailed(f"it gave {len(answers)} scores for {count} samples")
    try:
        return [0.0 if answer is None else float(answer) for answer in answers]
    except (TypeError, ValueError, OverflowError) as error:
        raise CallFailed(f"it gave a score that is no number: {error}") from error


def _verdicts(settled: Sequence[tuple[float, str, float]]) -> Verdicts:
    scores, failures, seconds = zip(*settled, strict=True)
    return Verdicts(scores, failures, seconds)
