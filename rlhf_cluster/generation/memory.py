"""What a generation worker's memory is planned to hold: keys and values of all that it samples at once."""

from __future__ import annotations

import math

import psutil
import torch
from transformers import PreTrainedConfig

from rlhf_cluster.config import ConfigError, GenerationConfig


def bytes_per_token(model: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Of keys and values, in all layers."""
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return 2 * model.num_hidden_layers * heads * width * dtype.itemsize


def planned_kv_cache(
    model: PreTrainedConfig, dtype: torch.dtype, cfg: GenerationConfig, context: int, block: int
) -> int:
    """Bytes for `max_num_seqs` responses of the whole context, in blocks of so many tokens; of each of a worker's
    processes, where tensor parallelism shares the heads among them."""
    tokens = cfg.max_num_seqs * (math.ceil(context / block) + 1) * block
    return math.ceil(tokens * bytes_per_token(model, dtype) / cfg.tensor_parallel)


def gpu_share(cfg: GenerationConfig) -> float:
    """Of its GPU, all that a worker takes; one that reserved a part of it takes no more than its share of that part."""
    return cfg.gpu_memory_share * min(1.0, cfg.resources.num_gpus or 1.0)


def kv_cache_memory(
    model: PreTrainedConfig, dtype: torch.dtype, cfg: GenerationConfig, context: int, block: int
) -> int | None:
    """Bytes to give the engine: what is asked for, or what is planned; None where the engine measures for itself what
    its GPU has left (`block` is 0 there). Raises ConfigError for more than this machine's memory has free."""
    if not cfg.kv_cache_memory and not block:
        return None
    planned = cfg.kv_cache_memory or planned_kv_cache(model, dtype, cfg, context, block)
    free = psutil.virtual_memory().available // cfg.tensor_parallel
    if block and planned > free:
        raise ConfigError(
            f"generation.max_num_seqs={cfg.max_num_seqs} responses of up to {context} tokens take "
            f"{planned / 1e9:.1f} GB of keys and values, but this machine has {free / 1e9:.1f} GB free; lower "
            "generation.max_num_seqs, or generation.kv_cache_memory where that is set: what then does not fit at once "
            "is sampled in turns"
        )
    return planned
