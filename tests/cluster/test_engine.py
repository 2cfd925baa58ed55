"""The engine on one rank and on two: every ZeRO stage is plain AdamW, and its state opens anywhere.

Real processes over gloo on the loopback. One start per number of ranks runs all stages, so imports are paid once.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_cluster.config import EngineConfig, OptimizerConfig
from rlhf_cluster.engine.average import WeightAverage
from rlhf_cluster.engine.engine import EngineError, TrainEngine
from rlhf_cluster.engine.ranks import Ranks, join_ranks
from rlhf_cluster.learner.state import load_state, save_state
from rlhf_cluster.telemetry.quiet import quiet_libraries

STAGES, DTYPES = (0, 1, 2, 3), ("float32", "bfloat16")
CASES = [(world, stage, dtype) for world in (1, 2) for stage in STAGES for dtype in DTYPES]
LR, CLIP, STEPS, SAVED_AFTER = 1e-2, 1.0, 4, 2
OPTIMIZER = OptimizerConfig(lr=LR, betas=(0.9, 0.95), max_grad_norm=CLIP)


def network() -> torch.nn.Module:
    """Biases of 15 and 1 entries, which two ranks do not divide."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 15), torch.nn.Tanh(), torch.nn.Linear(15, 1))


def problem() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A batch of eight rows for each step."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 8, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(STEPS)]


def plain_adamw() -> tuple[torch.nn.Module, list[float]]:
    """Four steps of torch's own AdamW on the whole batch; the gradient norms before clipping."""
    model, norms = network(), []
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.0)
    for inputs, targets in problem():
        optimizer.zero_grad()
        (model(inputs) - targets).square().sum().div(8).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return model, norms


def start(stage: int, dtype: str, ranks: Ranks) -> TrainEngine:
    return TrainEngine(network(), EngineConfig(zero_stage=stage), OPTIMIZER, getattr(torch, dtype), ranks)


def advance(engine: TrainEngine, steps: range, lr: float = LR) -> list[float]:
    """This rank's rows in micro-batches of at most three, which are of unequal size."""
    ranks, norms = engine.ranks, []
    for inputs, targets in problem()[steps.start : steps.stop]:
        own = zip(inputs[ranks.rank :: ranks.world].split(3), targets[ranks.rank :: ranks.world].split(3), strict=True)
        for some, wanted in own:
            engine.backward((engine(some.to(engine.dtype)).float() - wanted).square().sum() / 8)
        norms.append(engine.step(lr))
    return norms


def weights(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in engine.full_parameters()}


def masters(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: state["master"].clone() for name, state in engine.full_state()}


def distance(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    return max(float((some[name].float() - others[name].detach().float()).abs().max()) for name in others)


def averaged(stage: int, dtype: str, ranks: Ranks, state: Path) -> dict[str, float]:
    """Four steps with an average of half and half, kept beside by hand; saved after the last, and opened again."""
    engine = start(stage, dtype, ranks)
    average, by_hand = WeightAverage(engine, 0.5), masters(engine)
    for step in range(STEPS):
        advance(engine, range(step, step + 1))
        average.update()
        by_hand = {name: 0.5 * by_hand[name] + 0.5 * now for name, now in masters(engine).items()}
    before, kept = masters(engine), {name: tensor.clone() for name, tensor in average.full()}
    save_state({"policy": engine}, state, ranks, average)
    again = start(stage, dtype, ranks)
    average_again = WeightAverage(again, 0.5)
    load_state({"policy": again}, state, average_again)
    return {
        "average": distance(kept, by_hand),
        "apart": distance(kept, before),
        "moved_by_a_look": distance(masters(engine), before),
        "average_again": distance({name: t.clone() for name, t in average_again.full()}, kept),
        "weights_again": distance(weights(again), weights(engine)),
    }


def scaled(stage: int, dtype: str, ranks: Ranks) -> dict[str, float]:
    """A step on a hundredth of a gradient that is a hundred times too great, after one that was forgotten."""
    plain, engine = start(stage, dtype, ranks), start(stage, dtype, ranks)
    expected = advance(plain, range(1))[0]
    begun = masters(engine)
    engine.backward(engine(torch.ones(1, 8, dtype=engine.dtype)).float().sum())
    engine.forget_gradient()
    moved_by_forgetting = distance(masters(engine), begun)
    inputs, targets = (rows[ranks.rank :: ranks.world] for rows in problem()[0])
    engine.backward(100 * (engine(inputs.to(engine.dtype)).float() - targets).square().sum() / 8)
    norm = engine.step_within(LR, math.inf, 0.01)
    again = advance(engine, range(1, 2))[0]
    return {
        "moved_by_forgetting": moved_by_forgetting,
        "scaled_norm_error": abs(norm - expected) / expected,
        "next_norm_error": abs(again - advance(plain, range(1, 2))[0]) / again,
        "scaled_distance": distance(masters(engine), masters(plain)),
        "steps_by_forgetting": engine.optimizer_steps - plain.optimizer_steps,
    }


def language_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes))


