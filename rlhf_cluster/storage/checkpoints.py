"""Atomic checkpoints of a run: `step-<n>` directories that are complete or not there.

Takes a directory that the caller fills; gives it a manifest, a COMMITTED marker and its name, in this order, each on
disk before the next. It knows nothing of models or of what the files mean.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from rlhf_cluster.storage import durable
from rlhf_cluster.storage.durable import StorageError

__all__ = ["COMMITTED", "MANIFEST", "Checkpoint", "Checkpoints", "StorageError"]

MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"  # holds the manifest's digest, so that a damaged manifest is told
_BLOCK = 1 << 22  # bytes read at once for a digest
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: committed, and with every file of the manifest at its size."""

    step: int
    path: Path


class Checkpoints:
    """The checkpoints in one directory, which need not exist yet. One process writes (the run's lock sees to that).

    Of the complete ones the `keep` newest stay when another is written; 0: all.
    """

    def __init__(self, directory: Path, keep: int = 0) -> None:
        self.directory = directory
        self._keep = keep

    @contextmanager
    def write(self, step: int) -> Iterator[Path]:
        """Gives an empty directory to fill; on a clean exit it is the checkpoint of `step`, in place of any before it.

        After any error nothing of it is left. Raises StorageError when the disk is full, or when nothing was written.
        """
        final = self.directory / f"step-{step}"
        with durable.fresh_directory(final, f"the checkpoint of step {step}") as temp:
            yield temp
            _seal(temp, step)
            durable.replace_directory(temp, final)
        if self._keep:
            self.prune(self._keep)

    def latest(self, below: float = math.inf) -> Checkpoint | None:
        """The complete checkpoint of the highest step below `below`, or None. Sizes are compared, contents are not
        (`verify`)."""
        return next((checkpoint for checkpoint in self._complete() if checkpoint.step < below), None)

    def forget_after(self, step: int) -> None:
        """Removes the complete checkpoints of later steps: they are of a policy that was left."""
        for checkpoint in [one for one in self._complete() if one.step > step]:
            self._remove(checkpoint)

    def verify(self, checkpoint: Checkpoint) -> None:
        """Reads every file. Raises StorageError naming those whose content is not what was committed."""
        files = _manifest(checkpoint.path)
        if files is None:
            raise StorageError(f"{checkpoint.path} is not a complete checkpoint; use an earlier one")
        damaged = [f["path"] for f in files if _digest(checkpoint.path / f["path"]) != f["xxh3_64"]]
        if damaged:
            raise StorageError(
                f"{checkpoint.path} is damaged: {damaged} differ from {MANIFEST}; remove it to use the one before"
            )

    def prune(self, keep: int) -> list[int]:
        """Removes all complete checkpoints but the `keep` newest; returns the steps removed."""
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints; it must be at least 1")
        removed = []
        for checkpoint in list(self._complete())[keep:]:
            self._remove(checkpoint)
            removed.append(checkpoint.step)
        return removed

    def _remove(self, checkpoint: Checkpoint) -> None:
        # Renamed first: a removal that is cut short leaves a leftover, never half a checkpoint under its name.
        gone = durable.temporary(self.directory / f"step-{checkpoint.step}")
        durable.remove(gone)
        checkpoint.path.replace(gone)
        durable.remove(gone)

    def _complete(self) -> Iterator[Checkpoint]:
        """Complete checkpoints, newest first."""
        names = {durable.final_name(path)[0] for path in self.directory.iterdir()} if self.directory.is_dir() else set()
        steps = {int(match[1]): name for name in names if (match := _STEP.fullmatch(name))}
        for step in sorted(steps, reverse=True):
            path = durable.standing(self.directory / steps[step])
            if path is not None and _manifest(path) is not None:
                yield Checkpoint(step, path)


def _seal(directory: Path, step: int) -> None:
    """Brings all files to disk, then the manifest, then the marker."""
    names = _files(directory)
    if not names:
        raise StorageError(f"nothing was written to the checkpoint of step {step} in {directory}; it is not kept")
    links = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_symlink()]
    if links:
        raise StorageError(f"the checkpoint of step {step} would hold symbolic links {links}; write copies instead")
    files = [_entry(directory, name) for name in names]
    durable.write_synced(directory / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
    durable.fsync_directories(directory)
    durable.write_synced(directory / COMMITTED, _digest(directory / MANIFEST))
    durable.fsync_path(directory)


def _entry(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    durable.fsync_path(path)
    return {"path": name, "bytes": path.stat().st_size, "xxh3_64": _digest(path)}


def _manifest(directory: Path) -> list[dict[str, Any]] | None:
    """The files of a complete checkpoint, or None: no marker, a damaged manifest, names or sizes that disagree."""
    try:
        if (directory / COMMITTED).read_text(encoding="utf-8") != _digest(directory / MANIFEST):
            return None
        files: list[dict[str, Any]] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    found = {name: (directory / name).stat().st_size for name in _files(directory)}
    return files if found == {f["path"]: f["bytes"] for f in files} else None


def _files(directory: Path) -> list[str]:
    """Files below `directory`, relative, but for manifest and marker."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name not in (MANIFEST, COMMITTED))


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
