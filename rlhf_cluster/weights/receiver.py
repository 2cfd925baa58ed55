"""vLLM's side of the transfer: reads a snapshot from shared memory into the live model, layer by layer.

The CPU build of vLLM repacks linear weights and frees the originals, so loading in place is impossible there; the
layerwise reload of vLLM rebuilds each layer from checkpoint-format tensors and is the documented path on GPUs as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
