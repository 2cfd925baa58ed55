"""From `ModelConfig` to a plain Hugging Face directory, made or fetched once and kept in a cache.

Takes the config and a cache directory; gives a path that every worker may load. It refuses to load anything itself.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from filelock import FileLock, Timeout

from rlhf_cluster.config import ModelConfig
from rlhf_cluster.models import ModelError
from rlhf_cluster.models.load import load_config, quietly
from rlhf_cluster.models.smollm2 import convert_smollm2, find_gguf
from rlhf_cluster.models.tiny import build_tiny

CONVERSION = 1  # raise it when what is written into the cache changes
BUILD_DEADLINE_S = 600.0  # how long to wait for another process that builds the same model
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def prepare_model(cfg: ModelConfig, cache_dir: Path | None = None) -> Path:
    """The directory of `cfg`'s model, complete. Safe to call from several processes at once.

    `cache_dir` defaults to $RLHF_CLUSTER_CACHE/models, or ~/.cache/rlhf_cluster/models. Raises ModelError.
    """
    sources: dict[str, Callable[[], Path]] = {
        "smollm2_135m": lambda: _smollm2(cache_dir or default_cache()),
        "tiny": lambda: _tiny(cache_dir or default_cache()),
        "pretrained": lambda: _pretrained(cfg.path),
    }
    if cfg.source not in sources:
        raise ModelError(f"model.source={cfg.source}; it must be one of {', '.join(sources)}")
    return sources[cfg.source]()


def default_cache() -> Path:
    root = os.environ.get("RLHF_CLUSTER_CACHE", "")
    return (Path(root) if root else Path.home() / ".cache" / "rlhf_cluster") / "models"


def _smollm2(cache_dir: Path) -> Path:
    gguf, version = find_gguf()
    target = cache_dir / f"smollm2_135m-{version}.{CONVERSION}"
    return _build_once(target, lambda directory: convert_smollm2(gguf, directory))


def _tiny(cache_dir: Path) -> Path:
    return _build_once(cache_dir / f"tiny-{CONVERSION}", lambda directory: build_tiny(directory, seed=0))


def _build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target` appears complete or not at all: built under a lock in a directory beside it, then renamed."""
    if target.is_dir():
        return target
    temporary = target.parent / f".{target.name}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock", timeout=BUILD_DEADLINE_S):
            if not target.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
                build(temporary)
                temporary.rename(target)
    except Timeout as error:
        raise ModelError(f"another process has been building {target} for {BUILD_DEADLINE_S:.0f} s; end it") from error
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ModelError(f"the model cannot be written to {target}: {error}; RLHF_CLUSTER_CACHE moves it") from error
    return target


def _pretrained(path: str) -> Path:
    if not path:
        raise ModelError("model.path is empty; give a Hugging Face directory or hub id, or set model.source")
    directory = Path(path).expanduser()
    if not directory.is_dir():
        directory = _download(path)
    load_config(directory)
    return directory.resolve()


def _download(path: str) -> Path:
    if not HUB_ID.fullmatch(path):
        raise ModelError(f"model.path={path} does not exist and cannot be a hub id (OWNER/NAME)")
    try:
        with quietly():
            directory = Path(huggingface_hub.snapshot_download(path, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:  # HTTP errors of the hub are OSErrors, bad ids ValueErrors
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model.path={path} is no directory, and the hub did not give it: {reason}") from error
    if not any(directory.glob("*.safetensors")):
        raise ModelError(f"model.path={path} has no safetensors weights on the hub; convert it and give the directory")
    return directory
