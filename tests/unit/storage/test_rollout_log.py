"""The rollout log: what was written is read back as it was, whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_cluster.records import ReferencedRollouts
from rlhf_cluster.storage.durable import StorageError
from rlhf_cluster.storage.rollout_log import RolloutLog


def rollouts(step: int) -> ReferencedRollouts:
    return ReferencedRollouts.of(
        {
            "prompt_id": ["a", "b"],
            "prompt_ids": [[1, 2], [3]],
            "step": [step, step],
            "sample_index": [0, 0],
            "sample_id": [f"{step}/a/0", f"{step}/b/0"],
            "seed": [7, 8],
            "response_ids": [[4, 5, 6], []],
            "rollout_logprobs": [[-0.5, -0.25, -1.0], []],
            "weight_versions": [[0, 0, 1], []],
            "finish_reason": ["stop", "length"],
            "temperature": [1.0, 1.0],
            "incarnation": ["w0", "w1"],
            "score": [0.5, -0.5],
            "failure": ["", ""],
            "ref_logprobs": [[-0.5, -0.5, -0.5], []],
            "answer": ["yes", "no"],
        }
    )


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_read_back_as_the_same_record(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "lr=3" / "rollouts")  # a path that Parquet readers like to take for a column
    written = rollouts(3).table
    assert log.write(3, written) == tmp_path / "lr=3" / "rollouts" / "step-3.parquet"
    read = log.read(3)
    assert read.equals(written)
    assert read.schema == written.schema
    assert ReferencedRollouts(read).rollout_logprobs[0].tolist() == [-0.5, -0.25, -1.0]
    assert names(log.directory) == {"step-3.parquet"}


def test_a_step_done_again_replaces_its_file(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    log.write(1, pa.table({"x": [1]}))
    log.write(1, pa.table({"x": [2, 3]}))
    assert log.read(1).column("x").to_pylist() == [2, 3]


def test_cut_removes_what_lies_past_the_commit(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    for step in (1, 2, 9, 10):
        log.write(step, pa.table({"x": [step]}))
    (tmp_path / "step-3.parquet.tmp-99").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert log.cut(after_step=2) == [9, 10]
    assert log.steps() == [1, 2]
    assert names(tmp_path) == {"step-1.parquet", "step-2.parquet", "notes.txt"}
    assert RolloutLog(tmp_path / "absent").cut(0) == []


def test_a_missing_step_says_what_there_is(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    with pytest.raises(StorageError, match="the log holds no step"):
        log.read(5)
    log.write(1, pa.table({"x": [1]}))
    log.write(4, pa.table({"x": [1]}))
    with pytest.raises(StorageError, match=r"step-5\.parquet does not exist; the log holds steps 1 to 4 \(2 files\)"):
        log.read(5)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = RolloutLog(tmp_path).write(1, pa.table({"x": [1]}))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(StorageError, match=r"step-1\.parquet is not a whole Parquet file"):
        RolloutLog(tmp_path).read(1)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RolloutLog(tmp_path)
    log.write(1, pa.table({"x": [1]}))

    def full(table: pa.Table, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq, "write_table", full)
    for step in (1, 2):
        with pytest.raises(StorageError, match=f"could not take the rollouts of step {step}"):
            log.write(step, pa.table({"x": [2]}))
    assert names(tmp_path) == {"step-1.parquet"}
    assert log.read(1).column("x").to_pylist() == [1]
