"""Both ends of a transfer over gloo: as vLLM's NCCL engines, whose protocol they keep, where there are no GPUs.

The learner's first rank broadcasts bucket by bucket to every engine process at once, each with its digest behind it; an
engine loads a bucket only where the digest is that of what came.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import ClassVar, Self

import torch
import xxhash
from torch.distributed import ProcessGroup
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferInitInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from rlhf_cluster.weights.snapshot import BUCKET

DIGEST = 8  # bytes of xxh3-64


@dataclass
class Meeting(WeightTransferInitInfo):
    """Where the group meets, and what both ends must agree on. `rank_offset`: of the engine's first process; the
    learner's rank is 0. `bucket`: bytes that travel together, as near as whole tensors allow."""

    master_address: str
    master_port: int
    world_size: int
    timeout_s: float
    rank_offset: int = 1
    bucket: int = BUCKET

    def join(self, rank: int) -> ProcessGroup:
        group = stateless_init_torch_distributed_process_group(
            self.master_address,
            self.master_port,
            rank,
            self.world_size,
            "gloo",
            timeout=timedelta(seconds=self.timeout_s),
        )
        assert isinstance(group, ProcessGroup)
        return group


@dataclass
class GlooTrainerInfo(TrainerInitInfo):
    backend: ClassVar[str] = "rlhf_cluster_gloo"

    meeting: Meeting


class GlooSender(NCCLTrainerWeightTransferEngine):
    """The learner's side."""

    init_info_cls = GlooTrainerInfo  # type: ignore[assignment]

    @classmethod
    def trainer_init(  # type: ignore[override]
        cls, init_info: GlooTrainerInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        assert source is not None
        sender = cls(
            client=client,
            source=source,
            is_sender=init_info.is_sender,
            packed_buffer_size_bytes=init_info.meeting.bucket,
        )
        if sender.is_sender:
            with ThreadPoolExecutor(1) as asking:
                joined = asking.submit(client.init_weight_transfer_engine, asdict(init_info.meeting))
                sender.model_update_group = init_info.meeting.join(0)
                joined.result()
        return sender

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        if not self.is_sender:
            deque(source, maxlen=0)  # each is gathered by all ranks
            return
        tensors = self._checked_iter(source, meta)
        for bucket in buckets(meta, self.packed_buffer_size_bytes):
            packed = torch.empty(sum(map(size, bucket)) + DIGEST, dtype=torch.uint8)
            for (_, place), (_, tensor) in zip(unpacked(packed, bucket), tensors, strict=False):  # more of them follow
                place.copy_(tensor.detach())
            packed[-DIGEST:] = digest(packed[:-DIGEST])
            self.model_update_group.broadcast(packed, 0).wait()


class GlooReceiver(NCCLWeightTransferEngine):
    """An engine process's side."""

    init_info_cls = Meeting  # type: ignore[assignment]
    damaged = ""  # in the last update: the first bucket that came so, or that the model did not take

    def init_transfer_engine(self, init_info: Meeting) -> None:  # type: ignore[override]
        self.packed_buffer_size_bytes = init_info.bucket
        self.model_update_group = init_info.join(init_info.rank_offset + self.parallel_config.rank)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """From a bucket on that came damaged, or that the model did not take, nothing is loaded, though all that was
        sent is received: nobody is to wait for this process. Nothing is raised, since vLLM takes one answer of an
        engine whose processes all raise, and the others for answers to what is asked next."""
        told = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        meta = [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in told]
        self.damaged = ""
        for number, bucket in enumerate(buckets(meta, self.packed_buffer_size_bytes)):
            packed = torch.empty(sum(map(size, bucket)) + DIGEST, dtype=torch.uint8)
            self.model_update_group.broadcast(packed, 0).wait()
            if not self.damaged and (why := self._load(packed, bucket)):
                self.damaged = f"bucket {number} ({bucket[0].name} to {bucket[-1].name}): {why}"

    def _load(self, packed: torch.Tensor, bucket: list[ParamMeta]) -> str:
        """Why it was not loaded; nothing where it was."""
        if not torch.equal(digest(packed[:-DIGEST]), packed[-DIGEST:]):
            return "its digest is not the one that was sent"
        try:
            self.model.load_weights(unpacked(packed, bucket))
        except Exception as error:
            return f"the model did not take it, {type(error).__name__}: {error}"
        return ""

    def shutdown(self) -> None:
        self.model_update_group = None


def size(of: ParamMeta) -> int:
    """Bytes."""
    return math.prod(of.shape) * of.dtype.itemsize


def buckets(meta: Sequence[ParamMeta], most: int) -> Iterator[list[ParamMeta]]:
    """Neighbours of about `most` bytes together, the same ones at both ends."""
    bucket: list[ParamMeta] = []
    for one in meta:
        bucket.append(one)
        if sum(map(size, bucket)) >= most:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def digest(flat: torch.Tensor) -> torch.Tensor:
    """Of u8 [N]: u8 [8]."""
    return torch.frombuffer(bytearray(xxhash.xxh3_64_digest(flat.numpy())), dtype=torch.uint8)


def unpacked(packed: torch.Tensor, bucket: Sequence[ParamMeta]) -> Iterator[tuple[str, torch.Tensor]]:
    start = 0
    for one in bucket:
        yield one.name, packed[start : start + size(one)].view(one.dtype).view(one.shape)
        start += size(one)
