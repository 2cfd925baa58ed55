"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the linear layers of a model, by `peft`; the rest is frozen.

    W' = W + alpha / rank * B A        B = 0 at the start, so that nothing changes before something is learnt

Takes a model and leaves it adapted in place; gives its weights merged, by their Hugging Face names, and the adapters
alone, as `peft` and vLLM read them.
"""

from __future__ import annotations

import json
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


class Adapters:
    """The adapters of one model, or none where their rank is 0. The model gives weights by the names that they lead to;
    here these become plain names again."""

    def __init__(self, model: PreTrainedModel, cfg: LoRAConfig) -> None:
        """On every linear layer of `model` but the head that gives logits; all other parameters stop to learn."""
        self.cfg = cfg
        # GPT-2 keeps its linear layers the other way round.
        self._transposed = any(isinstance(module, Conv1D) for module in model.modules())
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        self._layers = sorted(name for name in linear if linear[name] is not model.get_output_embeddings())
        if cfg.rank:
            inject_adapter_in_model(self._peft(), model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.endswith((A, B)))

    def merged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full weights by plain names, adapters added; as they are where there are no adapters."""
        found = {}
        for name, tensor in weights.items():
            if name.endswith((A, B)):
                continue
            layer = name.split(BASE)[0]
            if BASE in name and name.endswith(".weight"):
                update = weights[layer + B].float() @ weights[layer + A].float() * (self.cfg.alpha / self.cfg.rank)
                tensor = (tensor.float() + (update.T if self._transposed else update)).to(tensor.dtype)
            found[name.replace(BASE, ".")] = tensor
        return found

    def alone(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapters among `weights`, by the names that `peft` gives them in a file."""
        return {
            f"base_model.model.{name.replace('.default.', '.')}": tensor
            for name, tensor in weights.items()
            if name.endswith((A, B))
        }

    def description(self) -> str:
        """What `peft` keeps beside the adapters: JSON, the text of `adapter_config.json`."""
        config = self._peft().to_dict() | {"inference_mode": True, "target_modules": self._layers}
        return json.dumps(config, indent=2, sort_keys=True)

    def save(self, weights: Mapping[str, Tensor], directory: Path) -> None:
        """The adapters among `weights`, float32, as `peft.PeftModel.from_pretrained(base, directory)` reads them."""
        named = {
            name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in self.alone(weights).items()
        }
        directory.mkdir(parents=True, exist_ok=True)
        save_file(named, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(self.description())

    def _peft(self) -> LoraConfig:
        return LoraConfig(
            r=self.cfg.rank,
            lora_alpha=self.cfg.alpha,
            lora_dropout=0.0,
            target_modules=self._layers,
            fan_in_fan_out=self._transposed,
        )
