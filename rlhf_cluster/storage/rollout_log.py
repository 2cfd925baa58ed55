"""The rollout log: every batch that was trained on, one Parquet file per step, as it travelled.

Takes and gives Arrow tables; it knows nothing of their columns. What lies past the last checkpoint is cut off when a
run resumes, for those steps will be done again.
"""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_cluster.storage import durable
from rlhf_cluster.storage.durable import StorageError

_FILE = re.compile(r"step-(\d+)\.parquet")


class RolloutLog:
    """The log in one directory (`<run_dir>/rollouts`), which need not exist yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, step: int, table: pa.Table) -> Path:
        """Writes or replaces the rollouts of `step`, whole or not at all. Raises StorageError when the disk is full."""
        self.directory.mkdir(parents=True, exist_ok=True)
        final = self._path(step)
        with durable.replaced_file(final, f"the rollouts of step {step}") as temp:
            pq.write_table(table, temp, compression="zstd")
        return final

    def read(self, step: int, prefixes: tuple[str, ...] = ("",)) -> pa.Table:
        """The rollouts of `step`, columns typed as written; of them those that begin with one of `prefixes`. Raises
        StorageError when there are none, or not whole."""
        path = self._path(step)
        if not path.exists():
            steps = self.steps()
            held = f"steps {steps[0]} to {steps[-1]} ({len(steps)} files)" if steps else "no step"
            raise StorageError(f"{path} does not exist; the log holds {held}")
        try:
            wanted = [name for name in pq.read_schema(path).names if name.startswith(prefixes)]
            return pq.read_table(path, columns=wanted)
        except (pa.ArrowInvalid, OSError) as error:
            raise StorageError(f"{path} is not a whole Parquet file ({error}); remove it") from error

    def cut(self, after_step: int) -> list[int]:
        """Removes the files of later steps and what dead attempts left; returns the steps removed."""
        durable.sweep(self.directory)
        removed = [step for step in self.steps() if step > after_step]
        for step in removed:
            self._path(step).unlink()
        return removed

    def steps(self) -> list[int]:
        """Steps that the log holds, ascending."""
        names = (path.name for path in self.directory.iterdir()) if self.directory.is_dir() else ()
        return sorted(int(match[1]) for name in names if (match := _FILE.fullmatch(name)))

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step}.parquet"
