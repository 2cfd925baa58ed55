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
import sys
import tempfile
from pathlib import Path
from typing import Any

from peer import trl_seconds
from rounds import show, write
from throughput import STEP, Iterations, in_own_process, of_one_length
from transformers import AutoTokenizer

from rlhf_cluster import ppo
from rlhf_cluster.cluster.hosts import environment
from rlhf_cluster.cluster.placement import Attempt, PPOInputs, open_rooms
from rlhf_cluster.cluster.session import ray_session
from rlhf_cluster.config import Resources, RunConfig, load
from rlhf_cluster.data.batches import PromptOrder
from rlhf_cluster.inputs import Inputs, load_inputs
from rlhf_cluster.pipeline import roles_at_once
from rlhf_cluster.records import Prompts
from rlhf_cluster.storage.checkpoints import Checkpoints
from rlhf_cluster.storage.rollout_log import RolloutLog
from rlhf_cluster.telemetry.metrics import MetricsLog
from rlhf_cluster.telemetry.quiet import driver_log, quiet_libraries
from rlhf_cluster.telemetry.timer import Timeline, Timer

GOAL, LR = 3.0, 1e-6


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds of a GRPO iteration, ours and TRL's.")
    defaults = {"prompts": 8, "samples": 2, "tokens": 32, "iterations": 5, "warmup": 1, "blocks": 2}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="smollm2_135m", help="a choice of conf/model")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the configuration")
    return parser.parse_args()


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


async def ours(cfg: RunConfig, inputs: Inputs, prompts: Prompts, work: Path, shown: Iterations) -> None:
    paths = PPOInputs(inputs.base_path, inputs.base_path, None)
    async with open_rooms(cfg, Attempt(cfg.name, 0, work / "logs"), paths) as opened:
        log = ppo.Log(
            MetricsLog([shown], lambda sentence: print(sentence, file=sys.stderr)),
            Timer(Timeline(), ppo.STAGE),
            RolloutLog(work / "rollouts"),
            Checkpoints(work / "checkpoints"),
            lambda step, batch: None,
            lambda sentence: print(sentence, file=sys.stderr),
        )
        await ppo.train(opened.rooms, PromptOrder(prompts, cfg.seed), cfg.ppo, log)


def peers(args: argparse.Namespace, policy: Path, prompts: Prompts, work: Path, threads: int) -> list[float]:
    os.environ.update(environment(Resources(threads=threads)))
    tokenizer = AutoTokenizer.from_pretrained(policy)
    texts = [tokenizer.decode(ids) for ids in prompts.prompt_ids]
    settings: dict[str, Any] = {name: getattr(args, name) for name in ("prompts", "samples", "tokens")}
    settings |= {"steps": args.warmup + args.iterations, "lr": LR}
    return list(in_own_process(trl_seconds, policy, work, texts, settings, threads))


def main() -> None:
    args = arguments()
    quiet_libraries()
    cfg = configuration(args)
    inputs = load_inputs(cfg)
    prompts = of_one_length(inputs.prompts, args.prompts)
    found: dict[str, list[float]] = {"ours": [], "TRL, 1 thread": [], "TRL, 2 threads": []}
    for block in range(args.blocks):
        with tempfile.TemporaryDirectory() as temporary, driver_log(Path(temporary) / "driver.log") as terminal:
            work = Path(temporary)
            shown = Iterations(terminal)
            with ray_session(cfg.cluster, roles_at_once(cfg)):
                asyncio.run(ours(cfg, inputs, prompts, work, shown))
            found["ours"] += [record[STEP] for record in shown.records[args.warmup :]]
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
