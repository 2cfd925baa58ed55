"""What the benchmarks have in common: what they are asked for, the responses that they sample or train on, the flags of
an engine, and a log of `ppo.train` that keeps nothing but what a benchmark looks at."""

from __future__ import annotations

import argparse
import dataclasses
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cluster import ppo
from rlhf_cluster.cluster import worker_arguments
from rlhf_cluster.config import RunConfig
from rlhf_cluster.generation.worker import GenerationWorker
from rlhf_cluster.loop.admission import Batch
from rlhf_cluster.records import Members, Rollouts
from rlhf_cluster.storage.checkpoints import Checkpoints
from rlhf_cluster.storage.rollout_log import RolloutLog
from rlhf_cluster.telemetry.metrics import MetricsLog, Sink
from rlhf_cluster.telemetry.timer import Timeline, Timer

IDS = 250  # prompts and responses are of these ids alone, which every model has
FLAGS = (
    *("model", "dtype", "max_model_len", "max_num_seqs", "enforce_eager", "enable_chunked_prefill"),
    *("block_size", "kv_cache_memory_bytes", "gpu_memory_utilization", "logprobs_mode", "generation_config"),
)


def arguments(description: str, **numbers: int) -> argparse.ArgumentParser:
    """Takes an option for each of `numbers`, whose values are the defaults, a model and overrides."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--model", default="smollm2_135m", help="a choice of conf/model")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the configuration")
    return parser


def make_members(args: argparse.Namespace, step: int = 0) -> Members:
    """`args.samples` responses to each of `args.prompts` prompts of `args.prompt_tokens` random tokens."""
    rng = np.random.default_rng(step)
    count = args.prompts * args.samples
    prompts = rng.integers(0, IDS, (args.prompts, args.prompt_tokens)).astype(np.int32)
    return Members.of(
        {
            "prompt_id": [f"p{i // args.samples}" for i in range(count)],
            "prompt_ids": [prompts[i // args.samples] for i in range(count)],
            "step": [step] * count,
            "sample_index": [i % args.samples for i in range(count)],
            "sample_id": [f"{step}/p{i // args.samples}/{i % args.samples}" for i in range(count)],
            "seed": list(range(count)),
        }
    )


def rollouts_of(members: Members, tokens: int, version: int = 0) -> Rollouts:
    """A response of `tokens` tokens to each, all alike."""
    count = len(members)
    columns: dict[str, Sequence[Any]] = {
        "response_ids": list(np.full((count, tokens), 7, np.int32)),
        "rollout_logprobs": list(np.full((count, tokens), -1.0, np.float32)),
        "weight_versions": list(np.full((count, tokens), version, np.int32)),
        "finish_reason": ["length"] * count,
        "temperature": [1.0] * count,
        "incarnation": ["null"] * count,
    }
    return members.extend(Rollouts, columns)


def log_of(
    directory: Path,
    sink: Sink,
    show: Callable[[int, Batch], None] = lambda step, batch: None,
    workers: Callable[[int], Mapping[str, float]] = lambda iteration: {},
) -> ppo.Log:
    """Rollouts and checkpoints go below `directory`, what is wrong to the terminal."""

    def warn(sentence: str) -> None:
        print(sentence, file=sys.stderr)

    return ppo.Log(
        MetricsLog([sink], warn),
        Timer(Timeline(), ppo.STAGE),
        RolloutLog(directory / "rollouts"),
        Checkpoints(directory / "checkpoints"),
        show,
        warn,
        workers=workers,
    )


def endpoint() -> tuple[str, int]:
    """Where a learner of this machine alone meets: an address and a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "127.0.0.1", int(probe.getsockname()[1])


def make_worker(cfg: RunConfig, policy: Path) -> GenerationWorker:
    return GenerationWorker(*worker_arguments.of_generation(cfg, policy, "bench"))


def plain_vllm(cfg: RunConfig, policy: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The worker's own flags, but for those that concern weights that change, and how it samples."""
    flags = dataclasses.asdict(make_worker(cfg, policy)._engine_args())
    asked = cfg.generation
    sampling = {
        "temperature": asked.temperature,
        "max_tokens": asked.max_response_tokens,
        "ignore_eos": asked.ignore_eos,
    }
    return {name: flags[name] for name in FLAGS}, sampling
