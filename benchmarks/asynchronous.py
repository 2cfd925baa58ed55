"""How much of what can be won by sampling and learning at the same time is won?

    python benchmarks/asynchronous.py [--prompts 16] [--samples 4] [--tokens 64] [--iterations 32] [--staleness 1]
        [--blocks 1] [--model smollm2_135m] [KEY=VALUE ...]

GRPO without a reference, the reward a rule (`rule.py`), generation worker and learner with one thread each: on two
cores a core each. In turn, `--blocks` times:

    alone          sampling, and evaluation with update, each while nothing else runs (`bare_rooms.py`)
    asynchronous   `ppo.train` with max_staleness, from one iteration's record to the next
    synchronous    max_staleness 0, with two generation workers and two threads of the learner: each waits for the
                   other, and has both cores then

If sampling takes G and learning L alone, an iteration takes G + L one after the other and the larger of the two at
best. The first iterations warm up, the last ones have no batch ahead of them: neither counts. Beside it what was
learnt: the mean score of the last ten iterations. Prints one table and writes
`benchmarks/results/asynchronous-<utc>.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from bare_rooms import BareRooms
from rounds import show, write
from throughput import Iterations, measure, of_one_length
from workload import arguments

from rlhf_cluster.cluster.session import ray_session
from rlhf_cluster.cluster.starter import PPOInputs
from rlhf_cluster.config import RunConfig, load
from rlhf_cluster.data.batches import PromptOrder
from rlhf_cluster.inputs import load_inputs
from rlhf_cluster.pipeline import roles_at_once
from rlhf_cluster.records import Prompts
from rlhf_cluster.telemetry.quiet import driver_log, quiet_libraries

GOAL, LAST = 0.90, 10
TOLD = ("rollout/staleness", "rollout/mismatch_kl", "idle/generation", "idle/learner", "sync/paused_s")
RULE = Path(__file__).with_name("rule.py")
Records = Sequence[Mapping[str, float]]


def configuration(args: argparse.Namespace, seed: int, staleness: int, both_cores: bool = False) -> RunConfig:
    responses, cores = args.prompts * args.samples, 2 if both_cores else 1
    ours = [
        *(f"model={args.model}", "model.context=320", "data=sentiment", "data.max_prompt_tokens=256"),
        *("name=asynchronous", f"seed={seed}", "advantage=grpo", "kl=none"),
        f"reward.parts=[{{kind: function, path: '{RULE}:vowels'}}]",
        *(f"ppo.batch_size={responses}", f"ppo.minibatch_size={responses}", f"ppo.samples_per_prompt={args.samples}"),
        *(f"ppo.steps={args.warmup + args.iterations + args.staleness}", f"ppo.max_staleness={staleness}"),
        *("learner.policy.lr=1e-5", "learner.policy.warmup_steps=0"),
        *(f"generation.max_response_tokens={args.tokens}", "generation.ignore_eos=true"),
        *(f"generation.resources.workers={cores}", "generation.kv_cache_memory=536870912"),
        *("learner.engine.zero_stage=0", f"learner.resources.threads={cores}"),
    ]
    return load([*ours, *args.overrides], "ppo")


def alone(cfg: RunConfig, paths: PPOInputs, prompts: Prompts, args: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of sampling and of learning."""
    order, rooms = PromptOrder(prompts, cfg.seed), BareRooms(cfg, paths)
    try:
        seconds = [
            rooms.iteration(step, order.members(step, cfg.ppo.batch_size, cfg.ppo.samples_per_prompt))
            for step in range(args.warmup + args.rounds)
        ]
    finally:
        rooms.end()
    return [
        {"sampling": one["generate"], "learning": one["learner evaluate"] + one["learner update"]}
        for one in seconds[args.warmup :]
    ]


