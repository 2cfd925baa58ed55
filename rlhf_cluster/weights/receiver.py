"""vLLM's side of the transfer: reads a snapshot from shared memory into the live model, layer by layer, or tensors that
the learner sends.

The CPU build of vLLM repacks linear weights and frees the originals, so loading in place is impossible there; the
layerwise reload of vLLM rebuilds each layer from checkpoint-format tensors and is the documented path on GPUs as well.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class Opening(WeightTransferInitInfo):
    """Shared memory needs none. `direct`: the engine of vLLM's that tensors come by, and what it is told."""

    direct: str = ""
    told: dict[str, Any] = field(default_factory=dict)


@dataclass
class Update(WeightTransferUpdateInfo):
    """A snapshot's file, or what the direct engine is told of the tensors that come: pickled, since what stands for a
    GPU's memory (`ipc`) is not among what vLLM's messages may hold. It comes from our own worker."""

    path: str = ""
    told: bytes = b""


class Receiver(WeightTransferEngine[Opening, Update]):
    """Loads what it is given: whoever starts an update from a file has checked the digests, while the old weights still
    serve."""

    init_info_cls = Opening
    update_info_cls = Update
    _direct: WeightTransferEngine[Any, Any] | None = None

    def init_transfer_engine(self, init_info: Opening) -> None:
        if init_info.direct:
            config = replace(self.config, backend=init_info.direct)
            given = (config, self.vllm_config, self.device, self.model)
            self._direct = WeightTransferEngineFactory.create_engine(*given)
            self._direct.init_transfer_engine(self._direct.parse_init_info(init_info.told))

    def start_weight_update(self) -> None:
        with torch.device(self.device):
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Update) -> None:
        if update_info.path:
            with safe_open(update_info.path, "pt") as file:
                self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())
        else:
            assert self._direct is not None
            self._direct.receive_weights(self._direct.parse_update_info(pickle.loads(update_info.told)))

    def finish_weight_update(self) -> None:
        if self._direct is not None:
            self._direct.finish_weight_update()  # the same, and lets go of what it shares with the learner
        else:
            finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_heads(self.model)

    @property
    def damaged(self) -> str:
        """What came damaged, where the direct engine looks."""
        return getattr(self._direct, "damaged", "")

    def shutdown(self) -> None:
        if self._direct is not None:
            self._direct.shutdown()


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """An LM head that is tied to the embedding gets no weights of its own, so the reload leaves it alone. Its parameter
    is then new, but the packed copy that the CPU build multiplies with is still the old one: pack it again.
    On GPUs nothing is packed and vLLM's method does nothing.
    """
    embeddings = {id(m.weight) for m in model.modules() if type(m) is VocabParallelEmbedding}
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and id(module.weight) in embeddings:
            module.quant_method.process_weights_after_loading(module)


class Inspection:
    """Mixed into vLLM's worker: what it computes with, so that workers can be compared, and what came damaged."""

    model_runner: Any
    weight_transfer_engine: Receiver

    def damaged_weights(self) -> str:
        return self.weight_transfer_engine.damaged

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
