"""A two-layer Llama with a byte-level tokenizer, made on the spot: for tests, and for runs that take seconds.

Takes a directory and a seed; leaves a plain Hugging Face directory there, the same bytes for the same seed. A head
size of 32 is the smallest that vLLM's attention on CPU supports.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rlhf_cluster.models.load import quietly, save_policy

PAD, IM_START, IM_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CONTEXT = 1024
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tiny(directory: Path, seed: int) -> None:
    """Writes the model, float32, and its tokenizer."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids(IM_START),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    save_policy(config, model.state_dict(), tokenizer, directory, torch.float32)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0..255 are the bytes; pad 256, <|im_start|> 257, <|im_end|> 258, which is EOS."""
    vocabulary = {character: byte for byte, character in sorted(bytes_to_unicode().items())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, IM_START, IM_END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=IM_START,
        eos_token=IM_END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
