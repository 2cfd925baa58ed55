"""Files and directories that appear whole or not at all, and the one sentence for a disk that is full.

Everything is written under a temporary name (`<name>.tmp-<pid>`) beside its final one, brought to disk, and renamed. A
directory that stood there before is set aside (`<name>.old-<pid>`) until the new one has its name. What a killed
process left is told by these suffixes. This module knows nothing of checkpoints, rollouts or stages.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp-"
ASIDE = ".old-"
_LEFTOVER = re.compile(rf"(.+)({re.escape(TEMPORARY)}|{re.escape(ASIDE)})\d+")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ROOM = 1 << 16  # bytes: what a file system may keep to itself while it refuses to take more


class StorageError(RuntimeError):
    """What is on disk, or the disk itself, is not what it must be; its message is the sentence that the user reads."""


def temporary(final: Path) -> Path:
    """The name under which this process writes what will be `final`."""
    return final.with_name(f"{final.name}{TEMPORARY}{os.getpid()}")


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path`, or would hold it once made."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def full_disk_explained(path: Path, what: str) -> Iterator[None]:
    """Turns a full disk, or an exhausted quota, into a StorageError that says where, what, and how much is free."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        # Some libraries do not say why they failed (torch.save: "unexpected pos"); no room left is reason enough.
        if not is_full_disk(error) and free_bytes(path) >= _NO_ROOM:
            raise
        raise StorageError(
            f"the disk is full: {path} could not take {what}, {free_bytes(path):,} bytes are free; "
            "make room and run again"
        ) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether `error` or one that it came from says that the disk is full.

    Libraries that write from native code, and workers that answer from afar, keep the system's words but no errno.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(os.strerror(code) in str(seen) for code in _FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def fsync_path(path: Path) -> None:
    """Brings a file's content, or a directory's names, to disk, whichever process wrote them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directories(root: Path) -> None:
    """Brings the names in `root` and below it to disk, the deepest first."""
    for directory, _, _ in os.walk(root, topdown=False):
        fsync_path(Path(directory))


def write_synced(path: Path, text: str) -> None:
    """Writes a file, not atomically, and brings it to disk."""
    path.write_text(text, encoding="utf-8")
    fsync_path(path)


def replace_text(path: Path, text: str, what: str) -> None:
    """Writes or replaces the file `path` atomically. On a full disk raises StorageError, and the old content stays."""
    with replaced_file(path, what) as temp:
        temp.write_text(text, encoding="utf-8")


@contextmanager
def replaced_file(final: Path, what: str) -> Iterator[Path]:
    """Gives a temporary path to write a file to; makes it `final` on a clean exit, removes it on any other."""
    temp = temporary(final)
    try:
        with full_disk_explained(final, what):
            yield temp
            fsync_path(temp)
            temp.replace(final)
            fsync_path(final.parent)
    finally:
        remove(temp)


@contextmanager
def fresh_directory(final: Path, what: str) -> Iterator[Path]:
    """Gives an empty temporary directory to fill; the caller renames it (`replace_directory`). Gone after any error."""
    temp = temporary(final)
    remove(temp)
    try:
        with full_disk_explained(final, what):
            temp.mkdir(parents=True)
            yield temp
    except BaseException:
        remove(temp)
        raise


def replace_directory(temp: Path, final: Path) -> None:
    """Gives `temp`, already on disk, the name `final`. `standing(final)` is the old one or the new one always."""
    aside = final.with_name(f"{final.name}{ASIDE}{os.getpid()}")
    replaced = final.exists()
    if replaced:
        remove(aside)
        # A directory that is not empty cannot be renamed over; exchanging two names is not portable to network disks.
        final.replace(aside)
        fsync_path(final.parent)
    try:
        temp.replace(final)
    except OSError:
        if replaced:
            aside.replace(final)
        raise
    fsync_path(final.parent)
    remove(aside)


def standing(final: Path) -> Path | None:
    """The directory `final`, or the one that a killed process had set aside for it, or None."""
    if final.is_dir():
        return final
    aside = sorted(final.parent.glob(f"{final.name}{ASIDE}*")) if final.parent.is_dir() else []
    return aside[0] if aside else None


def sweep(directory: Path) -> list[Path]:
    """Removes what dead processes left in `directory` and returns it; set-aside directories get their name back.

    Process ids come round again (in a container at once), so that only the run's lock tells who is dead: call it with
    the lock held, and while nothing is being written.
    """
    if not directory.is_dir():
        return []
    removed = []
    for path in sorted(directory.iterdir()):
        name, suffix = final_name(path)
        if not suffix:
            continue
        final = path.with_name(name)
        if suffix == ASIDE and not final.exists():
            path.replace(final)
        else:
            remove(path)
            removed.append(path)
    fsync_path(directory)
    return removed


def final_name(path: Path) -> tuple[str, str]:
    """The name that `path` has or is meant to have, and its suffix: TEMPORARY, ASIDE or ''."""
    match = _LEFTOVER.fullmatch(path.name)
    return (match[1], match[2]) if match else (path.name, "")


def remove(path: Path) -> None:
    """Removes a file or a whole directory; no error when it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
