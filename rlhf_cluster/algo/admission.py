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

from rlhf_cluster.records import Members, ScoredRollouts

TRAINED, FILTERED, DROPPED = "trained", "filtered", "dropped"


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
        self._settled: dict[str, list[ScoredRollouts]] = {TRAINED: [], FILTERED: [], DROPPED: []}
        self._gone: list[str] = []

    def expect(self, members: Members) -> None:
        """Members that are about to be sampled; a group's all at once."""
        self._expected.update(getattr(members, self._key))

    def take(self, scored: ScoredRollouts) -> ScoredRollouts:
        """The rows that pass now, which may be none, or more than came."""
        passed = []
        for index, name in enumerate(getattr(scored, self._key)):
            group = self._waiting[name]
            group.append(scored.take([index]))
            if len(group) == self._expected[name]:
                rows = ScoredRollouts.concat(group)
                state = self._judge(rows)
                self._settled[state].append(rows)
                if state == TRAINED:
                    passed.append(rows)
                else:
                    self._gone += rows.sample_id
                del self._waiting[name], self._expected[name]
        return ScoredRollouts.concat(passed) if passed else scored.slice(0, 0)

    def gone(self) -> list[str]:
        """Members that will not be trained on and whose place is free, sorted; each is named once."""
        gone, self._gone = sorted(self._gone), []
        return gone

    def restore_filtered(self, gone: Sequence[str]) -> ScoredRollouts:
        """Where nothing passed: of `gone`, the filtered rows after all. They teach nothing but say how the policy
        does."""
        if self._settled[TRAINED]:
            return ScoredRollouts.empty()
        restored = [rows for rows in self._settled[FILTERED] if rows.sample_id[0] in gone]
        self._settled[TRAINED] = restored
        self._settled[FILTERED] = [rows for rows in self._settled[FILTERED] if rows.sample_id[0] not in gone]
        return ScoredRollouts.concat(restored)

    def batch(self) -> Batch:
        rows = {state: ScoredRollouts.concat(parts) for state, parts in self._settled.items() if parts}
        return Batch(rows.pop(TRAINED, ScoredRollouts.empty()), rows)

    def _judge(self, rows: ScoredRollouts) -> str:
        if any(rows.failure):
            return DROPPED
        return FILTERED if self._telling and np.ptp(rows.score) < 1e-8 else TRAINED
