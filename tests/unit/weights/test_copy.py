"""A copy of a snapshot on another node: what comes, what is checked, and what is done where it is damaged."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cluster.weights import snapshot as module
from rlhf_cluster.weights import store as store_module
from rlhf_cluster.weights.copy import SnapshotCopy
from rlhf_cluster.weights.delta import Piece
from rlhf_cluster.weights.snapshot import SnapshotError, check, store_directory, write_snapshot
from rlhf_cluster.weights.store import WeightStore

DEADLINE_S = 30
SIZE = 1000


class Asked:
    """The store, as a copy asks it; `damage` spoils the first answers of a bucket."""

    def __init__(self, store: WeightStore) -> None:
        self.store = store
        self.damage: dict[int, int] = {}
        self.asked: list[tuple[int, int, int | None]] = []

    async def __call__(self, version: int, number: int, base: int | None) -> Piece:
        self.asked.append((version, number, base))
        piece = self.store.piece(version, number, base)
        if self.damage.get(number, 0):
            self.damage[number] -= 1
            return Piece(piece.places, piece.units ^ 1)
        return piece


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightStore:
    for user in (module, store_module):
        monkeypatch.setattr(user, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(module, "BUCKET", 2 * SIZE)  # a tensor of 1000 bfloat16 numbers each
    return WeightStore("run", 1, keep=2)


@pytest.fixture
def copy(tmp_path: Path) -> SnapshotCopy:
    return SnapshotCopy(tmp_path / "copy")


def weights(version: int) -> dict[str, torch.Tensor]:
    """Two tensors of ones, of which a version has changed so many numbers."""
    whole = torch.ones(2, SIZE, dtype=torch.bfloat16)
    whole[:, :version] = 2.0
    return {"a": whole[0], "b": whole[1]}


def bring(copy: SnapshotCopy, asked: Asked, version: int, of: dict[str, torch.Tensor] | None = None) -> Path:
    published = write_snapshot(store_directory("run", 1), version, of or weights(version))
    asked.store.add(published)
    brought = asyncio.run(asyncio.wait_for(copy.bring(published, asked), DEADLINE_S))
    check(brought)
    assert brought.path != published.path
    assert Path(brought.path).read_bytes() == Path(published.path).read_bytes()
    return Path(brought.path)


def test_what_changed_comes_and_no_more(copy: SnapshotCopy, store: WeightStore) -> None:
    asked = Asked(store)
    bring(copy, asked, 1)
    whole = copy.received
    assert whole > 4 * SIZE
    path = bring(copy, asked, 3)
    assert copy.received - whole == 2 * 2 * 6  # two numbers of both tensors
    assert load_file(path)["b"].tolist() == [2.0] * 3 + [1.0] * (SIZE - 3)
    assert [file.name for file in path.parent.iterdir()] == ["v3.safetensors"]


def test_a_version_that_came_already_costs_nothing(copy: SnapshotCopy, store: WeightStore) -> None:
    asked = Asked(store)
    bring(copy, asked, 1)
    whole = copy.received
    bring(copy, asked, 1)
    assert copy.received == whole


def test_another_layout_comes_whole(copy: SnapshotCopy, store: WeightStore) -> None:
    asked = Asked(store)
    bring(copy, asked, 1)
    path = bring(copy, asked, 2, {"c": torch.zeros(7)})
    assert [file.name for file in path.parent.iterdir()] == ["v2.safetensors"]


def test_a_base_that_the_store_forgot_comes_whole(copy: SnapshotCopy, store: WeightStore) -> None:
    asked = Asked(store)
    bring(copy, asked, 1)
    for version in (2, 3):
        store.add(write_snapshot(store_directory("run", 1), version, weights(version)))
    bring(copy, asked, 4)


def test_a_damaged_bucket_is_asked_for_again(copy: SnapshotCopy, store: WeightStore) -> None:
    asked = Asked(store)
    bring(copy, asked, 1)
    asked.damage = {1: 1}
    bring(copy, asked, 2)
    assert (2, 1, None) in asked.asked and (2, 2, None) not in asked.asked


def test_one_that_is_damaged_twice_is_named_and_nothing_is_built_on_it(copy: SnapshotCopy, store: WeightStore) -> None:
    asked = Asked(store)
    bring(copy, asked, 1)
    asked.damage = {2: 2}
    with pytest.raises(SnapshotError, match=r"version 2 came damaged twice: bucket 2 of 3 \(b to b\)"):
        bring(copy, asked, 2)
    asked.asked.clear()
    bring(copy, asked, 3)
    assert {base for _, _, base in asked.asked} == {None}


def test_it_forgets(copy: SnapshotCopy, store: WeightStore) -> None:
    path = bring(copy, Asked(store), 1)
    copy.forget()
    assert not path.parent.exists()
