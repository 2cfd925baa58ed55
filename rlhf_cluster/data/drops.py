"""The account of what was dropped: how many rows for which reason, and the first of them in full."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_cluster.data.rows import DataError

EXAMPLES = 3


@dataclass
class Dropped:
    """Rows dropped for one reason; `examples` are the first errors, each of which names file and row."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


class Drops:
    """Counts by reason, in the order in which the reasons came up."""

    def __init__(self) -> None:
        self.by_reason: dict[str, Dropped] = {}

    def add(self, error: DataError) -> None:
        entry = self.by_reason.setdefault(error.reason, Dropped())
        entry.count += 1
        if len(entry.examples) < EXAMPLES:
            entry.examples.append(str(error))

    def add_count(self, reason: str, count: int) -> None:
        """For rows that are fine and still not used (a duplicate, one set aside): there is no error to show."""
        if count:
            self.by_reason.setdefault(reason, Dropped()).count += count

    def counts(self) -> dict[str, int]:
        return {reason: entry.count for reason, entry in self.by_reason.items()}

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.counts().items()) or "nothing dropped"
