"""Causal LMs in and out of plain Hugging Face directories.

Takes directories and state dicts by Hugging Face names; gives models ready for `forward` and directories that any
Hugging Face tool opens. It refuses to know where weights were gathered from, and leaves atomic renames to its caller.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rlhf_cluster.models import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTIONS = ("eager", "sdpa")
RESIDUAL_OUTPUTS = ("self_attn.o_proj", "mlp.down_proj", "attn.c_proj", "mlp.c_proj")  # Llama and Qwen, GPT-2
# What some families do to logits after the head; the forward of this room would leave it out.
LOGIT_TRANSFORMS = {
    "final_logit_softcapping": None,
    "logit_scale": None,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}


def compute_device() -> str:
    """Where models compute: on the GPU where this process sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(name: str) -> torch.dtype:
    """`auto`: bfloat16 only where the hardware multiplies it natively; emulated, it is slower than float32."""
    if name == "auto":
        return torch.bfloat16 if _native_bfloat16() else torch.float32
    if name not in DTYPES:
        raise ModelError(f"model.dtype={name}; it must be auto, float32 or bfloat16")
    return DTYPES[name]


def _native_bfloat16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))


def resolve_attention(name: str) -> str:
    """`auto`: eager on CPU, where it is the faster one for short rows, sdpa on GPU."""
    if name == "auto":
        return "sdpa" if torch.cuda.is_available() else "eager"
    if name not in ATTENTIONS:
        raise ModelError(
            f"model.attention={name}; it must be auto, eager or sdpa: others do not keep packed rows apart"
        )
    return name


def load_config(path: Path) -> PreTrainedConfig:
    """The Hugging Face config of a directory. Raises ModelError where there is none or this room cannot run it."""
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} is not a Hugging Face model directory: it holds no config.json")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}/config.json is of no model that transformers knows: {_first_line(error)}") from error
    for name, neutral in LOGIT_TRANSFORMS.items():
        if getattr(config, name, neutral) not in (neutral, None):
            raise ModelError(
                f"{path} is a {config.model_type} model with {name}={getattr(config, name)}, which is not supported;"
                " use one whose logits are a plain linear layer (Llama, Qwen, GPT-2 families)"
            )
    return config


def load_policy(path: Path, dtype: torch.dtype | None, attention: str) -> PreTrainedModel:
    """A causal LM in eval mode, in `dtype` or (None) as it is stored.

    Dropout is off, in training mode too: PPO's ratio must start at 1.
    `attention` is `eager` or `sdpa`. The config is left as the directory has it (`use_cache`, dropout rates), so that
    a saved copy serves others unchanged; `forward.hidden_states` passes `use_cache=False`.
    """
    return load_pretrained(AutoModelForCausalLM, path, dtype, attention)


def load_pretrained(
    auto_class: type[AutoModel | AutoModelForCausalLM],
    path: Path,
    dtype: torch.dtype | None,
    attention: str,
    layers: int = 0,
) -> PreTrainedModel:
    """As `load_policy`, for either head; `layers` above 0 keeps the first so many transformer layers."""
    config = load_config(path)
    if layers > config.num_hidden_layers:
        raise ModelError(f"layers={layers} of {path}, which has {config.num_hidden_layers}; ask for at most these")
    if layers:
        config.num_hidden_layers = layers
    try:
        with quietly():
            model = auto_class.from_pretrained(
                path,
                config=config,
                dtype=dtype or "auto",
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be loaded as a causal language model: {_first_line(error)}") from error
    # With a padding index the embedding of that id gets no gradient; where pad equals EOS that is a real token.
    model.get_input_embeddings().padding_idx = None
    turn_off_dropout(model)
    return model


def turn_off_dropout(model: nn.Module) -> None:
    """Sets every dropout rate of the modules to 0, whatever the mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def add_residual_dropout(model: PreTrainedModel, rate: float) -> None:
    """Dropout at `rate` on what attention and MLP of every layer add to the residual stream, as in GPT-2 and -3; the
    Llama and Qwen families have none of their own. It is always on: for a model that is only trained. Raises ModelError
    where no such layers are found."""
    outputs = [module for name, module in model.named_modules() if name.endswith(RESIDUAL_OUTPUTS)]
    if not outputs:
        raise ModelError(f"{type(model).__name__} has no layers named {', '.join(RESIDUAL_OUTPUTS)}; use sft.dropout=0")
    for module in outputs:
        module.register_forward_hook(lambda module, inputs, output: functional.dropout(output, rate, training=True))


def save_policy(
    model_config: PreTrainedConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    dtype: torch.dtype,
) -> None:
    """Writes a causal LM as a plain Hugging Face directory, weights as `dtype` safetensors (5 GB a file).

    `state_dict` holds full tensors by Hugging Face names; a tied LM head may be in it or not and is not written.
    Raises ModelError, before anything is written, where a parameter is missing or unknown.
    """
    save_pretrained(AutoModelForCausalLM, model_config, state_dict, tokenizer, directory, dtype)
    GenerationConfig.from_model_config(model_config).save_pretrained(directory)


def save_pretrained(
    auto_class: type[AutoModel | AutoModelForCausalLM],
    model_config: PreTrainedConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    dtype: torch.dtype,
) -> None:
    """As `save_policy`, for either head and without a generation config."""
    config = copy.deepcopy(model_config)
    with torch.device("meta"), quietly():
        skeleton = auto_class.from_config(config)
    expected = {name for name, _ in skeleton.named_parameters()}  # names a tied parameter once
    tied = set(skeleton.state_dict()) - expected
    given = {name for name in state_dict if name not in tied}
    if given != expected:
        raise ModelError(
            f"the state dict does not fit {type(skeleton).__name__}: missing {sorted(expected - given)[:3]},"
            f" unknown {sorted(given - expected)[:3]}"
        )
    config.architectures = [type(skeleton).__name__]
    config.dtype = dtype
    directory.mkdir(parents=True, exist_ok=True)
    # Clones keep tensors apart that are views of one storage: what DeepSpeed gathers may be slices of a flat buffer.
    tensors = {name: state_dict[name].detach().to("cpu", dtype, copy=True).contiguous() for name in sorted(given)}
    huggingface_hub.save_torch_state_dict(tensors, directory)
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps the progress bars and the notes of transformers and the hub off the terminal; errors still rise."""
    bars, hub_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
