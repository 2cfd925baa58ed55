"""DeepSpeed's configuration, derived from ours and never kept by hand."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_cluster.config import EngineConfig, OptimizerConfig


def effective_stage(zero_stage: int, dtype: torch.dtype) -> int:
    """Stage 0 in bfloat16 would accumulate gradients in bfloat16 without fp32 masters: it runs as stage 1."""
    return 1 if zero_stage == 0 and dtype == torch.bfloat16 else zero_stage


def deepspeed_settings(
    engine: EngineConfig, optimizer: OptimizerConfig, dtype: torch.dtype, world: int
) -> dict[str, Any]:
    """The JSON tree that `deepspeed.initialize` takes.

    Batch sizes are nominal: `managed_gradient_accumulation` is off, so that the caller's `step` is the boundary and the
    loss alone decides the weight of a token. Clipping at stage 0 is ours (see `TrainEngine`): DeepSpeed clips there
    without saying what the norm was.
    """
    stage = effective_stage(engine.zero_stage, dtype)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.max_grad_norm if stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "reduce_scatter": stage == 3},
    }
    if stage == 3:
        # Small layers stay gathered by default, which would leave a tiny model unpartitioned and stage 3 untested.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if engine.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
