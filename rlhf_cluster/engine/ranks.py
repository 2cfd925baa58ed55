"""The learner's ranks: the process group that DeepSpeed runs on, and the few collectives that rooms ask for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of a gang: `rank` of `world`."""

    rank: int
    world: int

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum over all ranks, on every rank."""
        total = values.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        return total

    def max(self, value: float) -> float:
        top = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        return float(top)

    def gather(self, item: Any) -> list[Any]:
        """One picklable item of every rank, in rank order, on every rank. For small things."""
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items


def backend() -> str:
    """gloo for tensors in host memory, which statistics are, and NCCL beside it where there are GPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def join_ranks(rank: int, world: int, master: str, port: int, timeout_s: float) -> Ranks:
    """Joins the gang's process group (gloo on CPU, NCCL on GPU); a collective that exceeds `timeout_s` fails the
    process."""
    os.environ.update(MASTER_ADDR=master, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["LOCAL_RANK"] = "0"  # Ray shows each worker its own device alone
    _without_compiled_collective()
    deepspeed.init_distributed(
        backend(),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
        auto_mpi_discovery=False,
        verbose=False,
    )
    return Ranks(rank, world)


def adopt_ranks() -> Ranks:
    """The place of a process whose group somebody else has made (Ray Train)."""
    _without_compiled_collective()
    deepspeed.init_distributed(backend(), auto_mpi_discovery=False, verbose=False)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _without_compiled_collective() -> None:
    """DeepSpeed would compile an all-reduce over shared memory, which takes a C++ compiler and a minute or more at the
    first start and on every change of flags; gloo does without."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