def recomputed(stage: int, dtype: str, ranks: Ranks) -> dict[str, Any]:
    """Two steps with layers that are computed again, beside two with what they computed kept: calls of a layer's MLP,
    norms and masters."""
    found = []
    ids = torch.arange(24).view(2, 12) + ranks.rank
    for again in (False, True):
        cfg = EngineConfig(zero_stage=stage, activation_checkpointing=again)
        model, calls = language_model(), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        engine = TrainEngine(model, cfg, OPTIMIZER, getattr(torch, dtype), ranks)
        norms = []
        for _ in range(2):
            for row in ids:
                logits = engine(input_ids=row[None], use_cache=False).logits[0].float()
                engine.backward(torch.nn.functional.cross_entropy(logits[:-1], row[1:]) / 2 / ranks.world)
            norms.append(engine.step(LR))
        found.append((len(calls), norms, masters(engine)))
    (kept_calls, kept_norms, kept), (calls_again, norms_again, masters_again) = found
    return {
        "calls": [kept_calls, calls_again],
        "recomputed_norm_error": max(abs(a - b) / b for a, b in zip(norms_again, kept_norms, strict=True)),
        "recomputed_distance": distance(masters_again, kept),
    }


def one_case(stage: int, dtype: str, ranks: Ranks, state: Path) -> dict[str, Any]:
    reference, expected_norms = plain_adamw()
    engine = start(stage, dtype, ranks)
    begun = masters(engine)
    norms = advance(engine, range(SAVED_AFTER))
    save_state({"net": engine}, state, ranks)
    norms += advance(engine, range(SAVED_AFTER, STEPS))
    again = start(stage, dtype, ranks)
    load_state({"net": again}, state)
    steps = again.optimizer_steps
    advance(again, range(SAVED_AFTER, STEPS))
    broken = start(stage, dtype, ranks)
    broken.backward(broken(torch.full((1, 8), math.nan, dtype=broken.dtype)).float().sum())
    try:
        broken.step(LR)
        refused = "nothing"
    except EngineError as error:
        refused = str(error)
    spiked = start(stage, dtype, ranks)
    advance(spiked, range(1))
    before_spike, steps_before = dict(spiked.full_state()), spiked.optimizer_steps
    before_spike = {name: {key: t.clone() for key, t in state.items()} for name, state in before_spike.items()}
    spiked.backward(1000.0 * spiked(torch.ones(1, 8, dtype=spiked.dtype)).float().sum())
    spike = spiked.step_within(LR, 10.0)
    moved_by_spike = max(distance(state, before_spike[name]) for name, state in spiked.full_state())
    calm = advance(spiked, range(1, 2))[0]
    tiny_steps = start(stage, dtype, ranks)
    advance(tiny_steps, range(STEPS), lr=1e-6)
    return {
        "distance": distance(weights(engine), dict(reference.named_parameters())),
        "norm_error": max(abs(a - b) / b for a, b in zip(norms, expected_norms, strict=True)),
        "refused": refused,
        "spike": spike,
        "moved_by_spike": moved_by_spike,
        "steps_by_spike": spiked.optimizer_steps - steps_before,
        "calm_error": abs(calm - norms[1]) / norms[1],
        "moved_by_nan": distance(begun, masters(broken)),
        "rounded_at_start": distance(begun, dict(network().named_parameters())),
        "moved": distance(begun, masters(engine)),
        "moved_by_tiny_steps": distance(begun, masters(tiny_steps)),
        "resumed": distance(masters(again), masters(engine)),
        "resumed_weights": distance(weights(again), weights(engine)),
        "steps": steps,
    }


