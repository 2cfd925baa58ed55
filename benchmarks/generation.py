"""How many tokens a second does a generation worker sample, beside plain vLLM?

    python benchmarks/generation.py [--prompts 16] [--samples 4] [--prompt-tokens 40] [--tokens 64] [--threads 1]
        [--rounds 5] [--model smollm2_135m] [KEY=VALUE ...]

Both sample exactly `--tokens` tokens to each prompt, seeded and with their logprobs, from engines with the same flags:
`vllm.LLM.generate` with all requests at once, and the worker's `sample`, which streams them out as records. Prints one
table and writes `benchmarks/results/generation-<utc>.json`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from rounds import born_with, compare, interleaved
from workload import arguments, make_members

from rlhf_cluster.cluster.hosts import environment
from rlhf_cluster.config import Resources, RunConfig, load
from rlhf_cluster.generation.worker import GenerationWorker
from rlhf_cluster.models.build import prepare_model
from rlhf_cluster.records import Members
from rlhf_cluster.telemetry.quiet import quiet_libraries

GOAL = 0.97
FLAGS = (
    *("model", "dtype", "max_model_len", "max_num_seqs", "enforce_eager", "enable_chunked_prefill"),
    *("kv_cache_memory_bytes", "gpu_memory_utilization", "logprobs_mode", "generation_config"),
)


def make_worker(cfg: RunConfig, policy: Path) -> GenerationWorker:
    return GenerationWorker(str(policy), cfg.generation, cfg.weights, cfg.model.context, cfg.model.dtype, "bench")


def worker(cfg: RunConfig, policy: Path, members: Members, loop: asyncio.Runner) -> Callable[[], None]:
    ours = make_worker(cfg, policy)
    loop.run(ours.start(0))

    async def collect() -> int:
        return sum([len(part) async for part in ours.sample(members)])

    def sample() -> None:
        assert loop.run(collect()) == len(members)

    return sample


def plain(cfg: RunConfig, policy: Path, members: Members) -> Callable[[], None]:
    """The worker's own flags, but for those that concern weights that change."""
    from vllm import LLM, SamplingParams

    flags = dataclasses.asdict(make_worker(cfg, policy)._engine_args())
    engine = LLM(**{name: flags[name] for name in FLAGS}, disable_log_stats=True)
    prompts = [{"prompt_token_ids": ids.tolist()} for ids in members.prompt_ids]
    sampling = [
        SamplingParams(
            temperature=1.0,
            max_tokens=cfg.generation.max_response_tokens,
            ignore_eos=True,
            seed=int(seed),
            logprobs=0,
            detokenize=False,
        )
        for seed in members.seed
    ]

    def sample() -> None:
        assert len(engine.generate(prompts, sampling, use_tqdm=False)) == len(members)  # type: ignore[arg-type]

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
        contenders = {"plain vLLM": plain(cfg, policy, members), "worker": worker(cfg, policy, members, loop)}
        found = interleaved(contenders, args.rounds)
    title = f"{len(members)} responses of {args.tokens} tokens, {args.threads} threads"
    compare("generation", title, len(members) * args.tokens, found, GOAL, vars(args))


if __name__ == "__main__":
    main()
    os._exit(0)  # an engine's threads would keep the process
