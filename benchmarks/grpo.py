"""GRPO without a critic and without a reference, end to end, beside TRL's `GRPOTrainer`.

    python benchmarks/grpo.py [--prompts 8] [--samples 2] [--tokens 32] [--iterations 5] [--blocks 2]
        [--model smollm2_135m] [KEY=VALUE ...]

Ours is `ppo.train` on the real rooms: Ray, vLLM workers, scorer, learner, publish. TRL generates with transformers and
trains in one process, once with one thread and once with two: the better one counts. All take turns, `--blocks` times.
Responses have exactly `--tokens` tokens; bfloat16. Prints one table and writes `benchmarks/results/grpo-<utc>.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from peer import trl_seconds
from rounds import show, write
from throughput import Iterations, in_own_process, measure, of_one_length
from transformers import AutoTokenizer
from workload import arguments

from rlhf_cluster.cluster.hosts import environment
from rlhf_cluster.cluster.session import ray_session
from rlhf_cluster.cluster.starter import PPOInputs
from rlhf_cluster.config import Resources, RunConfig, load
from rlhf_cluster.inputs import load_inputs
from rlhf_cluster.pipeline import roles_at_once
from rlhf_cluster.records import Prompts
from rlhf_cluster.telemetry.quiet import driver_log, quiet_libraries

GOAL, LR = 3.0, 1e-6


def configuration(args: argparse.Namespace) -> RunConfig:
    responses = args.prompts * args.samples
    ours = [
        *(f"model={args.model}", "model.dtype=bfloat16", "model.context=320", "data=sentiment", "name=grpo"),
        *("data.max_prompt_tokens=256", "reward=random", "advantage=grpo", "kl=none"),
        *(f"ppo.batch_size={responses}", f"ppo.minibatch_size={responses}", f"ppo.samples_per_prompt={args.samples}"),
        *(f"ppo.steps={args.warmup + args.iterations}", f"learner.policy.lr={LR}", "learner.policy.warmup_steps=0"),
        *(f"generation.max_response_tokens={args.tokens}", "generation.ignore_eos=true"),
        *("generation.resources.workers=2", "generation.kv_cache_memory=268435456"),
        *("learner.engine.zero_stage=0", "learner.resources.threads=2"),
    ]
    return load([*ours, *args.overrides], "ppo")


def peers(args: argparse.Namespace, policy: Path, prompts: Prompts, work: Path, threads: int) -> list[float]:
    os.environ.update(environment(Resources(threads=threads)))
    tokenizer = AutoTokenizer.from_pretrained(policy)
    texts = [tokenizer.decode(ids) for ids in prompts.prompt_ids]
    settings: dict[str, Any] = {name: getattr(args, name) for name in ("prompts", "samples", "tokens")}
    settings |= {"steps": args.warmup + args.iterations, "lr": LR}
    return list(in_own_process(trl_seconds, policy, work, texts, settings, threads))


def main() -> None:
    defaults = {"prompts": 8, "samples": 2, "tokens": 32, "iterations": 5, "warmup": 1, "blocks": 2}
    args = arguments("Seconds of a GRPO iteration, ours and TRL's.", **defaults).parse_args()
    quiet_libraries()
    cfg = configuration(args)
    inputs = load_inputs(cfg)
    prompts = of_one_length(inputs.prompts, args.prompts)
    paths = PPOInputs(inputs.base_path, inputs.base_path, None)
    found: dict[str, list[float]] = {"ours": [], "TRL, 1 thread": [], "TRL, 2 threads": []}
    for block in range(args.blocks):
        with tempfile.TemporaryDirectory() as temporary, driver_log(Path(temporary) / "driver.log") as terminal:
            work = Path(temporary)
            shown = Iterations(terminal)
            with ray_session(cfg.cluster, roles_at_once(cfg)):
                asyncio.run(measure(cfg, paths, prompts, work, shown))
            found["ours"] += shown.seconds[args.warmup :]
            for threads, name in ((1, "TRL, 1 thread"), (2, "TRL, 2 threads")):
                print(f"block {block + 1}: {name}", file=terminal)
                found[name] += peers(args, inputs.base_path, prompts, work, threads)[args.warmup :]
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    best = min(seconds for name, seconds in medians.items() if name != "ours")
    rows = [[name, f"{medians[name]:.2f}", f"{min(all_):.2f}", f"{max(all_):.2f}"] for name, all_ in found.items()]
    last = ["TRL, the better one, over ours", f"{best / medians['ours']:.2f} x", "", f">= {GOAL:g}"]
    title = f"{args.prompts} prompts x {args.samples} responses of {args.tokens} tokens"
    show(title, ["seconds of an iteration", "median", "min", "max"], [*rows, last], [])
    write("grpo", {"arguments": vars(args), "seconds": found, "ratio": best / medians["ours"], "goal": GOAL})


if __name__ == "__main__":
    main()
