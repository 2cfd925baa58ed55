from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rlhf_cluster.models.load import load_policy
from rlhf_cluster.models.tiny import byte_tokenizer

torch.set_num_threads(1)

SHAPE = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = SHAPE | {
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 258,  # EOS, as in SmolLM2
    "eos_token_id": 258,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**ROTARY, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**ROTARY, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**ROTARY, head_dim=8, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, eos_token_id=258
    ),
}


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of every family, written by transformers itself."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_config(config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases that start at 1 or 0 would hide mistakes
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture(params=list(CONFIGS))
def directory(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Path:
    return directories[request.param]


@cache
def loaded(directory: Path, attention: str) -> PreTrainedModel:
    return load_policy(directory, torch.float32, attention)


@pytest.fixture(params=["eager", "sdpa"])
def policy(request: pytest.FixtureRequest, directory: Path) -> PreTrainedModel:
    """A copy that the test may change: reading the directory takes longer."""
    return copy.deepcopy(loaded(directory, request.param))


@pytest.fixture
def ragged() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Seven prompts and responses of different lengths; id 258, EOS and pad at once, stands inside and at the end."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 259, n).astype(np.int32) for n in (3, 9, 1, 5, 2, 12, 4)]
    responses = [rng.integers(0, 259, n).astype(np.int32) for n in (4, 1, 7, 2, 11, 6, 3)]
    prompts[1][4] = 258
    for response in responses[::2]:
        response[-1] = 258
    return prompts, responses


@pytest.fixture
def logprob_fn() -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    def logprobs(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logs = torch.log_softmax(logits / temperature, dim=-1)
        return logs.gather(-1, ids[:, None]).squeeze(-1), -(logs.exp() * logs).sum(-1)

    return logprobs
