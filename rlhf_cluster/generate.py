"""Answers to the prompts of a file, by the result of a run, sampled by the same generation workers as in training."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_cluster.cluster.placement import Attempt, open_generation
from rlhf_cluster.cluster.session import ray_session
from rlhf_cluster.config import ConfigError, RunConfig
from rlhf_cluster.data.batches import heldout_members
from rlhf_cluster.data.parse import parse_prompt
from rlhf_cluster.data.readers import read_rows
from rlhf_cluster.data.tokenize import encode_prompts
from rlhf_cluster.interrupts import run_async
from rlhf_cluster.models.tokenizer import load_tokenizer
from rlhf_cluster.records import Members, Rollouts
from rlhf_cluster.results import result_config, result_policy
from rlhf_cluster.storage.durable import replace_text
from rlhf_cluster.telemetry.quiet import driver_log


def generate(run_dir: Path, prompts_file: Path, output: Path | None) -> int:
    """One JSON object per prompt, in the file's order: the row as it was given, with `response` and `finish_reason`
    ("stop", or "length" where it was cut off). Returns how many."""
    cfg, policy = result_config(run_dir), result_policy(run_dir)
    if output and not output.resolve().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no directory {output.resolve().parent}; make it first")
    if output and output.is_dir():
        raise ConfigError(f"--output {output}: it is a directory; name a file")
    tokenizer = load_tokenizer(policy)
    rows = list(read_rows(str(prompts_file)))
    prompts = encode_prompts([*map(parse_prompt, rows)], tokenizer, cfg.data.max_prompt_tokens).record
    members = heldout_members(prompts, 0, 1, cfg.seed)
    logs = run_dir.resolve() / "logs" / "generate"
    with (
        driver_log(logs / "driver.log"),
        ray_session(cfg.cluster, {"generate": {"generation": cfg.generation.resources}}),
    ):
        rollouts = run_async(lambda: _sample(cfg, policy, members, logs))
    responses = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rollouts.response_ids]
    answered = zip(rows, responses, rollouts.finish_reason, strict=True)
    text = "".join(_line(row.values, response, reason) for row, response, reason in answered)
    if output:
        replace_text(output, text, "the answers")
    else:
        sys.stdout.write(text)
    return len(rows)


async def _sample(cfg: RunConfig, policy: Path, members: Members, logs: Path) -> Rollouts:
    async with open_generation(cfg, Attempt(f"{cfg.name}-generate", 0, logs), policy) as generation:
        rollouts = Rollouts.concat([part async for part in generation.sample(members)])
    place = {sample_id: row for row, sample_id in enumerate(rollouts.sample_id)}
    return rollouts.take([place[sample_id] for sample_id in members.sample_id])


def _line(row: Mapping[str, Any], response: str, reason: str) -> str:
    # A parquet row may hold what JSON has no word for, such as a date.
    return json.dumps({**row, "response": response, "finish_reason": reason}, ensure_ascii=False, default=str) + "\n"
