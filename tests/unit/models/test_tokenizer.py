from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rlhf_cluster.models import ModelError
from rlhf_cluster.models.batching import micro_batches, singles
from rlhf_cluster.models.tiny import byte_tokenizer
from rlhf_cluster.models.tokenizer import around_question, context_length, load_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Of Italy?"},
]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A tokenizer as GPT-2 has it: EOS, but no pad token and no chat template."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_plain_template_by_hand(bare: Path) -> None:
    tokenizer = load_tokenizer(bare)
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True) == (
        "Be brief.\n\nUser:\nCapital of France?\n\nAssistant:\nParis.<|im_end|>\n\nUser:\nOf Italy?\n\nAssistant:\n"
    )


def test_what_the_template_puts_around_a_question(bare: Path) -> None:
    assert around_question(load_tokenizer(bare)) == ("User:\n", "\n\nAssistant:\n")


def test_prompt_is_a_prefix_of_the_conversation_that_goes_on(bare: Path) -> None:
    tokenizer = load_tokenizer(bare)
    prompt = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    longer = [*CONVERSATION, {"role": "assistant", "content": "Rome."}]
    assert tokenizer.apply_chat_template(longer, tokenize=False) == prompt + "Rome.<|im_end|>\n\n"


def test_pad_falls_back_to_eos_and_eos_is_still_a_label(bare: Path) -> None:
    tokenizer = load_tokenizer(bare)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 258
    assert len(tokenizer) == 259
    response = np.array([*tokenizer("yes").input_ids, tokenizer.eos_token_id], np.int32)
    longer = np.array([1] * 9, np.int32)
    (batch,) = micro_batches([response[:1]] * 2, [response, longer], singles(2), 100)
    row = batch.sequences.tolist().index(0)
    assert batch.split(batch.response_targets())[row].tolist() == [*b"yes", 258]
    assert batch.input_ids.flatten()[batch.last_positions()[row]] == 258


def test_given_template_overrides_the_tokenizers_own(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    own = load_tokenizer(tmp_path)
    assert "<|im_start|>user\n" in own.apply_chat_template(CONVERSATION, tokenize=False)
    assert own.pad_token == "<|pad|>"
    given = load_tokenizer(tmp_path, "{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    assert given.apply_chat_template(CONVERSATION[:2], tokenize=False) == "[Be brief.][Capital of France?]"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [("{% for m in %}", "does not render"), ("{{ raise_exception('no') }}", "does not render"), ("hi", "leaves")],
)
def test_bad_templates_are_refused(bare: Path, template: str, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        load_tokenizer(bare, template)


def test_no_eos_and_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no EOS token"):
        load_tokenizer(tmp_path)


def test_context_length_of_each_family(directory: Path) -> None:
    assert context_length(directory) == (64 if directory.name == "gpt2" else 128)


def test_byte_tokenizer_gives_back_any_text() -> None:
    tokenizer = byte_tokenizer()
    text = "Ünïcode, 日本 \n\t and  spaces"
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids == [257, 97, 258]
    assert torch.tensor(ids).max() < len(tokenizer)
