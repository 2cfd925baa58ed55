"""What does one PPO iteration cost, by part, end to end through the real rooms (Ray, vLLM, DeepSpeed)?

    python benchmarks/throughput.py                                 8 prompts x 2 responses x exactly 32 tokens, 135M
    python benchmarks/throughput.py --prompts 16 --samples 4 --tokens 64
    python benchmarks/throughput.py --model tiny --iterations 2         a quick check
    python benchmarks/throughput.py model.dtype=bfloat16                any override of the configuration, after ours

PPO with reward model, reference and critic, synchronous, on prompts of one length. In turn, `--blocks` times:

    the system     `ppo.train` on the real rooms, from one iteration's record to the next
    own kernels    our own workers in bare processes, called back to back on the same prompts (`bare_rooms.py`)
    plain          plain vLLM, and the torch loops that one writes first (`plain.py`), one after the other

The reward model is made on the spot, the policy's body under a random head: only its speed counts. Prints one table and
writes `benchmarks/results/throughput-<utc>.json`.
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
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from bare_rooms import BareRooms
from plain import plain_generation_seconds, plain_seconds
from rounds import RESULTS, show, write
from workload import log_of, plain_vllm

from rlhf_cluster import ppo
from rlhf_cluster.cluster.hosts import environment
from rlhf_cluster.cluster.placement import open_rooms
from rlhf_cluster.cluster.session import ray_session
from rlhf_cluster.cluster.starter import Attempt, PPOInputs
from rlhf_cluster.config import RewardConfig, RewardPart, RunConfig, load
from rlhf_cluster.data.batches import PromptOrder
from rlhf_cluster.inputs import Inputs, load_inputs
from rlhf_cluster.models.load import resolve_attention, resolve_dtype
from rlhf_cluster.models.score_head import ScalarHeadModel
from rlhf_cluster.models.tokenizer import load_tokenizer
from rlhf_cluster.pipeline import roles_at_once
from rlhf_cluster.records import Members, Prompts, Rollouts
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
WHOLE, DRIVER = "whole iteration", "the driver's CPU"
SYSTEM, KERNELS, PLAIN = "the system", "own kernels", "plain vLLM and torch"
GOAL, GOAL_DRIVER = 1.10, 0.02

Seconds = list[Mapping[str, float]]  # by part, of each iteration


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds by part and tokens/s of one PPO iteration.")
    parser.add_argument("--model", default="smollm2_135m", help="a choice of conf/model")
    parser.add_argument("--iterations", type=int, default=5, help="measured iterations of a block")
    parser.add_argument("--warmup", type=int, default=2, help="iterations before them")
    parser.add_argument("--blocks", type=int, default=2, help="how often each contender has its turn")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of an iteration")
    parser.add_argument("--samples", type=int, default=2, help="responses to each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of every response (EOS is ignored)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of one forward")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the configuration")
    args = parser.parse_args()
    for name in ("iterations", "warmup", "blocks", "prompts", "samples", "tokens", "micro_batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least 1")
    return args


def configuration(args: argparse.Namespace, reward_model: Path, sequence: int) -> RunConfig:
    """The workload as a configuration; `sequence` is the length of prompt and response, in tokens."""
    responses, limit = args.prompts * args.samples, args.micro_batch * sequence
    ours = [
        *(f"model={args.model}", "data=sentiment", "name=throughput"),
        *("model.context=320", "data.max_prompt_tokens=256"),
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
    """A sink that keeps the metrics of each iteration, and from one's record to the next's the seconds, and those of
    this process's CPU; the first begins when this is made."""

    def __init__(self, terminal: TextIO) -> None:
        self.records: list[Mapping[str, float]] = []
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self._terminal, self._before, self._cpu = terminal, time.perf_counter(), time.process_time()

    def write(self, record: MetricsRecord) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        self.seconds.append(now - self._before)
        self.cpu.append(cpu - self._cpu)
        self._before, self._cpu = now, cpu
        self.records.append({name: value for name, value in record.metrics.items() if value is not None})
        print(f"iteration {record.step}: {self.seconds[-1]:.2f} s", file=self._terminal)

    def by_part(self) -> Seconds:
        return [
            {part: record[name] for part, name in PARTS.items() if name in record} | {WHOLE: seconds, DRIVER: cpu}
            for record, seconds, cpu in zip(self.records, self.seconds, self.cpu, strict=True)
        ]

    def cut(self, stage: str, after_step: int) -> None:
        raise RuntimeError(f"a benchmark is never resumed, but {stage} was to be cut after {after_step}")

    def close(self) -> None:
        """Holds nothing."""


