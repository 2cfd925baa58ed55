"""What does one PPO iteration cost, by part, end to end through the real rooms (Ray, vLLM, DeepSpeed)?

    python benchmarks/throughput.py                                   8 prompts x 2 responses x exactly 32 tokens, 135M
    python benchmarks/throughput.py --model tiny --iterations 2       a quick check
    python benchmarks/throughput.py model.dtype=bfloat16              any override of the configuration, after ours

Runs `ppo.train` on prompts of one length, so that `tokens_per_micro_batch` makes micro-batches of exactly
`--micro-batch` sequences. The reward model is made on the spot, the policy's body under a random head: only its speed
counts. Prints one table and writes `benchmarks/results/throughput-<utc>.json`.

The ratio is the learner's update over a bare torch loop that does the same arithmetic - policy and critic forward,
backward, clipping, AdamW - on the same batch, by the same number of threads, in a process that is alone on the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from bare_loop import bare_update_seconds
from rich.console import Console
from rich.table import Table
from rounds import RESULTS, write
from workload import log_of

from rlhf_cluster import ppo
from rlhf_cluster.cluster.hosts import environment
from rlhf_cluster.cluster.placement import Attempt, PPOInputs, open_rooms
from rlhf_cluster.cluster.session import ray_session
from rlhf_cluster.config import RewardConfig, RewardPart, RunConfig, load
from rlhf_cluster.data.batches import PromptOrder
from rlhf_cluster.inputs import Inputs, load_inputs
from rlhf_cluster.models.load import resolve_attention, resolve_dtype
from rlhf_cluster.models.score_head import ScalarHeadModel
from rlhf_cluster.models.tokenizer import load_tokenizer
from rlhf_cluster.pipeline import roles_at_once
from rlhf_cluster.records import Prompts
from rlhf_cluster.storage.rollout_log import RolloutLog
from rlhf_cluster.telemetry.metrics import MetricsRecord
from rlhf_cluster.telemetry.quiet import driver_log, quiet_libraries

PARTS = {  # what is shown -> the loop's own timer
    "generate": "timing_s/gen",
    "score": "timing_s/reward",
    "reference": "timing_s/ref",
    "learner evaluate": "timing_s/old_log_prob",
    "learner update": "timing_s/update",
    "publish": "timing_s/update_weights",
}
STEP = "timing_s/step"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds by part and tokens/s of one PPO iteration.")
    parser.add_argument("--model", default="smollm2_135m", help="a choice of conf/model")
    parser.add_argument("--iterations", type=int, default=5, help="measured iterations")
    parser.add_argument("--warmup", type=int, default=2, help="iterations before them")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of an iteration")
    parser.add_argument("--samples", type=int, default=2, help="responses to each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of every response (EOS is ignored)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of one forward")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the configuration")
    args = parser.parse_args()
    for name in ("iterations", "prompts", "samples", "tokens", "micro_batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least 1")
    return args


def configuration(args: argparse.Namespace, reward_model: Path, sequence: int) -> RunConfig:
    """The workload as a configuration; `sequence` is the length of prompt and response, in tokens."""
    responses, limit = args.prompts * args.samples, args.micro_batch * sequence
    ours = [
        *(
            f"model={args.model}",
            "data=sentiment",
            "name=throughput",
            "model.context=320",
            "data.max_prompt_tokens=256",
        ),
        *(f"ppo.batch_size={responses}", f"ppo.minibatch_size={responses}", f"ppo.samples_per_prompt={args.samples}"),
        *(f"ppo.steps={args.warmup + args.iterations}", f"reward.path={reward_model}"),
        *(f"generation.max_response_tokens={args.tokens}", "generation.ignore_eos=true"),
        *("generation.resources.workers=2", "generation.kv_cache_memory=536870912"),
        *("learner.engine.zero_stage=0", "learner.resources.threads=2"),
        *(f"{room}.tokens_per_micro_batch={limit}" for room in ("learner.engine", "reward", "reference")),
    ]
    return load([*ours, *args.overrides], "ppo")


def of_one_length(prompts: Prompts, needed: int) -> Prompts:
    """The prompts of the most frequent length. Raises SystemExit where they are fewer than an iteration needs."""
    lengths = [len(ids) for ids in prompts.prompt_ids]
    length, count = Counter(lengths).most_common(1)[0]
    if count < needed:
        raise SystemExit(f"only {count} prompts have the most frequent length of {length} tokens; {needed} are needed")
    return prompts.take(np.flatnonzero(np.array(lengths) == length))


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """So that what it holds in memory is not counted as the driver's, and its threads are its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def make_reward_model(policy: Path, directory: Path, cfg: RunConfig) -> None:
    """The policy's body under a random head."""
    dtype, attention = resolve_dtype(cfg.model.dtype), resolve_attention(cfg.model.attention)
    model = ScalarHeadModel.from_policy(policy, dtype, attention, cfg.seed)
    model.save(directory, load_tokenizer(policy, cfg.model.chat_template), dtype)