def one_rank_of(rank: int, world: int, port: int, directory: str) -> None:
    """What each spawned process runs: all stages, then the state that one rank left at stage 0."""
    quiet_libraries()
    ranks, found = join_ranks(rank, world, "127.0.0.1", port, 60), {}
    for stage in STAGES:
        for dtype in DTYPES:
            place = Path(directory, f"{world}-{stage}-{dtype}")
            case = one_case(stage, dtype, ranks, place) | scaled(stage, dtype, ranks) | recomputed(stage, dtype, ranks)
            found[f"{stage} {dtype}"] = case | averaged(stage, dtype, ranks, place / "average")
    for stage in STAGES:
        engine = start(stage, "float32", ranks)
        load_state({"net": engine}, Path(directory, "1-0-float32"))
        advance(engine, range(SAVED_AFTER, STEPS))
        found[f"{stage} from 1-0"] = distance(weights(engine), dict(plain_adamw()[0].named_parameters()))
    if rank == 0:
        Path(directory, f"found-{world}.json").write_text(json.dumps(found))
    ranks.gather(None)  # nobody is asked for anything after this
    os._exit(0)  # gloo's threads would now and then abort an interpreter that takes itself down


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def found(states: Path) -> dict[int, dict[str, Any]]:
    """By number of ranks, what each case found. Two ranks come last, for they open what one has left."""
    for world in (1, 2):
        multiprocessing.spawn(one_rank_of, (world, free_port(), str(states)), nprocs=world)
    return {world: json.loads((states / f"found-{world}.json").read_text()) for world in (1, 2)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(("world", "stage", "dtype"), CASES)
def test_a_stage_is_plain_adamw(found: dict[int, Any], world: int, stage: int, dtype: str) -> None:
    case = found[world][f"{stage} {dtype}"]
    assert case["moved"] > 0.03  # four steps of 0.01: not the same weights because nothing was learnt
    if dtype == "float32":
        assert case["distance"] < 1e-6 and case["norm_error"] < 1e-5
    else:
        assert case["distance"] < 5e-3 and case["norm_error"] < 5e-3


@pytest.mark.parametrize(("world", "stage"), [(world, stage) for world in (1, 2) for stage in STAGES])
def test_bfloat16_keeps_float32_masters(found: dict[int, Any], world: int, stage: int) -> None:
    """Steps of 1e-6 on weights of about 0.3 are lost in bfloat16, whose neighbours there lie 1e-3 apart."""
    assert 2e-6 < found[world][f"{stage} bfloat16"]["moved_by_tiny_steps"] < 5e-6


@pytest.mark.parametrize(("world", "stage", "dtype"), CASES)
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_said(
    found: dict[int, Any], world: int, stage: int, dtype: str
) -> None:
    case = found[world][f"{stage} {dtype}"]
    assert re.match(r"the gradient norm is (nan|inf|-inf), so no step was taken", case["refused"]), case["refused"]
    assert case["moved_by_nan"] == 0.0


@pytest.mark.parametrize(("world", "stage", "dtype"), CASES)
def test_a_gradient_beyond_the_limit_moves_nothing_and_the_next_step_is_as_ever(
    found: dict[int, Any], world: int, stage: int, dtype: str
) -> None:
    """Neither weights nor moments, and of the two steps one is counted."""
    case = found[world][f"{stage} {dtype}"]
    assert case["spike"] > 10.0
    assert case["moved_by_spike"] == 0.0 and case["steps_by_spike"] == 1
    assert case["calm_error"] < (1e-5 if dtype == "float32" else 5e-3)


@pytest.mark.parametrize(("world", "stage", "dtype"), CASES)
def test_a_step_may_be_on_the_gradient_times_a_number(
    found: dict[int, Any], world: int, stage: int, dtype: str
) -> None:
    """Norm and clipping are those of what the step is made on, and the next gradient is as it comes."""
    case = found[world][f"{stage} {dtype}"]
    rounding = 1e-5 if dtype == "float32" else 2e-2
    assert case["scaled_norm_error"] < rounding and case["next_norm_error"] < rounding
    if dtype == "float32":  # else AdamW takes the sign of what rounding leaves of small gradients
        assert case["scaled_distance"] < 1e-6


@pytest.mark.parametrize(("world", "stage", "dtype"), CASES)
def test_a_gradient_that_is_forgotten_leaves_nothing(found: dict[int, Any], world: int, stage: int, dtype: str) -> None:
    case = found[world][f"{stage} {dtype}"]
    assert (case["moved_by_forgetting"], case["steps_by_forgetting"]) == (0.0, 0)


@pytest.mark.parametrize(("world", "stage", "dtype"), CASES)
def test_layers_that_are_computed_again_give_the_same_steps(
    found: dict[int, Any], world: int, stage: int, dtype: str
) -> None:
    """Two steps of two micro-batches: a layer runs four times, or twice as often."""
    case = found[world][f"{stage} {dtype}"]
    assert case["calls"] == [4, 8]
    assert (case["recomputed_norm_error"], case["recomputed_distance"]) == (0.0, 0.0)


@pytest.mark.parametrize(("world", "stage", "dtype"), CASES)
def test_masters_begin_as_the_weights_came(found: dict[int, Any], world: int, stage: int, dtype: str) -> None:
    """On bfloat16's own values they would have to move by half of 1e-3 before the model changed at all."""
    assert found[world][f"{stage} {dtype}"]["rounded_at_start"] == 0.0


@pytest.mark.parametrize(("world", "stage", "dtype"), CASES)
def test_a_saved_state_goes_on_exactly(found: dict[int, Any], world: int, stage: int, dtype: str) -> None:
    case = found[world][f"{stage} {dtype}"]
    assert (case["resumed"], case["resumed_weights"], case["steps"]) == (0.0, 0.0, SAVED_AFTER)


@pytest.mark.parametrize(("world", "stage", "dtype"), CASES)
def test_an_average_is_that_of_the_masters(found: dict[int, Any], world: int, stage: int, dtype: str) -> None:
    case = found[world][f"{stage} {dtype}"]
    assert case["average"] < 1e-7 < 1e-3 < case["apart"]
    assert (case["moved_by_a_look"], case["average_again"], case["weights_again"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_of_one_rank_opens_on_two(found: dict[int, Any], stage: int) -> None:
    assert found[2][f"{stage} from 1-0"] < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_of_two_ranks_opens_on_one_at_stage_0(
    found: dict[int, Any], states: Path, one_rank: Ranks, stage: int
) -> None:
    engine = start(0, "float32", one_rank)
    load_state({"net": engine}, states / f"2-{stage}-float32")
    assert engine.optimizer_steps == SAVED_AFTER
    advance(engine, range(SAVED_AFTER, STEPS))
    assert distance(weights(engine), dict(plain_adamw()[0].named_parameters())) < 1e-6
