"""Loaded by vLLM in each of its processes, through the entry point `vllm.general_plugins`: makes our backend known."""

from __future__ import annotations

BACKEND = "rlhf_cluster_shm"


def register() -> None:
    """May be called several times in one process; the first call counts."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "rlhf_cluster.weights.receiver", "SharedMemoryReceiver")
