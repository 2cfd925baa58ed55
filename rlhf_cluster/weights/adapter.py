"""A published adapter: a snapshot of low-rank matrices alone, whose header says how they are added to the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open

from rlhf_cluster.weights.snapshot import Snapshot

HEADER = "adapter_config"  # its value: the text of peft's adapter_config.json


def unpack(snapshot: Snapshot, worker: str) -> Path:
    """The directory, beside the snapshot, that vLLM opens an adapter from: the last one of `worker`."""
    with safe_open(snapshot.path, "pt") as file:
        description = file.metadata()[HEADER]
    directory = Path(snapshot.path).parent / f"adapter-{worker}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    (directory / "adapter_config.json").write_text(description)
    (directory / "adapter_model.safetensors").symlink_to(snapshot.path)
    return directory
