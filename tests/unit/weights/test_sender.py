"""Weights that the learner sends itself: what vLLM's engines are told, and the transfer over gloo between threads."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rlhf_cluster.weights import gloo
from rlhf_cluster.weights.gloo import GlooReceiver, GlooTrainerInfo, Meeting, buckets
from rlhf_cluster.weights.plugin import DIRECT, register
from rlhf_cluster.weights.sender import Rendezvous, Sender, trainer_info

TENSORS = {f"layer.{i}": torch.arange(i, i + 12, dtype=torch.bfloat16).view(3, 4) for i in range(5)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
DEADLINE_S = 30.0


def test_nccl_is_told_where_all_meet_and_packs() -> None:
    found = trainer_info(Rendezvous("nccl", 1, "10.0.0.1", 4711, 6, 60.0), 8)
    assert isinstance(found, NCCLTrainerInitInfo)
    place = (found.master_address, found.master_port, found.world_size)
    assert place == ("10.0.0.1", 4711, 7) and found.packed and not found.is_sender


@pytest.mark.parametrize("largest", [8, 3 << 30])
def test_ipc_needs_no_place_and_packs_into_what_holds_any_tensor(largest: int) -> None:
    found = trainer_info(Rendezvous("ipc", 0, "10.0.0.1", 4711, 6, 60.0), largest)
    assert isinstance(found, IPCTrainerInitInfo) and found.packed and found.is_sender
    assert found.packed_buffer_size_bytes == max(1 << 30, largest)


def test_gloo_is_told_where_all_meet_and_for_how_long() -> None:
    found = trainer_info(Rendezvous("gloo", 0, "10.0.0.1", 4711, 6, 60.0), 8)
    assert found == GlooTrainerInfo(Meeting("10.0.0.1", 4711, 7, 60.0), rank=0)


@pytest.mark.parametrize("transport", DIRECT)
def test_vllm_has_an_engine_at_both_ends_for_every_transport(transport: str) -> None:
    register()
    info = trainer_info(Rendezvous(transport, 0, "10.0.0.1", 4711, 6, 60.0), 8)
    assert info.backend == DIRECT[transport]
    for factory in (WeightTransferEngineFactory, WeightTransferTrainerFactory):
        assert factory._registry[info.backend]()


def test_buckets_are_neighbours_of_about_a_size_and_hold_all() -> None:
    meta = [ParamMeta(str(i), torch.bfloat16, (size,)) for i, size in enumerate((4, 4, 4, 100, 1))]
    assert [[one.name for one in bucket] for bucket in buckets(meta, 16)] == [["0", "1"], ["2", "3"], ["4"]]


class Model:
    """What an engine process loads into."""

    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}
        self.refused = ""  # the tensor that it does not take

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == self.refused:
                raise KeyError(name)
            self.loaded[name] = tensor.clone()


@dataclass
class Engines:
    """Two workers of one process each, called in threads; an error of either is the learner's."""

    models: list[Model] = field(default_factory=lambda: [Model(), Model()])
    receivers: list[GlooReceiver] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        config: Any = SimpleNamespace(parallel_config=SimpleNamespace(rank=0), model_config=None)
        given: Any = (None, config, torch.device("cpu"))
        self.receivers = [GlooReceiver(*given, model) for model in self.models]  # type: ignore[arg-type]
        told = [init_info | {"rank_offset": 1 + number} for number in range(2)]
        pairs = zip(self.receivers, told, strict=True)
        self._all([lambda r=r, t=t: r.init_transfer_engine(r.parse_init_info(t)) for r, t in pairs])

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, update_info: Any) -> None:
        self._all([lambda r=r: r.receive_weights(r.parse_update_info(update_info)) for r in self.receivers])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")

    def _all(self, work: list[Callable[[], None]]) -> None:
        with ThreadPoolExecutor(len(work)) as threads:
            for done in [threads.submit(one) for one in work]:
                done.result(DEADLINE_S)


def make_sender(engines: Engines, tensors: dict[str, torch.Tensor]) -> Sender:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    at = Rendezvous("gloo", 0, "127.0.0.1", port, 2, DEADLINE_S)
    return Sender(at, engines, SHAPES, torch.bfloat16, lambda: tensors.items())


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo, "Meeting", partial(Meeting, bucket=48))  # two tensors


def test_every_engine_has_all_tensors_each_time(small_buckets: None) -> None:
    engines, tensors = Engines(), dict(TENSORS)
    sender = make_sender(engines, tensors)
    for _ in range(2):
        sender.send()
        for model in engines.models:
            assert list(model.loaded) == list(TENSORS)
            assert all(torch.equal(model.loaded[name], tensor) for name, tensor in tensors.items())
            model.loaded.clear()
        tensors |= {name: tensor + 1 for name, tensor in tensors.items()}
    assert engines.calls == ["start", "finish"] * 2


def test_a_bucket_that_comes_damaged_is_named_and_the_next_version_arrives(
    small_buckets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is loaded from it on, and all that was sent is received: else the next would hang."""
    engines = Engines()
    sender = make_sender(engines, TENSORS)
    right, learner, sent = gloo.digest, threading.current_thread(), []

    def wrong_in_the_second(flat: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is not learner:
            return right(flat)
        sent.append(1)
        return right(flat) ^ 1 if len(sent) == 2 else right(flat)

    with monkeypatch.context() as patch:
        patch.setattr(gloo, "digest", wrong_in_the_second)
        sender.send()
    why = "bucket 1 (layer.2 to layer.3): its digest is not the one that was sent"
    assert [one.damaged for one in engines.receivers] == [why] * 2
    assert len(sent) == 3 and [list(model.loaded) for model in engines.models] == [["layer.0", "layer.1"]] * 2
    sender.send()
    assert [one.damaged for one in engines.receivers] == ["", ""]
    assert all(torch.equal(model.loaded[name], TENSORS[name]) for model in engines.models for name in TENSORS)


def test_a_model_that_does_not_take_a_tensor_lets_nobody_wait(small_buckets: None) -> None:
    engines = Engines()
    sender = make_sender(engines, TENSORS)
    engines.models[0].refused = "layer.2"
    sender.send()
    why = "bucket 1 (layer.2 to layer.3): the model did not take it, KeyError: 'layer.2'"
    assert [one.damaged for one in engines.receivers] == [why, ""]
    assert list(engines.models[0].loaded) == ["layer.0", "layer.1"] and list(engines.models[1].loaded) == list(TENSORS)
    engines.models[0].refused = ""
    sender.send()
    assert [one.damaged for one in engines.receivers] == ["", ""]
