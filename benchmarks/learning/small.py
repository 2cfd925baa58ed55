"""A small model made from nothing, and what every run on it is told."""

from __future__ import annotations

from pathlib import Path

import arms
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_cluster.models.load import save_policy

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LAYERS, WIDTH = 4, 128
HELDOUT, SAMPLES = 300, 4

COMMON = arms.options(
    model="pretrained",
    data="files",
    data__heldout_prompts=HELDOUT,
    generation__max_num_seqs=256,
    generation__kv_cache_memory=268435456,
    evaluation__samples_per_prompt=SAMPLES,
    evaluation__every=10,
    learner__engine__zero_stage=0,
)


def write_model(tokenizer: PreTrainedTokenizerFast, directory: Path, positions: int, seed: int) -> None:
    """A Llama of `LAYERS` x `WIDTH`, not trained at all, that reads prompts as they are."""
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    save_policy(config, LlamaForCausalLM(config).state_dict(), tokenizer, directory, torch.float32)


def given(model: Path, data: Path, seed: int) -> list[str]:
    """The common options, and where model and data of a seed lie."""
    return [
        *COMMON,
        f"model.path={model}",
        f"data.prompts={data / 'prompts.jsonl'}",
        f"data.demonstrations={data / 'demonstrations.jsonl'}",
        f"seed={seed}",
    ]