class Iterations:
    """A sink that keeps the metrics of each iteration and says that it was."""

    def __init__(self, terminal: TextIO) -> None:
        self.records: list[Mapping[str, float]] = []
        self._terminal = terminal

    def write(self, record: MetricsRecord) -> None:
        found = {name: value for name, value in record.metrics.items() if value is not None}
        self.records.append(found)
        print(f"iteration {record.step}: {found[STEP]:.2f} s", file=self._terminal)

    def cut(self, stage: str, after_step: int) -> None:
        raise RuntimeError(f"a benchmark is never resumed, but {stage} was to be cut after {after_step}")

    def close(self) -> None:
        """Holds nothing."""


async def measure(cfg: RunConfig, inputs: Inputs, prompts: Prompts, work: Path, shown: Iterations) -> Mapping[str, int]:
    """Runs every iteration; returns the peak memory of each process in bytes."""
    reward_model = Path(cfg.reward.path) if cfg.reward.path else None
    paths = PPOInputs(inputs.base_path, inputs.base_path, reward_model)
    async with open_rooms(cfg, Attempt(cfg.name, 0, work / "logs"), paths) as opened:
        await ppo.train(opened.rooms, PromptOrder(prompts, cfg.seed), cfg.ppo, log_of(work, shown))
        driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {**await opened.peak_memory(), "driver": driver}


def bare_loop(args: argparse.Namespace, cfg: RunConfig, policy: Path, sequences: Sequence[Sequence[int]]) -> float:
    """Seconds of the bare loop on `sequences`, in a process born with the learner's own environment."""
    os.environ.update(environment(cfg.learner.resources))
    how = resolve_dtype(cfg.model.dtype), resolve_attention(cfg.model.attention), cfg.learner.resources.threads
    return float(in_own_process(bare_update_seconds, policy, *how, sequences, args.tokens, args.micro_batch))


