"""Which rows of a batch are trained on. Each row reaches exactly one state; what is trained leaves as soon as that is
known.

Takes scored rows as they arrive, gives those to train on, and in the end the ids of members whose place is free. It
knows neither rooms nor configuration.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rlhf_cluster.records import QUARANTINED, Members, ScoredRollouts

TRAINED, FILTERED, DROPPED = "trained", "filtered", "dropped"  # beside QUARANTINED


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one iteration: those that were trained on, and by state those that were not."""

    rows: ScoredRollouts
    others: Mapping[str, ScoredRollouts]

    def table(self) -> pa.Table:
        """All rows with their `state`, for the record."""
        parts = {TRAINED: self.rows, **self.others}
        tables = [rows.table.append_column("state", pa.array([state] * len(rows))) for state, rows in parts.items()]
        return pa.concat_tables(tables, promote_options="default")


class Admission:
    """`whole_groups`: the responses to a prompt pass together or not at all, for they are compared with each other.
    `telling`: a group of equal scores is filtered, since it says nothing (dynamic sampling: Yu et al. 2025,
    arXiv:2503.14476, eq. 11)."""

    def __init__(self, whole_groups: bool, telling: bool) -> None:
        self._key = "prompt_id" if whole_groups else "sample_id"
        self._telling = telling
        self._expected: Counter[str] = Counter()
        self._waiting: dict[str, list[ScoredRollouts]] = defaultdict(list)
        self._settled: dict[str, list[ScoredRollouts]] = defaultdict(list)
        self._gone: list[str] = []

    def expect(self, members: Members) -> None:
        """Members that are about to be sampled; a group's all at once."""
        self._expected.update(getattr(members, self._key))

    def take(self, scored: ScoredRollouts) -> ScoredRollouts:
        """The rows that pass now, which may be none, or more than came."""
        arrived: dict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(getattr(scored, self._key)):
            arrived[name].append(index)
        whole: dict[str, list[int]] = defaultdict(list)  # by state: rows of groups that came in one piece
        parts = []
        for name, indices in arrived.items():
            if len(indices) == self._expected[name]:
                whole[self._judge([scored.failure[i] for i in indices], scored.score[indices])] += indices
            else:
                self._waiting[name].append(scored.take(indices))
                if sum(map(len, self._waiting[name])) < self._expected[name]:
                    continue
                rows = ScoredRollouts.concat(self._waiting.pop(name))
                parts.append((self._judge(rows.failure, rows.score), rows))
            del self._expected[name]
        # One table for each state, not one for each row: hundreds of those take tens of milliseconds.
        parts += [(state, scored.take(indices)) for state, indices in whole.items()]
        for state, rows in parts:
            self._settled[state].append(rows)
            self._gone += [] if state == TRAINED else rows.sample_id
        passed = [rows for state, rows in parts if state == TRAINED]
        return ScoredRollouts.concat(passed) if passed else scored.slice(0, 0)

    def gone(self) -> list[str]:
        """Members that will not be trained on and whose place is free, sorted; each is named once."""
        gone, self._gone = sorted(self._gone), []
        return gone

    def any(self) -> bool:
        """Whether there are rows to train on, filtered ones among them where no other passed."""
        return any(self._settled[TRAINED]) or any(self._settled[FILTERED])

    def restore_filtered(self, gone: Sequence[str]) -> ScoredRollouts:
        """Where nothing passed: of `gone`, the filtered rows after all. They teach nothing but say how the policy
        does."""
        if self._settled[TRAINED]:
            return ScoredRollouts.empty()
        filtered, wanted = ScoredRollouts.concat(self._settled[FILTERED]), set(gone)
        back = np.array([sample_id in wanted for sample_id in filtered.sample_id], bool)
        restored = filtered.take(np.flatnonzero(back))
        self._settled[TRAINED], self._settled[FILTERED] = [restored], [filtered.take(np.flatnonzero(~back))]
        return restored

    def batch(self) -> Batch:
        rows = {state: ScoredRollouts.concat(parts) for state, parts in self._settled.items() if parts}
        return Batch(rows.pop(TRAINED, ScoredRollouts.empty()), rows)

    def _judge(self, failures: Sequence[str], scores: np.ndarray) -> str:
        if any(failure.startswith(QUARANTINED) for failure in failures):
            return QUARANTINED
        if any(failures):
            return DROPPED
        return FILTERED if self._telling and np.ptp(scores) < 1e-8 else TRAINED
