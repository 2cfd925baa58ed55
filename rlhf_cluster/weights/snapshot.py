"""One version of the policy's weights as a safetensors file in shared memory, with the digests that readers check.

Tensors come one at a time, each is copied once - to its place in the file, in the dtype it is published in - and bytes
that lie together share a digest, so that what is damaged can be named.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from rlhf_cluster.weights.delta import UNIT
from rlhf_cluster.weights.probe import Probe

SHARED_MEMORY = Path("/dev/shm")
SPARE = "spare"  # a file of the store that the next version is written over
BUCKET = 32 << 20  # bytes of tensors that share a digest, as near as whole ones allow
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # as safetensors names them


class SnapshotError(RuntimeError):
    """A snapshot that is missing or is not what its publisher wrote."""


@dataclass(frozen=True)
class Slot:
    """A tensor's place in a snapshot, before there is the tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """Bytes `start` to `stop` of the file, and their xxh3-64 digest. `holds` names what they are."""

    start: int
    stop: int
    digest: str
    holds: str


@dataclass(frozen=True)
class Snapshot:
    """Where a version lies, and what its file is made of."""

    version: int
    path: str
    buckets: tuple[Bucket, ...]
    probe: Probe | None = None

    @property
    def bytes(self) -> int:
        return self.buckets[-1].stop


def store_directory(run: str, attempt: int) -> Path:
    """The shared-memory folder of one attempt of a run: named so that what an attempt left behind can be swept."""
    return SHARED_MEMORY / f"rlhf-cluster-{run}-{attempt}"


def write_snapshot(
    directory: Path, version: int, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str] | None = None
) -> Snapshot:
    """Of tensors that are all there already."""
    slots = [Slot(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    return stream_snapshot(directory, version, slots, tensors.items(), header)


def stream_snapshot(
    directory: Path,
    version: int,
    slots: Sequence[Slot],
    tensors: Iterable[tuple[str, torch.Tensor]],
    header: Mapping[str, str] | None = None,
) -> Snapshot:
    """Writes the file, under its final name only when it is whole. `tensors` come in the order of `slots`, each asked
    for when the one before has its place; `header` stands at the beginning.

    Raises OSError where shared memory has no room for it, and SnapshotError for tensors that are not those of `slots`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"v{version}.safetensors"
    partial = path.with_suffix(".partial")
    beginning = _beginning(slots, header or {})
    size = len(beginning) + sum(slot.bytes for slot in slots)
    _take_over(directory / SPARE, partial)
    with open(partial, "r+b") as file:
        os.ftruncate(file.fileno(), size)
        os.posix_fallocate(file.fileno(), 0, size)  # a mapped page for which there is no room would end the process
        with mmap.mmap(file.fileno(), size, mmap.MAP_SHARED | mmap.MAP_POPULATE) as memory:
            memory[: len(beginning)] = beginning
            buckets = tuple(_fill(memory, len(beginning), slots, iter(tensors)))
    os.replace(partial, path)
    return Snapshot(version, str(path), buckets)


def _take_over(spare: Path, path: Path) -> None:
    """The pages of a version that nobody reads any more, where there are: new ones take longer to get than to fill."""
    if spare.exists():
        os.replace(spare, path)
    else:
        path.touch()


def check(snapshot: Snapshot) -> None:
    """Raises SnapshotError unless the file is there, whole and what was published."""
    path, of = Path(snapshot.path), f"weights of version {snapshot.version}"
    if not path.exists():
        raise SnapshotError(f"{of} are not at {path}: the store no longer keeps them")
    if (size := path.stat().st_size) != snapshot.bytes:
        raise SnapshotError(f"{of} at {path} have {size} bytes, published {snapshot.bytes}")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        for number, bucket in enumerate(snapshot.buckets):
            if (found := digest(memory, bucket.start, bucket.stop)) != bucket.digest:
                raise SnapshotError(
                    f"{of} at {path}: bucket {number} of {len(snapshot.buckets)} ({bucket.holds}) has digest {found}, "
                    f"published {bucket.digest}"
                )


def _beginning(slots: Sequence[Slot], header: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with: the length of its description, and that as JSON, filled up to eight
    bytes."""
    described: dict[str, object] = {"__metadata__": dict(header)} if header else {}
    stop = 0
    for slot in slots:
        start, stop = stop, stop + slot.bytes
        described[slot.name] = {"dtype": DTYPES[slot.dtype], "shape": slot.shape, "data_offsets": [start, stop]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _fill(
    memory: mmap.mmap, start: int, slots: Sequence[Slot], tensors: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[Bucket]:
    """The buckets in turn, the file's beginning first, each once it is full."""
    yield Bucket(0, start, digest(memory, 0, start), "its description")
    place, first = start, ""
    for slot in slots:
        name, tensor = next(tensors, ("nothing", torch.empty(0)))
        if (name, tuple(tensor.shape)) != (slot.name, slot.shape):
            raise SnapshotError(f"{name} {tuple(tensor.shape)} came where {slot.name} {slot.shape} has its place")
        if slot.bytes:
            torch.frombuffer(memory, dtype=slot.dtype, count=tensor.numel(), offset=place).view(slot.shape).copy_(
                tensor
            )
        place, first = place + slot.bytes, first or slot.name
        if place - start >= BUCKET or slot is slots[-1]:
            yield Bucket(start, place, digest(memory, start, place), f"{first} to {slot.name}")
            start, first = place, ""


def digest(memory: mmap.mmap, start: int, stop: int) -> str:
    """Of these bytes, xxh3-64."""
    with memoryview(memory) as view:
        return xxhash.xxh3_64_hexdigest(view[start:stop])


def units(memory: mmap.mmap, bucket: Bucket) -> np.ndarray:
    """A bucket in its place in the file, u16 [N]."""
    return np.frombuffer(memory, UNIT, (bucket.stop - bucket.start) // UNIT.itemsize, bucket.start)


def layout(snapshot: Snapshot) -> list[tuple[int, int, str]]:
    """Two snapshots of the same hold the same tensors in the same places."""
    return [(bucket.start, bucket.stop, bucket.holds) for bucket in snapshot.buckets]
