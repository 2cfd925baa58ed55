"""What DeepSpeed is told: derived from our config, and nothing that it would silently ignore."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime import constants
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
from pydantic import BaseModel

from rlhf_cluster.config import EngineConfig, OptimizerConfig
from rlhf_cluster.engine.settings import deepspeed_settings, effective_stage

STAGES, DTYPES = (0, 1, 2, 3), (torch.float32, torch.bfloat16)
CASES = [(stage, dtype, offload) for stage in STAGES for dtype in DTYPES for offload in (False, True)]


def settings(stage: int, dtype: torch.dtype = torch.float32, offload: bool = False, world: int = 2) -> dict[str, Any]:
    cfg = EngineConfig(zero_stage=stage, offload_optimizer=offload)
    return deepspeed_settings(cfg, OptimizerConfig(max_grad_norm=0.5), dtype, world)


def test_stage_0_in_bfloat16_runs_as_stage_1() -> None:
    assert [effective_stage(stage, torch.bfloat16) for stage in STAGES] == [1, 1, 2, 3]
    assert [effective_stage(stage, torch.float32) for stage in STAGES] == [0, 1, 2, 3]
    assert settings(0, torch.bfloat16)["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_accumulates_in_float32(stage: int) -> None:
    told = settings(stage, torch.bfloat16)
    assert told["bf16"] == {"enabled": True} and told["data_types"] == {"grad_accum_dtype": "fp32"}
    assert not {"bf16", "data_types"} & settings(stage).keys()


def test_stage_0_is_clipped_by_us_and_the_others_by_deepspeed() -> None:
    assert [settings(stage)["gradient_clipping"] for stage in STAGES] == [0.0, 0.5, 0.5, 0.5]
    assert settings(0, torch.bfloat16)["gradient_clipping"] == 0.5


def test_stage_3_partitions_small_layers_too() -> None:
    assert settings(3)["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert "stage3_param_persistence_threshold" not in settings(2)["zero_optimization"]


@pytest.mark.parametrize("world", [1, 2, 8])
def test_batch_sizes_agree_as_deepspeed_demands(world: int) -> None:
    told = settings(2, world=world)
    micro, accumulation = told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"]
    assert told["train_batch_size"] == micro * accumulation * world


def known_names() -> set[str]:
    """Every top-level key that DeepSpeed's own source reads: constants of its config modules and literals."""
    values = {
        value for module in (constants, deepspeed_config) for value in vars(module).values() if isinstance(value, str)
    }
    return values | set(re.findall(r'["\']([a-z_0-9]+)["\']', inspect.getsource(deepspeed_config)))


def field_names(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield from (name, *([field.alias] if field.alias else []))


def unknown(told: Mapping[str, Any]) -> set[str]:
    zero = told["zero_optimization"]
    strange = {f"zero_optimization.{name}" for name in zero.keys() - set(field_names(DeepSpeedZeroConfig))}
    offload = zero.get("offload_optimizer", {}).keys() - set(field_names(DeepSpeedZeroOffloadOptimizerConfig))
    return strange | {f"offload_optimizer.{name}" for name in offload} | (told.keys() - known_names())


@pytest.mark.parametrize(("stage", "dtype", "offload"), CASES)
def test_deepspeed_knows_every_key(stage: int, dtype: torch.dtype, offload: bool) -> None:
    """It ignores unknown keys at the top without a word, and a renamed one would change training."""
    assert unknown(settings(stage, dtype, offload)) == set()


def test_an_unknown_key_would_be_seen() -> None:
    told = settings(3) | {"gradient_cliping": 1.0}
    told["zero_optimization"]["stage_3"] = 1
    assert unknown(told) == {"gradient_cliping", "zero_optimization.stage_3"}
