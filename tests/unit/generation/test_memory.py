"""The memory plan of a generation worker."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from rlhf_cluster.config import ConfigError, GenerationConfig, Resources
from rlhf_cluster.generation import memory
from rlhf_cluster.generation.memory import bytes_per_token, gpu_share, kv_cache_memory, planned_kv_cache

# SmolLM2-135M: 2 (keys, values) x 30 layers x 3 heads x 64 x 2 bytes.
SMOLLM2 = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
PER_TOKEN = 23040


def test_a_token_takes_its_keys_and_values_in_all_layers() -> None:
    assert bytes_per_token(SMOLLM2, torch.bfloat16) == PER_TOKEN
    assert bytes_per_token(GPT2Config(), torch.float32) == 2 * 12 * 768 * 4  # 12 layers, all heads of their own


def test_the_plan_holds_all_that_is_sampled_at_once() -> None:
    # 100 tokens are 4 blocks of 32, and one that is being filled: 5 x 32 x 8 responses.
    plan = planned_kv_cache(SMOLLM2, torch.bfloat16, GenerationConfig(max_num_seqs=8), 100, 32)
    assert plan == 8 * 5 * 32 * PER_TOKEN
    shared = GenerationConfig(max_num_seqs=8, tensor_parallel=2)
    assert planned_kv_cache(SMOLLM2, torch.bfloat16, shared, 100, 32) == plan // 2


def test_what_is_asked_for_is_given() -> None:
    asked = GenerationConfig(kv_cache_memory=1 << 26)
    assert kv_cache_memory(SMOLLM2, torch.bfloat16, asked, 100, 32) == 1 << 26
    assert kv_cache_memory(SMOLLM2, torch.bfloat16, asked, 100, 0) == 1 << 26


def test_an_engine_on_a_gpu_measures_for_itself() -> None:
    assert kv_cache_memory(SMOLLM2, torch.bfloat16, GenerationConfig(), 100, 0) is None
    assert gpu_share(GenerationConfig(resources=Resources(num_gpus=1))) == 0.9
    assert gpu_share(GenerationConfig(resources=Resources(num_gpus=0.5), gpu_memory_share=0.8)) == 0.4


def test_more_than_there_is_is_refused_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=2_000_000_000))
    with pytest.raises(ConfigError, match=r"max_num_seqs=64 responses of up to 2048 tokens take 3\.1 GB.* has 2\.0 GB"):
        kv_cache_memory(SMOLLM2, torch.bfloat16, GenerationConfig(), 2048, 32)