def through_the_loop(
    cfg: RunConfig, paths: PPOInputs, prompts: Prompts, work: Path, terminal: TextIO
) -> tuple[list[float], Records]:
    """Seconds and metrics of every iteration."""
    shown = Iterations(terminal)
    with ray_session(cfg.cluster, roles_at_once(cfg)):
        asyncio.run(measure(cfg, paths, prompts, work, shown))
    return shown.seconds, shown.records


def mean_and_error(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def main() -> None:
    defaults = {"prompts": 16, "samples": 4, "tokens": 64, "iterations": 32, "warmup": 2, "staleness": 1, "blocks": 1}
    args = arguments("Asynchronous against alone.", **defaults, rounds=5).parse_args()
    quiet_libraries()
    runs = {f"asynchronous, staleness {args.staleness}": (args.staleness, False)}
    runs |= {"synchronous, both cores": (0, True)}
    bare: list[dict[str, float]] = []
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    records: dict[str, list[Mapping[str, float]]] = {name: [] for name in runs}
    scores: dict[str, list[float]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as temporary, driver_log(Path(temporary) / "driver.log") as terminal:
        for block in range(args.blocks):
            cfg = configuration(args, block, 0)
            inputs = load_inputs(cfg)
            prompts = of_one_length(inputs.prompts, args.prompts)
            paths = PPOInputs(inputs.base_path, inputs.base_path, None)
            print(f"block {block + 1}: alone", file=terminal)
            bare += alone(cfg, paths, prompts, args)
            for number, (name, how) in enumerate(runs.items()):
                print(f"block {block + 1}: {name}", file=terminal)
                work = Path(temporary) / f"{block}-{number}"
                took, found = through_the_loop(configuration(args, block, *how), paths, prompts, work, terminal)
                counted = slice(args.warmup, args.warmup + args.iterations)
                seconds[name] += took[counted]
                records[name] += found[counted]
                scores[name] += [record["objective/scores"] for record in found[counted][-LAST:]]
    report(args, bare, seconds, records, scores)


def report(
    args: argparse.Namespace,
    bare: Sequence[Mapping[str, float]],
    seconds: Mapping[str, list[float]],
    records: Mapping[str, Records],
    scores: Mapping[str, list[float]],
) -> None:
    sampling, learning = (statistics.median(one[part] for one in bare) for part in ("sampling", "learning"))
    ideal = max(sampling, learning)
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    first, both = medians
    rows = [
        ["sampling alone", f"{sampling:.2f}", "", "", "", ""],
        ["evaluation and update alone", f"{learning:.2f}", "", "", "", ""],
        ["ideal: the larger of the two", f"{ideal:.2f}", "", "", "1.000", ""],
    ]
    for name, of in seconds.items():
        spread = [f"{min(of):.2f}", f"{max(of):.2f}"]
        goal = f">= {GOAL:.2f}" if name == first else ""
        share = f"{ideal / medians[name]:.3f}"
        rows.append([name, f"{medians[name]:.2f}", *spread, share, goal])
    one_by_one = sampling + learning
    notes = [
        f"Sampling and learning one after the other take {one_by_one / ideal:.2f} times the ideal; {first} is "
        f"{one_by_one / medians[first]:.2f} times as fast as that, and {medians[both] / medians[first]:.2f} times as "
        "fast as both cores in every phase.",
        *(
            f"{name}: score of the last {LAST} iterations {mean_and_error(of)}; {told(records[name])}"
            for name, of in scores.items()
        ),
    ]
    title = f"{args.prompts} prompts x {args.samples} responses of {args.tokens} tokens, seconds of an iteration"
    show(title, ["", "median", "smallest", "largest", "ideal / median", "goal"], rows, notes)
    found: dict[str, Any] = {"alone": bare, "seconds": seconds, "records": records, "goal": GOAL}
    write("asynchronous", {"arguments": vars(args), **found})


def told(records: Records) -> str:
    """Medians of what else an iteration says of itself."""
    there = [name for name in TOLD if name in records[0]]
    return ", ".join(f"{name} {statistics.median(record[name] for record in records):.3g}" for name in there)


if __name__ == "__main__":
    main()
