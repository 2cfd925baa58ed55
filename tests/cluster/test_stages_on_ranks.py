"""SFT, reward model and DPO on one rank, on two and on four, at one ZeRO stage or another: the same weights.

Real processes over gloo on the loopback, float32. What differs is the order in which sums are added up.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file

from rlhf_cluster import dpo, rm, sft
from rlhf_cluster.config import DPOConfig, EngineConfig, ModelConfig, OptimizerConfig, RMConfig, SFTConfig
from rlhf_cluster.engine.ranks import join_ranks
from rlhf_cluster.records import Comparisons, Demonstrations, Pretraining
from rlhf_cluster.telemetry.quiet import quiet_libraries

GANGS = [(1, 0), (2, 0), (2, 2), (2, 3), (4, 1)]  # ranks, ZeRO stage; the first is what the others are held against
STAGES = (sft.STAGE, rm.STAGE, dpo.STAGE)
MODEL = ModelConfig(source="tiny", dtype="float32", attention="eager", context=40)
OPTIMIZER = OptimizerConfig(lr=1e-3, max_grad_norm=0.5)
TOLERANCE = 5e-5  # Adam makes a share of a step, 1e-3, of what a gradient near 0 is off by; 1.4e-5 was seen
EOS = 258


def demonstrations(rng: np.random.Generator, count: int = 13) -> Demonstrations:
    return Demonstrations.of(
        {
            "prompt_id": [f"d{i}" for i in range(count)],
            "prompt_ids": [rng.integers(0, 256, rng.integers(1, 12)).tolist() for _ in range(count)],
            "response_ids": [[*rng.integers(0, 256, rng.integers(0, 9)).tolist(), EOS] for _ in range(count)],
        }
    )


def comparisons(rng: np.random.Generator, count: int = 11) -> Comparisons:
    """Of two to five responses, so that ranks have unequal shares; a few tie."""
    sizes = rng.integers(2, 6, count)
    return Comparisons.of(
        {
            "prompt_id": [f"p{i}" for i in range(count)],
            "prompt_ids": [rng.integers(0, 256, rng.integers(1, 9)).tolist() for _ in range(count)],
            "responses": [
                [[*rng.integers(0, 256, rng.integers(1, 12)).tolist(), EOS] for _ in range(n)] for n in sizes
            ],
            "ranks": [[1, *rng.integers(1, 4, n - 2).tolist(), 4] for n in sizes],
        }
    )


def train(ranks, zero_stage: int, policy: Path, output: Path) -> None:  # type: ignore[no-untyped-def]
    """All three stages of this rank; seven rows of text are mixed into SFT."""
    rng = np.random.default_rng(0)
    engine = EngineConfig(zero_stage=zero_stage, tokens_per_micro_batch=50)
    shown, ranked, heldout = demonstrations(rng), comparisons(rng), comparisons(rng, 5)
    text = Pretraining.of({"token_ids": [rng.integers(0, 256, 40).tolist() for _ in range(7)]})
    of_sft = SFTConfig(epochs=2, batch_size=3, pretraining_share=0.25, optimizer=OPTIMIZER, engine=engine)
    of_rm = RMConfig(epochs=2, batch_size=4, optimizer=OPTIMIZER, engine=engine)
    of_dpo = DPOConfig(epochs=2, batch_size=4, beta=0.5, optimizer=OPTIMIZER, engine=engine)
    jobs = (
        (sft, sft.SFTJob(of_sft, MODEL, 4, policy, shown, output / sft.STAGE, text)),
        (rm, rm.RMJob(of_rm, MODEL, 4, policy, ranked, heldout, shown, output / rm.STAGE)),
        (dpo, dpo.DPOJob(of_dpo, MODEL, 4, policy, ranked, heldout, output / dpo.STAGE)),
    )
    for stage, job in jobs:
        stage.train(ranks, job, lambda step, metrics: None)  # type: ignore[attr-defined]


def place(directory: Path, gang: tuple[int, int]) -> Path:
    return directory / f"ranks-{gang[0]}-zero-{gang[1]}"


def one_rank_of(rank: int, world: int, port: int, policy: str, directory: str) -> None:
    """What each spawned process runs: every ZeRO stage for this number of ranks, so imports are paid once."""
    quiet_libraries()
    ranks = join_ranks(rank, world, "127.0.0.1", port, 60)
    for gang in GANGS:
        if gang[0] == world:
            train(ranks, gang[1], Path(policy), place(Path(directory), gang))
    ranks.gather(None)  # nobody is asked for anything after this
    os._exit(0)  # gloo's threads would now and then abort an interpreter that takes itself down


@pytest.fixture(scope="module")
def trained(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stages")
    for world in dict.fromkeys(world for world, _ in GANGS):
        multiprocessing.spawn(one_rank_of, (world, free_port(), str(policy), str(directory)), nprocs=world)
    return directory


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def weights(model: Path) -> dict[str, torch.Tensor]:
    """By name within the body, which a policy keeps under `model` and a reward model does not."""
    return {name.removeprefix("model."): tensor for name, tensor in load_file(model / "model.safetensors").items()}


def distance(some: Path, other: Path) -> float:
    mine, theirs = weights(some), weights(other)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in theirs)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_and_zero_stages_agree(trained: Path, policy: Path, stage: str) -> None:
    first = place(trained, GANGS[0]) / stage
    apart = {gang: distance(place(trained, gang) / stage, first) for gang in GANGS[1:]}
    assert max(apart.values()) < TOLERANCE, apart
    before, after = weights(policy), weights(first)
    moved = max(float((after[name] - before[name]).abs().max()) for name in before.keys() & after.keys())
    assert moved > 1e-3, "weights that never moved would agree too"


@pytest.mark.long
def test_ranks_agree_on_the_held_out_pairs(trained: Path) -> None:
    told: Mapping[tuple[int, int], rm.RMEvaluation] = {
        gang: rm.read_evaluation(place(trained, gang) / rm.STAGE) for gang in GANGS
    }
    first = told[GANGS[0]]
    assert first.pairs > 10
    for gang in GANGS[1:]:
        assert told[gang].margins == pytest.approx(first.margins, abs=1e-4)
