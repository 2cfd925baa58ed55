"""How many tokens a second does the learner train on, beside the loop that one writes first (`plain.py`)?

    python benchmarks/learner.py [--prompts 8] [--samples 2] [--prompt-tokens 40] [--tokens 32] [--skewed] [--threads 1]
        [--rounds 5] [--model smollm2_135m] [KEY=VALUE ...]

Both do for the same rows what an update without a critic takes: old logprobs, the clipped loss's gradient, clipping,
one step of AdamW. Ours is the learner itself, one rank under DeepSpeed with its fp32 masters and all its metrics; the
plain loop keeps bfloat16 alone. `--skewed`: log-normal lengths with `--tokens` as the longest. Prints one table and
writes `benchmarks/results/learner-<utc>.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from plain import PlainLearner
from rounds import compare, interleaved
from workload import IDS, arguments, endpoint, make_members

from rlhf_cluster.cluster import worker_arguments
from rlhf_cluster.config import RunConfig, load
from rlhf_cluster.learner.worker import LearnerWorker
from rlhf_cluster.models.build import prepare_model
from rlhf_cluster.models.load import resolve_dtype
from rlhf_cluster.records import Controls, Pretraining, ScoredRollouts
from rlhf_cluster.telemetry.quiet import quiet_libraries

GOAL = 2.2
MICRO_BATCH = 4  # of the plain loop


def configuration(args: argparse.Namespace) -> RunConfig:
    responses = args.prompts * args.samples
    ours = [
        *(f"model={args.model}", "data=sentiment", "name=learner", "advantage=grpo", "kl=none"),
        *(f"ppo.batch_size={responses}", f"ppo.minibatch_size={responses}", f"ppo.samples_per_prompt={args.samples}"),
        *("ppo.epochs=1", "ppo.steps=1000", f"generation.max_response_tokens={args.tokens}", "reward=random"),
        f"learner.resources.threads={args.threads}",
    ]
    return load([*ours, *args.overrides], "ppo")


def make_rows(args: argparse.Namespace, step: int) -> ScoredRollouts:
    """One batch; the logprobs that came with it matter to nothing."""
    rng = np.random.default_rng(step)
    count, longest = args.prompts * args.samples, args.tokens
    skewed = np.minimum(np.ceil(longest * rng.lognormal(-1.5, 0.8, count)), longest).astype(int)
    lengths = skewed if args.skewed else np.full(count, longest)
    columns = {
        "response_ids": [rng.integers(0, IDS, length).astype(np.int32) for length in lengths],
        "rollout_logprobs": [np.full(length, -7.0, np.float32) for length in lengths],
        "weight_versions": [np.full(length, step, np.int32) for length in lengths],
        "finish_reason": ["length"] * count,
        "temperature": [1.0] * count,
        "incarnation": ["none"] * count,
        "score": rng.normal(size=count),
        "failure": [""] * count,
    }
    return make_members(args, step).extend(ScoredRollouts, columns)


def learner(cfg: RunConfig, policy: Path) -> Callable[[ScoredRollouts], None]:
    worker = LearnerWorker(*worker_arguments.of_learner(cfg))
    worker.start(0, 1, endpoint(), 600.0, policy, None, Pretraining.empty())
    steps = iter(range(cfg.ppo.steps))

    def train(rows: ScoredRollouts) -> None:
        step = next(steps)
        worker.begin(step, rows.sample_id)
        worker.add(step, rows, 0, len(rows))
        worker.update(step, Controls(0.0))

    return train


def main() -> None:
    defaults = {"prompts": 8, "samples": 2, "prompt_tokens": 40, "tokens": 32, "threads": 1, "rounds": 5}
    parser = arguments("Tokens per second of the learner and of a plain torch loop.", **defaults)
    parser.add_argument("--skewed", action="store_true", help="log-normal lengths, --tokens the longest")
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(args.threads)
    cfg = configuration(args)
    policy = prepare_model(cfg.model)
    rows = make_rows(args, 0)
    prompts, responses, advantages = rows.prompt_ids, rows.response_ids, rows.score.tolist()
    ours, plain = learner(cfg, policy), PlainLearner(policy, resolve_dtype(cfg.model.dtype), MICRO_BATCH, 1e-6)
    found = interleaved(
        {
            "plain torch loop": lambda: plain.update(
                prompts, responses, advantages, plain.evaluate(prompts, responses)
            ),
            "learner": lambda: ours(rows),
        },
        args.rounds,
    )
    tokens = sum(map(len, rows.prompt_ids)) + sum(map(len, rows.response_ids))
    title = f"an update of {len(rows)} responses, {tokens} tokens with their prompts, {args.threads} threads"
    compare("learner", title, tokens, found, GOAL, vars(args))


if __name__ == "__main__":
    main()
