"""The versioned store: what it keeps, what it serves to other nodes, what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_cluster.weights import snapshot as module
from rlhf_cluster.weights import store as store_module
from rlhf_cluster.weights.snapshot import Snapshot, SnapshotError, check, store_directory, write_snapshot
from rlhf_cluster.weights.store import WeightStore


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for user in (module, store_module):
        monkeypatch.setattr(user, "SHARED_MEMORY", tmp_path)
    return tmp_path


def published(version: int) -> Snapshot:
    return write_snapshot(store_directory("run", 2), version, {"w": torch.full((40,), float(version))})


def test_the_newest_are_kept(shared_memory: Path) -> None:
    store = WeightStore("run", 2, keep=2)
    for version in (1, 2, 3):
        store.add(published(version))
    assert store.snapshot(3).version == 3
    kept = ["v2.safetensors", "v3.safetensors"]
    assert sorted(path.name for path in store_directory("run", 2).iterdir()) == ["spare", *kept]
    with pytest.raises(SnapshotError, match=r"the store has versions \[2, 3\], not 1"):
        store.snapshot(1)


def test_a_version_that_comes_again_is_the_last(shared_memory: Path) -> None:
    """As the policy's does, when its average was served in between."""
    store = WeightStore("run", 2, keep=1)
    for version in (1, 2, 1):
        store.add(published(version))
    assert store.snapshot(1).version == 1
    assert sorted(path.name for path in store_directory("run", 2).iterdir()) == ["spare", "v1.safetensors"]


@pytest.mark.parametrize("size", [10, 40, 90])
def test_a_version_is_written_over_one_that_is_gone(size: int) -> None:
    """Which may have been shorter or longer; what is kept is not touched."""
    store = WeightStore("run", 2, keep=1)
    for version in (1, 2):
        store.add(published(version))
    spare = store_directory("run", 2) / "spare"
    pages = spare.stat().st_ino
    last = write_snapshot(store_directory("run", 2), 3, {"w": torch.full((size,), 3.0)})
    assert Path(last.path).stat().st_ino == pages and not spare.exists()
    assert Path(last.path).stat().st_size == last.bytes
    check(last)
    check(store.snapshot(2))


def test_a_bucket_is_what_changed_since_a_version_that_is_kept() -> None:
    store = WeightStore("run", 2, keep=2)
    for version, weights in ((1, [1.0] * 40), (2, [1.0] * 39 + [2.0]), (3, [3.0] * 40)):
        store.add(write_snapshot(store_directory("run", 2), version, {"w": torch.tensor(weights)}))
    whole = store.piece(2, 1, None)
    assert whole.places is None and whole.bytes == 160
    assert store.piece(2, 1, 1).places is None  # of a version that is not kept nothing is known
    store.add(write_snapshot(store_directory("run", 2), 4, {"w": torch.tensor([3.0] * 39 + [4.0])}))
    changed = store.piece(4, 1, 3)
    assert changed.places is not None and changed.places.tolist() == [79]  # the upper half of the last number
    assert store.piece(4, 1, 2).bytes == 160  # more changed than it takes to tell all


def test_a_bucket_of_another_layout_is_whole() -> None:
    store = WeightStore("run", 2, keep=2)
    for version, name in ((1, "v"), (2, "w")):
        store.add(write_snapshot(store_directory("run", 2), version, {name: torch.zeros(40)}))
    assert store.piece(2, 1, 1).places is None


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
