"""A run's directory: where each thing lies, and the claim of the one driver that may write there.

`RunLayout` gives paths and finished stages to whoever reads; it makes nothing. `RunDirectory` is the driver's: it holds
the lock, makes the tree, counts the attempt, and commits stage outputs. Configuration arrives as text, the environment
as a mapping: this module knows neither Hydra nor packages.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

from rlhf_cluster.storage import durable
from rlhf_cluster.storage.durable import StorageError
from rlhf_cluster.storage.run_lock import RunLock

DONE = "DONE"
_STAGE = re.compile(r"[A-Za-z0-9_-]+")


class RunLayout:
    """Paths of a run, whether or not they exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config"
        self.resolved_config = self.config / "resolved.yaml"
        self.overrides = self.config / "overrides.yaml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.timeline = path / "timeline.json"
        self.report = path / "report.html"
        self.logs = path / "logs"
        self.rollouts = path / "rollouts"
        self.checkpoints = path / "checkpoints"
        self.stages = path / "stages"
        self.requests = path / "requests"
        self.lock = path / "driver.lock"

    @property
    def holds_run(self) -> bool:
        """Whether a run began here: its configuration was written."""
        return self.resolved_config.is_file()

    def stage_output(self, name: str) -> Path | None:
        """The output of a finished stage, or None when the stage has not finished."""
        output = durable.standing(self._stage(name))
        return output if output is not None and (output / DONE).is_file() else None

    def unique_name(self, name: str) -> str:
        """`name` with a digest of the path: two runs of one name on a machine share nothing that is named so."""
        return f"{name}-{xxhash.xxh3_64_hexdigest(str(self.path.resolve()).encode())[:8]}"

    def attempts(self) -> list[int]:
        """Numbers of the attempts so far, ascending."""
        names = (path.name for path in self.logs.glob("attempt-*")) if self.logs.is_dir() else ()
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"attempt-(\d+)", name)))

    def _stage(self, name: str) -> Path:
        if not _STAGE.fullmatch(name):
            raise ValueError(f"stage name {name!r}; it must be made of letters, digits, - and _")
        return self.stages / name


class RunDirectory(RunLayout):
    """A run's directory, claimed by this process from construction to `close` (or the end of a `with` block).

    Raises StorageError when another driver holds it, naming its process, when it holds files that are of no run, or
    when it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._make(path)
        lock = self.lock
        if not self.holds_run:
            _refuse_what_is_of_others(path, lock)
        self._lock = RunLock(lock)
        self.attempt = 0  # none begun
        try:
            self._make(self.config, self.rollouts, self.checkpoints, self.stages)
            self.sweep()
        except BaseException:
            self._lock.release()
            raise

    def begin_attempt(self) -> None:
        """Counts this attempt: 1 for the first, each start or resume is one more. Its logs have a directory. The
        report of an attempt before goes: it is the last that a run writes, and says that it is finished."""
        self.attempt = max(self.attempts(), default=0) + 1
        self.attempt_logs = self.logs / f"attempt-{self.attempt}"
        self._make(self.attempt_logs)
        self.report.unlink(missing_ok=True)
        for left in (self.requests, *self.logs.glob("attempt-*/state")):  # by a driver that is gone
            shutil.rmtree(left, ignore_errors=True)

    def write_config(self, resolved: str, overrides: Sequence[str]) -> None:
        """Keeps the resolved configuration (YAML text) and the overrides that led to it (`key=value` each)."""
        durable.replace_text(self.resolved_config, resolved, "the resolved configuration")
        # JSON strings are YAML strings, so that a list of them needs no YAML library.
        listed = "".join(f"- {json.dumps(override)}\n" for override in overrides) or "[]\n"
        durable.replace_text(self.overrides, listed, "the overrides")

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Keeps what the run ran on: versions, cores, memory, commit; any JSON values."""
        durable.replace_text(self.environment, json.dumps(environment, indent=1) + "\n", "the environment")

    def sweep(self) -> None:
        """Removes what is half-written: of dead attempts, and, once its workers are gone, of this one. A worker that is
        interrupted goes on writing after its driver has cleaned up."""
        for directory in (self.path, self.config, self.stages, self.checkpoints, self.rollouts):
            durable.sweep(directory)

    @contextmanager
    def commit_stage(self, name: str) -> Iterator[Path]:
        """Gives an empty directory for the output of stage `name`; on a clean exit it is that output, marked DONE.

        After any error nothing of it is left, and an earlier output stays. Raises StorageError when the disk is full.
        """
        final = self._stage(name)
        with durable.fresh_directory(final, f"the output of stage {name}") as temp:
            yield temp
            if not any(path.is_file() for path in temp.rglob("*")):
                raise StorageError(
                    f"nothing of stage {name} arrived at {temp}; "
                    "the run's directory (dir) must be on storage that all nodes share"
                )
            for path in temp.rglob("*"):
                if path.is_file():
                    durable.fsync_path(path)
            done = {"stage": name, "attempt": self.attempt}
            durable.write_synced(temp / DONE, json.dumps(done) + "\n")
            durable.fsync_directories(temp)
            durable.replace_directory(temp, final)

    def close(self) -> None:
        """Gives the directory free for another driver; may be repeated."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _make(*directories: Path) -> None:
        for directory in directories:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(
                    f"{directory} cannot be made ({error.strerror}); choose another run directory"
                ) from error


def _refuse_what_is_of_others(path: Path, lock: Path) -> None:
    """A run that has not begun has its lock at least."""
    found = sorted(one.name for one in path.iterdir())
    if found and not lock.is_file():
        shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise StorageError(f"{path} holds files that are of no run ({shown}); name a new directory, or an empty one")
