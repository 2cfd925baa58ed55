"""The learner's side of a transfer that does not go through the store: its ranks send to the engines' processes, by
vLLM's own trainer engines between GPUs, by ours over gloo elsewhere.

vLLM is loaded where a sender is made, as in the generation worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightSource


class Engines(Protocol):
    """All that receive, as vLLM's trainer engines ask them (its `VLLMWeightSyncClient`)."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


@dataclass(frozen=True)
class Rendezvous:
    """Where the learner's ranks and `receivers` engine processes meet; `rank` is a learner's."""

    transport: str
    rank: int
    address: str
    port: int
    receivers: int
    timeout_s: float


class Sender:
    """Made by all ranks together, as is every `send`. `tensors` starts over with each call."""

    def __init__(
        self,
        at: Rendezvous,
        client: Engines,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]],
    ) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        from rlhf_cluster.weights.plugin import register

        register()
        source = make_source(shapes, dtype, tensors)
        largest = max((math.prod(shape) for shape in shapes.values()), default=0) * dtype.itemsize
        told = trainer_info(at, largest)
        self._engine = WeightTransferTrainerFactory.trainer_init(told, client=client, source=source)

    def send(self) -> None:
        self._engine.send_weights()


def trainer_info(at: Rendezvous, largest: int) -> TrainerInitInfo:
    """What vLLM's engine for this transport is told; between GPUs tensors travel packed. `largest`: bytes of a tensor,
    for which the buffer that one GPU's processes share must have room."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES

    from rlhf_cluster.weights.gloo import GlooTrainerInfo, Meeting

    if at.transport == "ipc":
        room = max(largest, DEFAULT_PACKED_BUFFER_SIZE_BYTES)
        return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=room, rank=at.rank)
    if at.transport == "nccl":
        return NCCLTrainerInitInfo(at.address, at.port, 1 + at.receivers, rank=at.rank)
    return GlooTrainerInfo(Meeting(at.address, at.port, 1 + at.receivers, at.timeout_s), rank=at.rank)


def make_source(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]],
) -> WeightSource:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, dtype, shape) for name, shape in shapes.items()]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(tensors())

    return Source()
