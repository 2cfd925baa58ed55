"""A snapshot's file: what safetensors reads of it, its buckets by hand, and what is refused half-way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlhf_cluster.weights import snapshot as module
from rlhf_cluster.weights.snapshot import Slot, SnapshotError, check, stream_snapshot, write_snapshot

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "none": torch.zeros(0, 4),
    "c": torch.randn(3, 1, 2, generator=torch.Generator().manual_seed(1)),
}


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path, 3, TENSORS, {"made": "here"})
    found = load_file(snapshot.path)
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    with safe_open(snapshot.path, "pt") as file:
        assert file.metadata() == {"made": "here"}
    check(snapshot)
    assert [path.name for path in tmp_path.iterdir()] == ["v3.safetensors"]
    save_file(TENSORS, tmp_path / "theirs")
    assert Path(snapshot.path).stat().st_size == snapshot.bytes


def test_buckets_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 bytes fill a bucket of 20, 10 and 0 do not, and 24 more do."""
    monkeypatch.setattr(module, "BUCKET", 20)
    first, *buckets = write_snapshot(tmp_path, 1, TENSORS).buckets
    assert [(bucket.stop - bucket.start, bucket.holds) for bucket in buckets] == [(24, "a to a"), (34, "b to c")]
    assert first.start == 0 and first.stop == buckets[0].start and first.holds == "its description"


def test_a_damaged_bucket_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUCKET", 20)
    snapshot = write_snapshot(tmp_path, 1, TENSORS)
    for number, bucket in enumerate(snapshot.buckets):
        with open(snapshot.path, "r+b") as file:
            file.seek(bucket.start)
            old = file.read(1)
            file.seek(bucket.start)
            file.write(bytes([old[0] ^ 1]))
            file.flush()
            with pytest.raises(SnapshotError, match=rf"bucket {number} of 3 \({bucket.holds}\)"):
                check(snapshot)
            file.seek(bucket.start)
            file.write(old)
    check(snapshot)


def test_a_tensor_is_asked_for_when_the_one_before_has_its_place(tmp_path: Path) -> None:
    """And is rounded to what is published."""
    kept = torch.zeros(4)

    def one_buffer() -> Iterator[tuple[str, torch.Tensor]]:
        for value in (1.0, 2.00001):
            yield str(int(value)), kept.fill_(value)

    slots = [Slot(name, (4,), torch.bfloat16) for name in ("1", "2")]
    found = load_file(stream_snapshot(tmp_path, 1, slots, one_buffer()).path)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"1": [1.0] * 4, "2": [2.0] * 4}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"b": torch.zeros(4)}, r"b \(4,\) came where a \(4,\) has its place"),
        ({"a": torch.zeros(3)}, r"a \(3,\) came where a \(4,\) has its place"),
        ({}, r"nothing \(0,\) came where a \(4,\) has its place"),
    ],
)
def test_other_tensors_than_told_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(SnapshotError, match=said):
        stream_snapshot(tmp_path, 1, [Slot("a", (4,), torch.float32)], tensors.items())
    assert not list(tmp_path.glob("*.safetensors"))
