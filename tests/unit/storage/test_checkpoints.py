"""Checkpoints that are complete or not there, whatever kills the process that writes them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_cluster.storage import durable
from rlhf_cluster.storage.checkpoints import COMMITTED, MANIFEST, Checkpoint, Checkpoints, StorageError

KILLED_AT = """
import builtins, os, pathlib, shutil, signal, sys
from rlhf_cluster.storage.checkpoints import Checkpoints

directory, step, point = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
calls = 0

def counted(call):
    def before(*args, **kwargs):
        global calls
        calls += 1
        if calls == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return before

for module, name in ((os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "rmdir"), (os, "unlink")):
    setattr(module, name, counted(getattr(module, name)))
pathlib.Path.write_text = counted(pathlib.Path.write_text)
with Checkpoints(directory).write(step) as temp:
    (temp / "policy").mkdir()
    (temp / "policy" / "model").write_text("new" * 1000)
    (temp / "run.json").write_text("new")
"""


def write(checkpoints: Checkpoints, step: int, text: str = "weights") -> Path:
    with checkpoints.write(step) as temp:
        (temp / "policy").mkdir()
        (temp / "policy" / "model").write_text(text)
        (temp / "run.json").write_text(text)
    return checkpoints.directory / f"step-{step}"


def write_half(checkpoints: Checkpoints, step: int, error: type[BaseException]) -> None:
    with checkpoints.write(step) as temp:
        (temp / "half").write_text("x")
        raise error


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def test_written_and_found(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None
    for step in (9, 100, 10):
        write(checkpoints, step, f"of step {step}")
    latest = checkpoints.latest()
    assert latest == Checkpoint(100, checkpoints.directory / "step-100")
    assert (latest.path / "policy" / "model").read_text() == "of step 100"
    checkpoints.verify(latest)
    assert names(checkpoints.directory) == {"step-9", "step-10", "step-100"}
    assert names(latest.path) == {"policy", "run.json", MANIFEST, COMMITTED}


def test_a_step_is_replaced_by_its_later_writing(checkpoints: Checkpoints) -> None:
    write(checkpoints, 3, "first")
    path = write(checkpoints, 3, "second")
    assert (path / "run.json").read_text() == "second"
    assert names(checkpoints.directory) == {"step-3"}
    checkpoints.verify(Checkpoint(3, path))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing_and_the_old_one_stays(checkpoints: Checkpoints, error: type[BaseException]) -> None:
    write(checkpoints, 3, "first")
    for step in (3, 4):
        with pytest.raises(error):
            write_half(checkpoints, step, error)
    assert names(checkpoints.directory) == {"step-3"}
    assert checkpoints.latest() == Checkpoint(3, checkpoints.directory / "step-3")


def test_nothing_written_is_not_a_checkpoint(checkpoints: Checkpoints) -> None:
    with pytest.raises(StorageError, match="nothing was written to the checkpoint of step 7"), checkpoints.write(7):
        pass
    assert checkpoints.latest() is None


def test_links_are_refused_for_their_target_may_go(checkpoints: Checkpoints, tmp_path: Path) -> None:
    def link() -> None:
        with checkpoints.write(7) as temp:
            (temp / "run.json").write_text("x")
            (temp / "model").symlink_to(tmp_path)

    with pytest.raises(StorageError, match="symbolic links"):
        link()
    assert names(checkpoints.directory) == set()


@pytest.mark.parametrize("victim", ["policy/model", "run.json", MANIFEST, COMMITTED])
@pytest.mark.parametrize("harm", ["truncate", "remove"])
def test_what_is_truncated_or_missing_is_not_accepted(checkpoints: Checkpoints, victim: str, harm: str) -> None:
    write(checkpoints, 1)
    file = write(checkpoints, 2) / victim
    if harm == "truncate":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    assert checkpoints.latest() == Checkpoint(1, checkpoints.directory / "step-1")
    with pytest.raises(StorageError, match="not a complete checkpoint"):
        checkpoints.verify(Checkpoint(2, checkpoints.directory / "step-2"))


def test_a_file_that_was_not_committed_is_not_accepted(checkpoints: Checkpoints) -> None:
    (write(checkpoints, 2) / "stray").write_text("x")
    assert checkpoints.latest() is None


def test_verify_names_the_file_whose_content_changed(checkpoints: Checkpoints) -> None:
    path = write(checkpoints, 2, "weights")
    (path / "policy" / "model").write_text("WEIGHTS")  # same size: only the digest tells
    latest = checkpoints.latest()
    assert latest is not None
    with pytest.raises(StorageError, match=r"\['policy/model'\] differ"):
        checkpoints.verify(latest)


def test_prune_keeps_the_newest(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 10, 20):
        write(checkpoints, step)
    assert checkpoints.prune(keep=2) == [2, 1]
    assert names(checkpoints.directory) == {"step-10", "step-20"}
    assert checkpoints.prune(keep=5) == []
    with pytest.raises(ValueError, match="keep=0"):
        checkpoints.prune(keep=0)


def test_only_so_many_are_kept_as_others_are_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        write(checkpoints, step)
    assert names(tmp_path) == {"step-2", "step-3"}
    with pytest.raises(RuntimeError):
        write_half(checkpoints, 4, RuntimeError)
    assert names(tmp_path) == {"step-2", "step-3"}


def test_prune_does_not_count_what_is_not_complete(checkpoints: Checkpoints) -> None:
    write(checkpoints, 1)
    (write(checkpoints, 2) / COMMITTED).unlink()
    assert checkpoints.prune(keep=1) == []
    assert checkpoints.latest() == Checkpoint(1, checkpoints.directory / "step-1")


@pytest.mark.parametrize("step", [1, 2], ids=["replacing", "new"])
def test_killed_at_every_point(tmp_path: Path, step: int) -> None:
    """SIGKILL before the n-th call that changes the disk, for every n until the child gets through."""
    survived, contents = False, set()
    for point in range(1, 60):
        checkpoints = Checkpoints(tmp_path / str(point))
        write(checkpoints, 1, "old")
        child = subprocess.run(
            [sys.executable, "-c", KILLED_AT, checkpoints.directory, str(step), str(point)], check=False
        )
        survived = child.returncode == 0
        assert survived or child.returncode == -signal.SIGKILL
        for swept in (False, True):
            latest = checkpoints.latest()
            assert latest is not None, f"killed at {point}, swept: {swept}"
            checkpoints.verify(latest)
            content = (latest.path / "run.json").read_text()
            assert (latest.step, content) in {(1, "old"), (step, "new")}
            durable.sweep(checkpoints.directory)
        contents.add(content)
        assert names(checkpoints.directory) <= {"step-1", "step-2"}
        write(checkpoints, step, "again")
        if survived:
            break
    assert survived
    assert point > 12  # the calls that count were met
    assert contents == {"old", "new"}


def test_a_full_disk_is_one_sentence(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    write(checkpoints, 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"step-2 could not take the checkpoint of step 2, [\d,]+ bytes are free"):
        write(checkpoints, 2)
    assert names(checkpoints.directory) == {"step-1"}
    assert checkpoints.latest() == Checkpoint(1, checkpoints.directory / "step-1")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if os.geteuid() != 0:
        pytest.skip("a small file system can be mounted by root only")
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk / "checkpoints")
    write(checkpoints, 1)
    with pytest.raises(StorageError, match=r"could not take the checkpoint of step 2, 0 bytes are free"):
        write(checkpoints, 2, "x" * (1 << 21))
    assert names(checkpoints.directory) == {"step-1"}
    latest = checkpoints.latest()
    assert latest is not None
    checkpoints.verify(latest)
    write(checkpoints, 2)  # what failed left its room free
