"""Loaded by vLLM in each of its processes, through the entry point `vllm.general_plugins`: makes our backends known,
and ties an engine's process to the worker that started it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

BACKEND = "rlhf_cluster"  # of every engine
DIRECT = {"gloo": "rlhf_cluster_gloo", "nccl": "nccl", "ipc": "ipc"}  # `weights.transport` -> the engine that ours asks


def register() -> None:
    """May be called several times in one process; the first call counts."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "rlhf_cluster.weights.receiver", "Receiver")
        WeightTransferEngineFactory.register_engine(DIRECT["gloo"], "rlhf_cluster.weights.gloo", "GlooReceiver")
        WeightTransferTrainerFactory.register_engine(DIRECT["gloo"], "rlhf_cluster.weights.gloo", "GlooSender")
        end_with_parent()


def end_with_parent() -> None:
    """In a process that `multiprocessing` started: ends it when its parent is gone, however that ended.

    vLLM's engine process waits for requests and would outlive a worker that was killed, with all its memory; while it
    starts it does not even take SIGTERM.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_await_end, args=(parent.sentinel,), name="end-with-parent", daemon=True).start()


def _await_end(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
