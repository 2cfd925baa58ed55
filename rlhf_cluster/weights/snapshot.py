"""One version of the policy's weights as one file in shared memory, with the digest that every reader checks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors.torch import save_file

SHARED_MEMORY = Path("/dev/shm")
CHUNK = 64 << 20


class SnapshotError(RuntimeError):
    """A snapshot that is missing or is not what its publisher wrote."""


@dataclass(frozen=True)
class Snapshot:
    """Where a version lies, how large it is (bytes) and its xxh3-64 digest."""

    version: int
    path: str
    bytes: int
    digest: str


def store_directory(run: str, attempt: int) -> Path:
    """The shared-memory folder of one attempt of a run: named so that what an attempt left behind can be swept."""
    return SHARED_MEMORY / f"rlhf-cluster-{run}-{attempt}"


def digest_of(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_snapshot(
    directory: Path, version: int, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str] | None = None
) -> Snapshot:
    """Writes one safetensors file under its final name only when it is whole. `header` stands at its beginning."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"v{version}.safetensors"
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial, dict(header or {}))
    snapshot = Snapshot(version, str(path), partial.stat().st_size, digest_of(partial))
    os.replace(partial, path)
    return snapshot


def check(snapshot: Snapshot) -> None:
    """Raises SnapshotError unless the file is there, whole and what was published."""
    path = Path(snapshot.path)
    if not path.exists():
        raise SnapshotError(f"weights of version {snapshot.version} are not at {path}: the store no longer keeps them")
    if (found := digest_of(path)) != snapshot.digest:
        raise SnapshotError(
            f"weights of version {snapshot.version} at {path} have digest {found}, published {snapshot.digest}"
        )
