"""vLLM's side of the transfer: reads a snapshot from shared memory into the live model, layer by layer.

The CPU build of vLLM repacks linear weights and frees the originals, so loading in place is impossible there; the
layerwise reload of vLLM rebuilds each layer from checkpoint-format tensors and is the documented path on GPUs as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """Shared memory needs no rendezvous."""


@dataclass
class SnapshotInfo(WeightTransferUpdateInfo):
    """Of a `Snapshot`, what vLLM carries."""

    path: str


class SharedMemoryReceiver(WeightTransferEngine[NoInitInfo, SnapshotInfo]):
    """Loads what it is given: whoever starts an update has checked the digests, while the old weights still serve."""

    init_info_cls = NoInitInfo
    update_info_cls = SnapshotInfo

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        with torch.device(self.device):
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SnapshotInfo) -> None:
        with safe_open(update_info.path, "pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_heads(self.model)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """An LM head that is tied to the embedding gets no weights of its own, so the reload leaves it alone. Its parameter
    is then new, but the packed copy that the CPU build multiplies with is still the old one: pack it again.
    On GPUs nothing is packed and vLLM's method does nothing.
    """
    embeddings = {id(m.weight) for m in model.modules() if type(m) is VocabParallelEmbedding}
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and id(module.weight) in embeddings:
            module.quant_method.process_weights_after_loading(module)


class WeightDigests:
    """Mixed into vLLM's worker: what it computes with, so that workers can be compared."""

    model_runner: Any

    def weight_digests(self) -> dict[str, str]:
        """By module, xxh3-64 of all that it computes with. Two engines of one build and one split have the same ones
        where they hold the same weights."""
        model: torch.nn.Module = self.model_runner.get_model()
        found = {}
        for name, module in model.named_modules():
            held = list(_held(module))
            if held:
                together = xxhash.xxh3_64()
                for tensor in held:
                    together.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())
                found[name] = together.hexdigest()
        return found


def _held(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """A module's own tensors, the slots of its adapters, and of weights that the CPU build has packed, which cannot be
    read, their product with one fixed row."""
    yield from (tensor for tensor in module.parameters(recurse=False) if tensor.numel())
    yield from (tensor for tensor in module.buffers(recurse=False) if tensor.numel())
    for slots in ("lora_a_stacked", "lora_b_stacked"):
        yield from getattr(module, slots, ())
    if hasattr(module, "cpu_linear"):
        yield module.cpu_linear(_row(module), module.weight, None)


def _row(module: torch.nn.Module) -> torch.Tensor:
    """No two numbers of it are the same, so that weights that changed places show."""
    widths = ("input_size_per_partition", "input_size", "embedding_dim")  # of linear layers that are split, that are
    # not, and of LM heads
    width = next(int(getattr(module, name)) for name in widths if hasattr(module, name))
    return torch.linspace(-1, 1, width)[None].to(module.weight.dtype)
