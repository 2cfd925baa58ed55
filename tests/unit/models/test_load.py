from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rlhf_cluster.models import ModelError
from rlhf_cluster.models.load import load_config, load_policy, resolve_attention, resolve_dtype, save_policy
from rlhf_cluster.models.tiny import byte_tokenizer

TIED = {"llama": True, "qwen2": False, "qwen3": True, "gpt2": True}


def test_round_trip_is_exact(directory: Path, tmp_path: Path) -> None:
    model = load_policy(directory, torch.float32, "eager")
    save_policy(model.config, model.state_dict(), byte_tokenizer(), tmp_path, torch.float32)
    written = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in written) is not TIED[directory.name]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(12)[None]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(again(ids).logits, AutoModelForCausalLM.from_pretrained(directory).eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"


def test_saved_config_says_what_was_written(directory: Path, tmp_path: Path) -> None:
    model = load_policy(directory, torch.float32, "eager")
    parameters = dict(model.named_parameters())  # what an engine gathers: a tied head is not named
    save_policy(model.config, parameters, byte_tokenizer(), tmp_path, torch.bfloat16)
    before, after = (json.loads((d / "config.json").read_text()) for d in (directory, tmp_path))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed == {"dtype"}
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_views_of_one_buffer_are_saved_apart(directories: dict[str, Path], tmp_path: Path) -> None:
    model = load_policy(directories["llama"], torch.float32, "eager")
    buffer = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    views, start = {}, 0
    for name, parameter in model.named_parameters():
        views[name] = buffer[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    save_policy(model.config, views, byte_tokenizer(), tmp_path, torch.float32)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[name], parameter) for name, parameter in model.named_parameters())


def test_wrong_state_dict_writes_nothing(directories: dict[str, Path], tmp_path: Path) -> None:
    model = load_policy(directories["gpt2"], torch.float32, "eager")
    state = dict(model.named_parameters())
    del state["transformer.wpe.weight"]
    with pytest.raises(ModelError, match=r"missing \['transformer.wpe.weight'\], unknown \['model.wpe'\]"):
        save_policy(
            model.config, state | {"model.wpe": torch.ones(1)}, byte_tokenizer(), tmp_path / "out", torch.float32
        )
    assert not (tmp_path / "out").exists()


def test_dropout_is_off_in_training_mode(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert config.resid_pdrop == 0.1
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    noisy = GPT2LMHeadModel.from_pretrained(tmp_path).train()
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)
    quiet = load_policy(tmp_path, torch.float32, "eager").train()
    assert torch.equal(quiet(ids).logits, quiet(ids).logits)
    assert quiet.config.resid_pdrop == 0.1


def test_eos_embedding_learns_where_pad_equals_eos(directories: dict[str, Path]) -> None:
    model = load_policy(directories["qwen2"], torch.float32, "eager")
    assert model.config.pad_token_id == model.config.eos_token_id == 258
    model(torch.tensor([[258, 1, 2]])).logits.logsumexp(-1).sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient[258].abs().sum() > 0


def test_resolution_of_auto_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "amx_bf16": False})
    assert resolve_dtype("auto") is torch.float32
    assert resolve_attention("auto") == "eager"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert resolve_dtype("auto") is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert resolve_dtype("auto") is torch.float32
    assert resolve_attention("auto") == "sdpa"
    assert resolve_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ModelError, match=r"model\.dtype=float16; it must be auto, float32 or bfloat16"):
        resolve_dtype("float16")
    with pytest.raises(ModelError, match=r"model\.attention=flash"):
        resolve_attention("flash_attention_2")


def test_unusable_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(ModelError, match="no model that transformers knows"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(ModelError, match=r"gemma2 model with final_logit_softcapping=30\.0"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_policy(tmp_path, torch.float32, "eager")
