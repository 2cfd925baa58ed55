"""The versioned store: what it keeps, what it serves to other nodes, what it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cluster.weights import snapshot as module
from rlhf_cluster.weights import store as store_module
from rlhf_cluster.weights.snapshot import Snapshot, SnapshotError, check, store_directory, write_snapshot
from rlhf_cluster.weights.store import WeightStore


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for user in (module, store_module):
        monkeypatch.setattr(user, "SHARED_MEMORY", tmp_path)
        monkeypatch.setattr(user, "CHUNK", 100)
    return tmp_path


def published(version: int) -> Snapshot:
    return write_snapshot(store_directory("run", 2), version, {"w": torch.full((40,), float(version))})


def test_the_newest_are_kept(shared_memory: Path) -> None:
    store = WeightStore("run", 2, keep=2)
    for version in (1, 2, 3):
        store.add(published(version))
    assert store.snapshot(3).version == 3
    assert sorted(path.name for path in store_directory("run", 2).iterdir()) == ["v2.safetensors", "v3.safetensors"]
    with pytest.raises(SnapshotError, match=r"the store has versions \[2, 3\], not 1"):
        store.snapshot(1)


def test_a_version_that_comes_again_is_the_last(shared_memory: Path) -> None:
    """As the policy's does, when its average was served in between."""
    store = WeightStore("run", 2, keep=1)
    for version in (1, 2, 1):
        store.add(published(version))
    assert store.snapshot(1).version == 1
    assert [path.name for path in store_directory("run", 2).iterdir()] == ["v1.safetensors"]


def test_chunks_make_up_the_file(tmp_path: Path) -> None:
    store, snapshot = WeightStore("run", 2, keep=1), published(7)
    store.add(snapshot)
    chunks, index = [], 0
    while chunk := store.chunk(7, index):
        chunks.append(chunk)
        index += 1
    assert len(chunks) > 1
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(b"".join(chunks))
    check(replace(snapshot, path=str(copy)))
    assert load_file(copy)["w"].tolist() == [7.0] * 40


def test_a_changed_file_is_not_what_was_published() -> None:
    snapshot = published(1)
    with open(snapshot.path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    said = rf"bucket 1 of 2 \(w to w\) has digest .*, published {snapshot.buckets[1].digest}"
    with pytest.raises(SnapshotError, match=said):
        check(snapshot)
    with open(snapshot.path, "ab") as file:
        file.write(b"\x01")
    with pytest.raises(SnapshotError, match=f"have {snapshot.bytes + 1} bytes, published {snapshot.bytes}"):
        check(snapshot)
    Path(snapshot.path).unlink()
    with pytest.raises(SnapshotError, match="weights of version 1 are not at"):
        check(snapshot)


def test_it_sweeps_what_earlier_attempts_left_and_leaves_nothing(shared_memory: Path) -> None:
    for run, attempt in (("run", 1), ("other", 1)):
        store_directory(run, attempt).mkdir()
    store = WeightStore("run", 2, keep=1)
    store.add(published(1))
    store.stop()
    assert [path.name for path in shared_memory.iterdir()] == [store_directory("other", 1).name]
