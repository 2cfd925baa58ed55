"""Limits that a run is kept within, and what is done where one is passed: warn, skip the update, roll back, or stop.

Looks at each batch before its update (KL, entropy, lengths, scores) and at what the update says of itself after (clip
fraction, gradient norms); gives alarms, and leaves it to the loop to act. A minibatch beyond one of the latter is kept
from the weights by the learner, inside the optimizer's step. It knows neither rooms nor configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlhf_cluster.algo.rewards import ScoreMoments
from rlhf_cluster.records import ReferencedRollouts, ScoredRollouts

ACTIONS = ("warn", "skip", "rollback", "stop")  # the later one wins where several are due


@dataclass(frozen=True)
class Rail:
    """A limit (0: not watched) and what is done beyond it."""

    limit: float = 0.0
    action: str = "warn"


@dataclass(frozen=True)
class Alarm:
    """A rail that was passed."""

    name: str
    action: str
    sentence: str
    value: float


def gravest(alarms: Sequence[Alarm]) -> str:
    """The action that is due; empty without an alarm."""
    return max((alarm.action for alarm in alarms), key=ACTIONS.index, default="")


class Guardrails:
    """One rail for each of `kl`, `entropy`, `length`, `score`, `clipfrac` and `grad_norm`; `not_finite`: what is done
    where a gradient was NaN or infinite, which no limit says.

    `max_skips`: updates in a row that moved no weight, with which it is time to stop: what led to the first is likely
    to lead to the next.
    """

    def __init__(self, rails: Mapping[str, Rail], not_finite: str = "stop", max_skips: float = math.inf) -> None:
        self._rails, self._not_finite, self._max_skips = rails, not_finite, max_skips
        self._skips = 0.0  # in a row
        self._same: dict[int, int] = {}  # versions that got the weights of an earlier one, and which
        self._first_length = 0.0  # mean response length of the first batch, which drift is measured from
        self._scores = ScoreMoments()  # of all batches before

    def before(self, batch: ScoredRollouts) -> list[Alarm]:
        """Of a batch that is about to be trained on. KL in nats per response, entropy in nats per token, both estimated
        from the sampled tokens; the length as a factor of the first batch's, and the mean score in standard deviations
        from those so far, either way."""
        tokens = np.concatenate(batch.rollout_logprobs)
        length = float(len(tokens)) / len(batch)
        self._first_length = self._first_length or length
        drift = max(length / self._first_length, self._first_length / length)
        lengths = f"{length:.1f} tokens, at first {self._first_length:.1f}"
        found = [
            self._above("length", drift, f"times off the first length: {lengths}"),
            self._below("entropy", -float(tokens.mean(dtype=np.float64)), "nats per token of the policy's entropy"),
            self._score(batch.score),
        ]
        if isinstance(batch, ReferencedRollouts):
            apart = tokens - np.concatenate(batch.ref_logprobs)
            kl = float(apart.sum(dtype=np.float64)) / len(batch)
            found.append(self._above("kl", kl, "nats per response from the reference"))
        return [alarm for alarm in found if alarm is not None]

    def _score(self, scores: np.ndarray) -> Alarm | None:
        seen, mean, alarm = self._scores, float(scores.mean(dtype=np.float64)), None
        if seen.count:
            told = f"standard deviations is the mean score of {mean:.4g} from that of all before, {seen.mean:.4g}"
            alarm = self._above("score", abs(mean - seen.mean) / seen.std, told)
        seen.tell(scores)
        return alarm

    def after(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """Of an update that was made or skipped: the learner's own metrics. Without a critic it has no norm; and while
        the critic warms up alone, or where all was skipped, the policy has no clip fraction."""
        not_finite = max(of_models(metrics, "not_finite"), default=0.0)
        norm = math.inf if not_finite else max(of_models(metrics, "grad_norm_max"), default=0.0)
        found = [
            self._above("clipfrac", metrics.get("actor/pg_clipfrac_max", 0.0), "of a minibatch's tokens were clipped"),
            self._above("grad_norm", norm, "is the largest gradient norm of a step"),
        ]
        alarms = [alarm for alarm in found if alarm is not None]
        if not_finite:
            words = (
                f"the gradients of {not_finite:.0%} of the optimizer's steps were NaN or infinite, and moved nothing; "
                "look at the batch's scores and rewards, or lower the learning rate"
            )
            alarms.append(Alarm("not_finite", self._not_finite, words, not_finite))
        self._skips = self._skips + 1 if moved_nothing(metrics) else 0.0
        if self._skips >= self._max_skips:
            words = (
                f"{self._skips:.0f} updates in a row moved no weight, for samples or gradients beyond a guardrail, or "
                "gradients that are not finite; the metrics of these iterations say which"
            )
            alarms.append(Alarm("max_skips", "stop", words, self._skips))
        return alarms

    def note_same(self, version: int, earlier: int) -> None:
        """`version` has the weights of `earlier`: nothing moved, or a checkpoint came back."""
        self._same[version] = self.first_of(earlier)

    def first_of(self, version: int) -> int:
        """The first version with the weights of `version`: what is older is of another policy."""
        return self._same.get(version, version)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs."""
        same = {str(version): first for version, first in self._same.items()}
        scores = asdict(self._scores)
        return {"first_length": self._first_length, "skips": self._skips, "same": same, "scores": scores}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._first_length, self._skips = state.get("first_length", 0.0), state.get("skips", 0.0)
        self._same = {int(version): first for version, first in state.get("same", {}).items()}
        self._scores = ScoreMoments(**state.get("scores", {}))

    def _above(self, name: str, value: float, words: str) -> Alarm | None:
        rail = self._rails.get(name, Rail())
        passed = rail.limit > 0 and not value <= rail.limit  # a NaN has passed every limit
        said = f"{_number(value)} {words}; the limit is {rail.limit:g}"
        return Alarm(name, rail.action, said, value) if passed else None

    def _below(self, name: str, value: float, words: str) -> Alarm | None:
        rail = self._rails.get(name, Rail())
        passed = rail.limit > 0 and not value >= rail.limit
        said = f"{_number(value)} {words}; the least is {rail.limit:g}"
        return Alarm(name, rail.action, said, value) if passed else None


def moved_nothing(metrics: Mapping[str, float]) -> bool:
    """Whether an update did no minibatch, or took no step in any: of the policy, or of the critic while that warms up
    alone."""
    skipped = of_models(metrics, "steps_skipped")
    return metrics.get("actor/minibatches_done") == 0 or skipped[:1] == [1]


def of_models(metrics: Mapping[str, float], name: str) -> list[float]:
    """A metric of the policy and of the critic, as far as they took part."""
    return [metrics[key] for key in (f"actor/{name}", f"critic/{name}") if key in metrics]


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