def batch_of(work: Path, step: int, tokens: int) -> list[list[int]]:
    """Prompt and response of every row that `step` trained on. Raises RuntimeError where a response is not exact."""
    table = RolloutLog(work / "rollouts").read(step)
    prompts, responses = table.column("prompt_ids").to_pylist(), table.column("response_ids").to_pylist()
    if wrong := [len(response) for response in responses if len(response) != tokens]:
        raise RuntimeError(f"responses of {wrong} tokens came back; every one must have exactly {tokens}")
    return [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    middle = statistics.median(seconds)
    return {"median": middle, "min": min(seconds), "max": max(seconds), "all": list(seconds)}


def figures(records: Sequence[Mapping[str, float]], sequences: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
    """Seconds by part over the measured iterations, and tokens/s of their medians."""
    seconds = {part: spread([record[name] for record in records]) for part, name in PARTS.items()}
    seconds["whole step"] = spread([record[STEP] for record in records])
    generated, trained = len(sequences) * tokens, sum(map(len, sequences))
    return {
        "seconds": seconds,
        "tokens_per_second": {
            "generated / generate": generated / seconds["generate"]["median"],
            "trained / learner update": trained / seconds["learner update"]["median"],
            "generated / whole step": generated / seconds["whole step"]["median"],
            "trained / whole step": trained / seconds["whole step"]["median"],
        },
    }


def why_dtype(cfg: RunConfig) -> str:
    """The number format that was computed in, and whose choice it was."""
    name = str(resolve_dtype(cfg.model.dtype)).removeprefix("torch.")
    if cfg.model.dtype != "auto":
        return f"{name} (model.dtype={cfg.model.dtype})"
    native = "multiplies bfloat16 natively" if name == "bfloat16" else "has no native bfloat16"
    return f"{name} (model.dtype=auto: this machine {native})"


def show(result: Mapping[str, Any]) -> None:
    console, table = Console(highlight=False), Table(title="seconds of one PPO iteration")
    table.add_column("part")
    for column in ("median", "min", "max"):
        table.add_column(column, justify="right")
    for part, seconds in result["seconds"].items():
        style = "bold" if part == "whole step" else None
        table.add_row(part, *(f"{seconds[column]:.2f}" for column in ("median", "min", "max")), style=style)
    table.add_section()
    for name, rate in result["tokens_per_second"].items():
        table.add_row(f"tokens/s: {name}", f"{rate:.1f}", "", "")
    table.add_section()
    table.add_row("bare torch loop, same batch", f"{result['bare_loop_seconds']:.2f}", "", "")
    table.add_row("ratio: learner update / bare loop", f"{result['learner_update_over_bare_loop']:.2f}", "", "")
    table.add_section()
    for process, peak in result["peak_memory_bytes"].items():
        table.add_row(f"peak memory in GB: {process}", f"{peak / 1e9:.2f}", "", "")
    console.print(table)
    console.print(result["workload"], soft_wrap=True)
    console.print(
        "Parts overlap, so they need not add up to the step. Trained "
        "tokens are those of prompts and responses. Peak memory counts shared pages in every process that maps them.",
        soft_wrap=True,
    )


def workload(args: argparse.Namespace, cfg: RunConfig, prompt_tokens: int) -> str:
    threads = ", ".join(f"{role} {r.workers} x {r.threads}" for role, r in roles_at_once(cfg)[ppo.STAGE].items())
    return (
        f"{args.model}, {args.prompts} prompts of {prompt_tokens} tokens x {args.samples} responses of {args.tokens}, "
        f"micro-batch {args.micro_batch}, minibatch {cfg.ppo.minibatch_size}, {why_dtype(cfg)}; workers x threads: "
        f"{threads}; reward model (a random head) and reference of the policy's size; {args.iterations} iterations "
        f"after {args.warmup} to warm up"
    )


def main() -> int:
    args = arguments()
    quiet_libraries()
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="work-", dir=RESULTS) as temporary:
        work = Path(temporary)
        with driver_log(work / "driver.log") as terminal:
            print(f"{args.model}: making the reward model, then starting the workers", file=terminal)
            cfg = configuration(args, work / "reward_model", 256 + args.tokens)
            # The reward model is made of what is loaded here, so that it cannot be there yet.
            inputs = load_inputs(dataclasses.replace(cfg, reward=RewardConfig([RewardPart("random")])))
            prompts = of_one_length(inputs.prompts, args.prompts)
            prompt_tokens = len(prompts.prompt_ids[0])
            cfg = configuration(args, work / "reward_model", prompt_tokens + args.tokens)
            in_own_process(make_reward_model, inputs.base_path, work / "reward_model", cfg)
            shown = Iterations(terminal)
            with ray_session(cfg.cluster, roles_at_once(cfg)):
                memory = asyncio.run(measure(cfg, inputs, prompts, work, shown))
            print("measuring the bare torch loop", file=terminal)
            sequences = batch_of(work, cfg.ppo.steps - 1, args.tokens)
            bare = bare_loop(args, cfg, inputs.base_path, sequences)
    found = figures(shown.records[args.warmup :], sequences, args.tokens)
    result = {
        "workload": workload(args, cfg, prompt_tokens),
        **found,
        "bare_loop_seconds": bare,
        "learner_update_over_bare_loop": found["seconds"]["learner update"]["median"] / bare,
        "peak_memory_bytes": dict(memory),
        "config": dataclasses.asdict(cfg),
    }
    path = write("throughput", result)
    show(result)
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
