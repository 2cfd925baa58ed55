"""One model under DeepSpeed: forward, backward, step, and its full weights and optimizer state by parameter name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from transformers import PreTrainedModel

from rlhf_cluster.config import EngineConfig, OptimizerConfig
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.engine.settings import deepspeed_settings, effective_stage

MOMENTS = ("exp_avg", "exp_avg_sq")
FINITE = sys.float_info.max
GATHERED = 32 << 20
NEVER = -1.0  # a limit that every norm is above


class EngineError(RuntimeError):
    """A step that must not be taken."""


class TrainEngine:
    """A module under DeepSpeed at any ZeRO stage, computing in `dtype` over fp32 masters.

    The masters are the module's weights as they come: what they hold beyond `dtype` is kept. Masters that all begin on
    bfloat16's own values would have to move by half a step of it, some ten updates at a usual learning rate, before the
    model that is computed with changed at all.

    `backward` takes (sum over this rank's tokens) / (tokens of the global minibatch): the engine multiplies by the
    number of ranks, which DeepSpeed's averaging takes out again, so neither ranks nor micro-batches change the
    gradient. Every rank calls `forward`, `backward`, `step`, `full_parameters` and the state methods equally often.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        dtype: torch.dtype,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.dtype = dtype
        self.stage = effective_stage(engine.zero_stage, dtype)
        self._max_grad_norm = optimizer.max_grad_norm
        self._grad_norm = math.nan
        self._limit, self._scale = FINITE, 1.0
        self._offloads = engine.offload_optimizer
        self._withheld: list[tuple[torch.Tensor, torch.Tensor]] = []
        adamw = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=optimizer.lr,
            betas=tuple(optimizer.betas),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        settings = deepspeed_settings(engine, optimizer, dtype, ranks.world)
        if engine.activation_checkpointing:
            _recompute_layers(module)
        begun = _masters_beyond(dtype, module)
        _cast_parameters(module, dtype)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=settings)
        self._adamw: torch.optim.AdamW = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        self._adamw.register_step_pre_hook(self._guard)
        self._reset_moments()
        for name, parameter in self._learning():
            if name in begun:
                self._set_master(parameter, begun.pop(name).float())

    def _guard(self, *_: Any) -> None:
        """Runs after the gradients are reduced and before the weights move: the norm is that of all ranks. Parameters
        without a gradient are passed over by AdamW, moments included."""
        parameters = [p for group in self._adamw.param_groups for p in group["params"]]
        if self.stage == 0:
            if self._scale != 1.0:
                torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], self._scale)
            limit = self._max_grad_norm if self._max_grad_norm > 0 else math.inf
            self._grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        else:
            self._grad_norm = float(self._engine.optimizer._global_grad_norm)
        if not self._grad_norm <= self._limit:
            self._withheld = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
            for parameter in parameters:
                parameter.grad = None

    def _give_back(self) -> None:
        """The buffers of a gradient that was withheld: where the optimizer is offloaded DeepSpeed makes them once, and
        copies into them for ever."""
        for parameter, gradient in self._withheld if self._offloads else ():
            parameter.grad = gradient.zero_()
        self._withheld = []

    def _reset_moments(self) -> None:
        """Optimizer state exists from the start, at step 0 for every stage (stage 3 would begin at step 1)."""
        optimized = self._optimized()
        self._adamw.state.clear()
        for p in optimized:
            self._adamw.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                **{name: torch.zeros_like(p.data) for name in MOMENTS},
            }
        if self.stage in (1, 2):
            # DeepSpeed links the moments to the parameters after its first step; a loaded state is needed before.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _learning(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters that are not frozen, by name."""
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def _optimized(self) -> list[torch.Tensor]:
        """What this rank's AdamW steps on: the parameters, or from stage 1 on the fp32 share that this rank holds."""
        if self.stage == 3:  # hands its partitions to AdamW one by one while it steps, so the groups look empty
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._adamw.param_groups for p in group["params"]]

    def local_masters(self) -> list[torch.Tensor]:
        """The fp32 masters that this rank holds, as they lie in memory."""
        return [master.detach() for master in self._optimized()]

    @property
    def module(self) -> torch.nn.Module:
        return self._engine.module

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self._engine(*inputs, **named)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss * self.ranks.world, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """One optimizer step at learning rate `lr`; returns the all-rank gradient norm before clipping.

        Raises EngineError where that is not finite; no weight has moved then.
        """
        norm = self.step_within(lr, FINITE)
        if not math.isfinite(norm):
            raise EngineError(
                f"the gradient norm is {norm}, so no step was taken; look at the batch's scores and rewards, lower lr"
            )
        return norm

    def step_within(self, lr: float, limit: float, scale: float = 1.0) -> float:
        """As `step`, on the gradient times `scale`, but where the norm is above `limit` or not finite no weight and no
        moment has moved, and nothing is raised."""
        self._limit, self._scale = min(limit, FINITE), scale
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        with self._scaled_by(scale):
            self._engine.step()
        self._give_back()
        return self._grad_norm if self.stage == 0 else float(self._engine.get_global_grad_norm())

    @contextmanager
    def _scaled_by(self, scale: float) -> Iterator[None]:
        """Around a step: the gradient is this many times what `backward` left, before DeepSpeed takes its norm. At
        stage 0 that is done in `_guard`."""
        optimizer = self._engine.optimizer
        if isinstance(optimizer, BF16_Optimizer):  # stage 1 in bfloat16: it knows no loss scale
            torch._foreach_mul_(optimizer.fp32_groups_gradients_flat, scale)
            yield
        elif self.stage > 0:
            optimizer.loss_scale = 1 / scale  # what DeepSpeed divides by, and multiplies losses with
            yield
            optimizer.loss_scale = 1.0
        else:
            yield

    def forget_gradient(self) -> None:
        """As if there had been no `backward`. A collective."""
        self.step_within(0.0, NEVER)

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full tensor in the training dtype) of every parameter, of which at stage 3 about `GATHERED` bytes are
        gathered at once. A collective at stage 3."""
        if self.stage < 3:
            yield from ((name, parameter.detach()) for name, parameter in self.module.named_parameters())
            return
        for together in self._buckets():
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in together]):
                full = [(name, parameter.detach().clone()) for name, parameter in together]
            yield from full

    def _buckets(self) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
        together: list[tuple[str, torch.nn.Parameter]] = []
        size = 0
        for name, parameter in self.module.named_parameters():
            together.append((name, parameter))
            size += parameter.ds_numel * parameter.element_size()
            if size >= GATHERED:
                yield together
                together, size = [], 0
        yield together

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors of `full_parameters`, in their order."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.module.named_parameters()}

    def _full(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if self.stage < 3:
            return parameter.detach()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def weights_on_rank_0(self) -> dict[str, torch.Tensor]:
        """All of `full_parameters` in host memory on rank 0, nothing on the others. A collective at stage 3."""
        return self._on_rank_0(self.full_parameters())

    def learning_on_rank_0(self) -> dict[str, torch.Tensor]:
        """As `weights_on_rank_0`, of the parameters that learn alone."""
        return self._on_rank_0((name, self._full(parameter)) for name, parameter in self._learning())

    def masters_on_rank_0(self) -> dict[str, torch.Tensor]:
        """The fp32 masters in host memory on rank 0, nothing on the others. A collective."""
        return self._on_rank_0(self.full_masters())

    def full_masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full fp32 master) of every parameter, one at a time; a frozen one has none and is given as it is. A
        collective."""
        for name, parameter in self.module.named_parameters():
            yield name, self._master(parameter)

    def _on_rank_0(self, named: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: tensor.cpu() for name, tensor in named if self.ranks.rank == 0}

    @property
    def optimizer_steps(self) -> int:
        return int(next(iter(self._adamw.state.values()))["step"])

    def full_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """(name, {master, exp_avg, exp_avg_sq} in fp32) of every parameter that learns, independent of stage and world
        size."""
        for name, parameter in self._learning():
            if self.stage == 0:
                moments = {key: self._adamw.state[parameter][key] for key in MOMENTS}
            else:
                moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            yield name, {"master": self._master(parameter), **moments}

    def _master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if self.stage == 0 or not parameter.requires_grad:
            return self._full(parameter)
        return safe_get_full_fp32_param(parameter)

    def load_full_state(self, state_of: Callable[[str], Mapping[str, torch.Tensor]], optimizer_steps: int) -> None:
        """Restores what `full_state` gave. `state_of(name)` returns the three fp32 tensors of a parameter."""
        self.load_full_masters(lambda name: state_of(name)["master"])
        for name, parameter in self._learning():
            state = state_of(name)
            for key in MOMENTS:
                self._set_moment(parameter, key, state[key])
        for moments in self._adamw.state.values():
            moments["step"].fill_(optimizer_steps)

    def load_full_masters(self, master_of: Callable[[str], torch.Tensor]) -> None:
        """Restores what `full_masters` gave of what learns, and the weights that are computed with."""
        for name, parameter in self._learning():
            self._set_master(parameter, master_of(name))

    def _set_master(self, parameter: torch.nn.Parameter, full: torch.Tensor) -> None:
        """The master, and the working copy rounded from it."""
        if self.stage < 3:
            parameter.data.copy_(full)
            if self.stage > 0:
                safe_set_full_fp32_param(parameter, full)
        else:
            own = self._own_slice(parameter, full)
            parameter.ds_tensor.data.copy_(own.view_as(parameter.ds_tensor))
            safe_set_local_fp32_param(parameter, own)

    def _set_moment(self, parameter: torch.nn.Parameter, key: str, full: torch.Tensor) -> None:
        if self.stage == 0:
            self._adamw.state[parameter][key].copy_(full)
        elif self.stage < 3:
            safe_set_full_optimizer_state(parameter, full, key)
        else:
            safe_set_local_optimizer_state(parameter, self._own_slice(parameter, full), key)

    def _own_slice(self, parameter: torch.nn.Parameter, full: torch.Tensor) -> torch.Tensor:
        """Stage 3: what this rank holds of a parameter. DeepSpeed's own setters for full tensors fail on sizes that
        ranks do not divide."""
        size = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(full.flatten(), (0, size * self.ranks.world - full.numel()))
        return padded.narrow(0, size * self.ranks.rank, size)


def _recompute_layers(module: torch.nn.Module) -> None:
    """In the backward pass, instead of keeping what they computed. transformers does so in training mode alone, in
    which no dropout of its own is left on."""
    for model in module.modules():
        if isinstance(model, PreTrainedModel):
            if not model.supports_gradient_checkpointing:
                raise EngineError(
                    f"{type(model).__name__} cannot recompute its layers; use activation_checkpointing=false"
                )
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()


def _masters_beyond(dtype: torch.dtype, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that `dtype` would round, as they are before the module is cast (which leaves this storage alone)."""
    if dtype == torch.float32:
        return {}
    return {name: p.detach() for name, p in module.named_parameters() if p.dtype != dtype and p.requires_grad}


def _cast_parameters(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Buffers stay as they are: rotary frequencies rounded to bfloat16 turn by another angle than those of vLLM, the
    reference and the scorers, the more so the later the position."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
