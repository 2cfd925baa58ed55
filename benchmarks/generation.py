"""How many tokens a second does a generation worker sample, beside plain vLLM?

    python benchmarks/generation.py [--prompts 16] [--samples 4] [--prompt-tokens 40] [--tokens 64] [--threads 1]
        [--rounds 5] [--model smollm2_135m] [KEY=VALUE ...]

Both sample exactly `--tokens` tokens to each prompt, seeded and with their logprobs, from engines with the same flags:
`vllm.LLM.generate` with all requests at once, and the worker's `sample`, which streams them out as records. Prints one
table and writes `benchmarks/results/generation-<utc>.json`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from plain import PlainGeneration
from rounds import born_with, compare, interleaved
from workload import arguments, make_members, make_worker, plain_vllm

from rlhf_cluster.cluster.hosts import environment
from rlhf_cluster.config import Resources, RunConfig, load
from rlhf_cluster.models.build import prepare_model
from rlhf_cluster.records import Members
from rlhf_cluster.telemetry.quiet import quiet_libraries

GOAL = 0.97


def worker(cfg: RunConfig, policy: Path, members: Members, loop: asyncio.Runner) -> Callable[[], None]:
    ours = make_worker(cfg, policy)
    loop.run(ours.start(0))

    async def collect() -> int:
        return sum([len(part) async for part in ours.sample(members)])

    def sample() -> None:
        assert loop.run(collect()) == len(members)

    return sample


def main() -> None:
    defaults = {"prompts": 16, "samples": 4, "prompt_tokens": 40, "tokens": 64, "threads": 1, "rounds": 5}
    args = arguments("Tokens per second of a generation worker and of plain vLLM.", **defaults).parse_args()
    quiet_libraries()
    born_with(environment(Resources(threads=args.threads)))
    ours = [f"model={args.model}", "data=sentiment", f"generation.max_response_tokens={args.tokens}"]
    ours += ["name=generation", "reward=random", "generation.ignore_eos=true", "generation.kv_cache_memory=536870912"]
    cfg = load([*ours, *args.overrides], "ppo")
    policy, members = prepare_model(cfg.model), make_members(args)
    with asyncio.Runner() as loop:
        plain = PlainGeneration(*plain_vllm(cfg, policy))
        contenders: dict[str, Callable[[], None]] = {
            "plain vLLM": partial(plain.sample, members.prompt_ids, members.seed),
            "worker": worker(cfg, policy, members, loop),
        }
        found = interleaved(contenders, args.rounds)
    title = f"{len(members)} responses of {args.tokens} tokens, {args.threads} threads"
    compare("generation", title, len(members) * args.tokens, found, GOAL, vars(args))


if __name__ == "__main__":
    main()
    os._exit(0)  # an engine's threads would keep the process