async def measure(cfg: RunConfig, paths: PPOInputs, prompts: Prompts, work: Path, shown: Iterations) -> dict[str, int]:
    """Runs every iteration; returns the peak memory of each process in bytes."""
    async with open_rooms(cfg, Attempt(cfg.name, 0, work / "logs"), paths) as opened:
        log = log_of(work, shown, workers=lambda iteration: opened.metrics())
        await ppo.train(opened.rooms, PromptOrder(prompts, cfg.seed), cfg.ppo, log)
        driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {**await opened.peak_memory(), "driver": driver}


def sampled(work: Path, cfg: RunConfig) -> list[Rollouts]:
    """What each iteration trained on. Raises RuntimeError where a response is not exact."""
    log, exact = RolloutLog(work / "rollouts"), cfg.generation.max_response_tokens
    found = [Rollouts(log.read(step)) for step in range(cfg.ppo.steps)]
    if wrong := [len(ids) for rows in found for ids in rows.response_ids if len(ids) != exact]:
        raise RuntimeError(f"responses of {wrong} tokens came back; every one must have exactly {exact}")
    return found


def of_kernels(cfg: RunConfig, paths: PPOInputs, batches: Sequence[Rollouts]) -> Seconds:
    rooms = BareRooms(cfg, paths)
    try:
        members = [Members(batch.table.select(Members.schema().names)) for batch in batches]
        return [with_sum(rooms.iteration(step, batch)) for step, batch in enumerate(members)]
    finally:
        rooms.end()


def of_plain(args: argparse.Namespace, cfg: RunConfig, policy: Path, batches: Sequence[Rollouts]) -> Seconds:
    """With the learner's threads, in processes born for it."""
    os.environ.update(environment(cfg.learner.resources))
    ids = [(batch.prompt_ids, batch.response_ids) for batch in batches]
    asked = [(batch.prompt_ids, batch.seed) for batch in batches]
    dtype = resolve_dtype(cfg.model.dtype)
    torch_parts = in_own_process(plain_seconds, policy, dtype, args.micro_batch, ids)
    generate = in_own_process(plain_generation_seconds, *plain_vllm(cfg, policy), asked)
    return [with_sum({"generate": seconds} | parts) for seconds, parts in zip(generate, torch_parts, strict=True)]


def with_sum(parts: Mapping[str, float]) -> Mapping[str, float]:
    return {**parts, WHOLE: sum(parts.values())}


def medians(seconds: Seconds) -> dict[str, float]:
    return {part: statistics.median(one[part] for one in seconds) for part in seconds[0]}


def why_dtype(cfg: RunConfig) -> str:
    """The number format that was computed in, and whose choice it was."""
    name = str(resolve_dtype(cfg.model.dtype)).removeprefix("torch.")
    if cfg.model.dtype != "auto":
        return f"{name} (model.dtype={cfg.model.dtype})"
    native = "multiplies bfloat16 natively" if name == "bfloat16" else "has no native bfloat16"
    return f"{name} (model.dtype=auto: this machine {native})"


def workload(args: argparse.Namespace, cfg: RunConfig, prompt_tokens: int) -> str:
    threads = ", ".join(f"{role} {r.workers} x {r.threads}" for role, r in roles_at_once(cfg)[ppo.STAGE].items())
    return (
        f"{args.model}, {args.prompts} prompts of {prompt_tokens} tokens x {args.samples} responses of {args.tokens}, "
        f"micro-batch {args.micro_batch}, minibatch {cfg.ppo.minibatch_size}, {why_dtype(cfg)}; workers x threads: "
        f"{threads}; reward model (a random head) and reference of the policy's size; {args.blocks} x "
        f"{args.iterations} iterations, after {args.warmup} to warm up each time"
    )


