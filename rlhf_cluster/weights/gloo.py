"""Both ends of a transfer over gloo: as vLLM's NCCL engines, whose protocol they keep, where there are no GPUs.

The learner's first rank broadcasts bucket by bucket to every engine process at once, each with its digest behind it; an
engine loads a bucket only where the digest is that of what came.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import islice
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
    """Where the group meets. `rank_offset`: of the engine's first process; the learner's rank is 0."""

    master_address: str
    master_port: int
    world_size: int
    rank_offset: int
    timeout_s: float

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

    master_address: str
    master_port: int
    world_size: int
    timeout_s: float


class GlooSender(NCCLTrainerWeightTransferEngine):
    """The learner's side."""

    init_info_cls = GlooTrainerInfo  # type: ignore[assignment]

    @classmethod
    def trainer_init(  # type: ignore[override]
        cls, init_info: GlooTrainerInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        assert source is not None
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        if sender.is_sender:
            place = (init_info.master_address, init_info.master_port, init_info.world_size)
            meeting = Meeting(*place, 1, init_info.timeout_s)
            with ThreadPoolExecutor(1) as asking:
                joined = asking.submit(client.init_weight_transfer_engine, asdict(meeting))
                sender.model_update_group = meeting.join(0)
                joined.result()
        return sender

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        pairs = self._checked_iter(source, meta)
        for bucket in buckets(meta):
            tensors = [tensor for _, tensor in islice(pairs, len(bucket))]
            if self.is_sender:
                flat = torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8).cpu() for tensor in tensors])
                packed = torch.cat([flat, digest(flat)])
                self.model_update_group.broadcast(packed, 0).wait()


class GlooReceiver(NCCLWeightTransferEngine):
    """An engine process's side."""

    init_info_cls = Meeting  # type: ignore[assignment]
    damaged = ""  # in the last update: the first bucket that came so

    def init_transfer_engine(self, init_info: Meeting) -> None:  # type: ignore[override]
        self.model_update_group = init_info.join(init_info.rank_offset + self.parallel_config.rank)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """From a bucket on that came damaged nothing is loaded, though all that was sent is received: nobody is to wait
        for this process. Nothing is raised, since vLLM takes one answer of an engine whose processes all raise, and the
        others for answers to what is asked next."""
        told = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        meta = [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in told]
        self.damaged = ""
        for number, bucket in enumerate(buckets(meta)):
            packed = torch.empty(sum(map(size, bucket)) + DIGEST, dtype=torch.uint8)
            self.model_update_group.broadcast(packed, 0).wait()
            if not torch.equal(digest(packed[:-DIGEST]), packed[-DIGEST:]):
                self.damaged = self.damaged or f"bucket {number} ({bucket[0].name} to {bucket[-1].name})"
            elif not self.damaged:
                self.model.load_weights(unpacked(packed, bucket))

    def shutdown(self) -> None:
        self.model_update_group = None


def size(of: ParamMeta) -> int:
    """Bytes."""
    return math.prod(of.shape) * of.dtype.itemsize


def buckets(meta: Sequence[ParamMeta], most: int = BUCKET) -> Iterator[list[ParamMeta]]:
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
