"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the linear layers of a model, by `peft`; the rest is frozen.

    W' = W + alpha / rank * B A        B = 0 at the start, so that nothing changes before something is learnt

Takes a model and leaves it adapted in place; gives its weights merged, by their Hugging Face names, and the adapter as
a directory that `peft` opens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_cluster.config import LoRAConfig

BASE, A, B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(model: PreTrainedModel, cfg: LoRAConfig) -> None:
    """On every linear layer but the head that gives logits; all other parameters stop to learn."""
    head = model.get_output_embeddings()
    layers = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    inject_adapter_in_model(_peft(cfg, layers, is_transposed(model)), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((A, B)))


def merged(weights: Mapping[str, Tensor], cfg: LoRAConfig, transposed: bool) -> dict[str, Tensor]:
    """Full weights by the names that an adapted model gives them -> by its plain names, adapters added. Without an
    adapter they are returned as they are. `transposed`: as GPT-2 keeps its linear layers."""
    found = {}
    for name, tensor in weights.items():
        if name.endswith((A, B)):
            continue
        plain = name.replace(BASE, ".")
        layer = name.split(BASE)[0]
        if BASE in name and name.endswith(".weight"):
            update = weights[layer + B].float() @ weights[layer + A].float() * (cfg.alpha / cfg.rank)
            tensor = (tensor.float() + (update.T if transposed else update)).to(tensor.dtype)
        found[plain] = tensor
    return found


def save_adapter(weights: Mapping[str, Tensor], cfg: LoRAConfig, transposed: bool, directory: Path) -> None:
    """The adapters of `weights`, float32, as `peft` keeps them; `peft.PeftModel.from_pretrained(base, directory)`."""
    layers = sorted({name.removesuffix(A) for name in weights if name.endswith(A)})
    named = {
        f"base_model.model.{name.replace('.default.', '.')}": tensor.detach().to("cpu", torch.float32, copy=True)
        for name, tensor in weights.items()
        if name.endswith((A, B))
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(named, directory / "adapter_model.safetensors")
    config = _peft(cfg, layers, transposed)
    config.inference_mode = True
    config.save_pretrained(str(directory))


def is_transposed(model: nn.Module) -> bool:
    """Whether the model keeps its linear layers the other way round, as GPT-2 does."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def _peft(cfg: LoRAConfig, layers: list[str], transposed: bool) -> LoraConfig:
    return LoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=0.0, target_modules=layers, fan_in_fan_out=transposed
    )