def table(found: Mapping[str, Sequence[Seconds]], prompt_tokens: int, args: argparse.Namespace) -> list[list[str]]:
    """Medians by part, then of the whole: its spread, ratios to the others and tokens a second."""
    pooled = {name: [one for block in blocks for one in block] for name, blocks in found.items()}
    middle = {name: medians(seconds) for name, seconds in pooled.items()}
    lines = [
        [part, *(f"{middle[name][part]:.2f}" if part in middle[name] else "" for name in found), ""]
        for part in middle[SYSTEM]
    ]
    for title, pick in (("smallest", min), ("largest", max)):
        lines.append([f"  {title}", *(f"{pick(one[WHOLE] for one in pooled[name]):.2f}" for name in found), ""])
    over = {name: middle[SYSTEM][WHOLE] / middle[name][WHOLE] for name in (KERNELS, PLAIN)}
    lines.append([f"{SYSTEM} over it", "", f"{over[KERNELS]:.3f}", f"{over[PLAIN]:.3f}", f"{KERNELS} <= {GOAL:.2f}"])
    share = statistics.median(one[DRIVER] / one[WHOLE] for one in pooled[SYSTEM])
    lines.append(["the driver's CPU, of an iteration", f"{share:.3f}", "", "", f"<= {GOAL_DRIVER:.2f}"])
    responses = args.prompts * args.samples
    for title, tokens in (
        ("generated tokens/s", responses * args.tokens),
        ("trained tokens/s (with prompts)", responses * (args.tokens + prompt_tokens)),
    ):
        lines.append([title, *(f"{tokens / middle[name][WHOLE]:.1f}" for name in found), ""])
    return lines


def main() -> int:
    args = arguments()
    quiet_libraries()
    RESULTS.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Seconds]] = {SYSTEM: [], KERNELS: [], PLAIN: []}
    with tempfile.TemporaryDirectory(prefix="work-", dir=RESULTS) as temporary:
        work = Path(temporary)
        with driver_log(work / "driver.log") as terminal:
            inputs, prompts, cfg = prepare(args, work / "reward_model")
            paths = PPOInputs(inputs.base_path, inputs.base_path, work / "reward_model")
            for block in range(args.blocks):
                print(f"block {block + 1}: {SYSTEM}", file=terminal)
                own = work / f"block-{block}"
                shown = Iterations(terminal)
                with ray_session(cfg.cluster, roles_at_once(cfg)):
                    memory = asyncio.run(measure(cfg, paths, prompts, own, shown))
                batches = sampled(own, cfg)
                print(f"block {block + 1}: {KERNELS}", file=terminal)
                kernels = of_kernels(cfg, paths, batches)
                print(f"block {block + 1}: {PLAIN}", file=terminal)
                plain = of_plain(args, cfg, inputs.base_path, batches)
                for name, seconds in ((SYSTEM, shown.by_part()), (KERNELS, kernels), (PLAIN, plain)):
                    found[name].append(seconds[args.warmup :])
    prompt_tokens = len(prompts.prompt_ids[0])
    lines = table(found, prompt_tokens, args)
    peaks = ", ".join(f"{process} {peak / 1e9:.2f}" for process, peak in memory.items())
    show(
        "seconds of one PPO iteration, medians",
        ["", *found, "goal"],
        lines,
        [
            workload(args, cfg, prompt_tokens),
            f"Parts of {SYSTEM} overlap; those of the others are one after the other, and the whole is their "
            f"sum. Scores and references of {KERNELS} are asked for at once; the reference's seconds are those that it "
            "took longer.",
            f"Peak memory of {SYSTEM} in GB, shared pages in each that maps them: {peaks}.",
        ],
    )
    path = write(
        "throughput",
        {
            "workload": workload(args, cfg, prompt_tokens),
            "goal": GOAL,
            "seconds": found,
            "table": lines,
            "peak_memory_bytes": memory,
            "config": dataclasses.asdict(cfg),
        },
    )
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return 0


def prepare(args: argparse.Namespace, reward_model: Path) -> tuple[Inputs, Prompts, RunConfig]:
    """The model, prompts of one length and the configuration for it; makes the reward model."""
    cfg = configuration(args, reward_model, 256 + args.tokens)
    # The reward model is made of what is loaded here, so that it cannot be there yet.
    inputs = load_inputs(dataclasses.replace(cfg, reward=RewardConfig([RewardPart("random")])))
    prompts = of_one_length(inputs.prompts, args.prompts)
    cfg = configuration(args, reward_model, len(prompts.prompt_ids[0]) + args.tokens)
    in_own_process(make_reward_model, inputs.base_path, reward_model, cfg)
    return inputs, prompts, cfg


if __name__ == "__main__":
    sys.exit(main())
