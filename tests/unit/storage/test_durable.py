"""Files and directories that appear whole or not at all, and what a full disk is called."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rlhf_cluster.storage import durable
from rlhf_cluster.storage.durable import StorageError


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    durable.replace_text(path, "one", "a text")
    durable.replace_text(path, "two", "a text")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_text_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.txt"
    durable.replace_text(path, "one", "a text")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match=r"a\.txt could not take a text, [\d,]+ bytes are free") as caught:
        durable.replace_text(path, "two", "a text")
    assert "\n" not in str(caught.value)
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), durable.full_disk_explained(tmp_path, "a text"):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(KeyboardInterrupt), durable.full_disk_explained(tmp_path, "a text"):
        raise KeyboardInterrupt


def test_an_error_without_a_reason_on_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "free_bytes", lambda _: 4096)
    said = "could not take a text, 4,096 bytes are free"
    with pytest.raises(StorageError, match=said), durable.full_disk_explained(tmp_path, "a text"):
        raise RuntimeError("unexpected pos 576 vs 534")


def test_what_was_explained_is_not_explained_again(tmp_path: Path) -> None:
    outer, inner = (durable.full_disk_explained(tmp_path, what) for what in ("the outer", "the inner"))
    with pytest.raises(StorageError, match="could not take the inner"), outer, inner:
        full()


def test_what_counts_as_a_full_disk() -> None:
    assert durable.is_full_disk(OSError(errno.ENOSPC, "x"))
    assert durable.is_full_disk(OSError(errno.EDQUOT, "x"))
    assert durable.is_full_disk(RuntimeError("I/O error: No space left on device (os error 28)"))
    remote = RuntimeError("the learner failed")
    remote.__cause__ = OSError(errno.ENOSPC, "x")
    assert durable.is_full_disk(remote)
    assert not durable.is_full_disk(OSError(errno.EIO, "Input/output error"))
    assert not durable.is_full_disk(ValueError("space"))


def test_replaced_directory(tmp_path: Path) -> None:
    final = tmp_path / "d"
    for text in ("one", "two"):
        with durable.fresh_directory(final, "a directory") as temp:
            (temp / "f").write_text(text)
            durable.replace_directory(temp, final)
    assert (final / "f").read_text() == "two"
    assert list(tmp_path.iterdir()) == [final]


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, rename = tmp_path / "d", os.replace
    final.mkdir()
    (final / "f").write_text("one")

    def second_fails(source: Path, target: Path) -> None:
        if durable.TEMPORARY in str(source):
            full()
        rename(source, target)

    def replace() -> None:
        with durable.fresh_directory(final, "a directory") as temp:
            (temp / "f").write_text("two")
            durable.replace_directory(temp, final)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(StorageError, match="the disk is full"):
        replace()
    assert (final / "f").read_text() == "one"
    assert list(tmp_path.iterdir()) == [final]


def test_sweep_removes_leftovers_restores_what_was_set_aside_and_touches_nothing_else(tmp_path: Path) -> None:
    for name in ("kept", "a.tmp-1", "b.old-2", "c", "c.old-3", "notes.old-version"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    (tmp_path / "file.tmp-5").write_text("")
    removed = durable.sweep(tmp_path)
    assert {path.name for path in removed} == {"a.tmp-1", "c.old-3", "file.tmp-5"}
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "b", "c", "notes.old-version"}
    assert (tmp_path / "b" / "f").read_text() == "b.old-2"
    assert durable.sweep(tmp_path / "absent") == []
