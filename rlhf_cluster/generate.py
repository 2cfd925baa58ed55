"""Answers to the prompts of a file, by the result of a run, sampled by the same generation workers as in training."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_cluster.cluster.placement import open_generation
from rlhf_cluster.cluster.session import ray_session
from rlhf_cluster.cluster.starter import Attempt
from rlhf_cluster.config import ConfigError, RunConfig
from rlhf_cluster.data.batches import heldout_members
from rlhf_cluster.data.parse import parse_prompt
from rlhf_cluster.data.readers import read_rows
from rlhf_cluster.data.rows import DataError, RawRow
from rlhf_cluster.data.tokenize import encode_prompts
from rlhf_cluster.interrupts import run_async
from rlhf_cluster.models.tokenizer import context_length, load_tokenizer
from rlhf_cluster.records import Members, Prompts, Rollouts
from rlhf_cluster.results import result_config, result_policy
from rlhf_cluster.storage.durable import replace_text
from rlhf_cluster.telemetry.quiet import driver_log

ANSWER = ("response", "finish_reason")


def generate(
    run_dir: Path,
    prompts_file: Path,
    output: Path | None = None,
    overwrite: bool = False,
    max_tokens: int | None = None,
    temperature: float | None = None,
) -> int:
    """One JSON object per prompt, in the file's order: the row as it was given, with `response` and `finish_reason`
    ("stop", or "length" where it was cut off). Returns how many. Lengths and temperature are the run's where none are
    given; a prompt may be as long as the model reads."""
    cfg, policy = result_config(run_dir), result_policy(run_dir)
    _refuse_output(output, overwrite)
    cfg = _sampling(cfg, max_tokens, temperature)
    tokenizer = load_tokenizer(policy)
    rows = list(read_rows(str(prompts_file)))
    for row in rows:
        if taken := [name for name in ANSWER if name in row.values]:
            raise DataError(row.place, "a column of the answer", f"{taken[0]!r} would be written over; rename it")
    prompts = encode_prompts([*map(parse_prompt, rows)], tokenizer, sys.maxsize).record
    cfg = replace(cfg, model=replace(cfg.model, context=_context(cfg, policy, rows, prompts)))
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


def _refuse_output(output: Path | None, overwrite: bool) -> None:
    if output is None:
        return
    if not output.resolve().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no directory {output.resolve().parent}; make it first")
    if output.is_dir():
        raise ConfigError(f"--output {output}: it is a directory; name a file")
    if output.exists() and not overwrite:
        raise ConfigError(f"--output {output}: it is there already; name another file, or add --overwrite")


def _sampling(cfg: RunConfig, max_tokens: int | None, temperature: float | None) -> RunConfig:
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"--max-tokens {max_tokens}: it must be at least 1")
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ConfigError(f"--temperature {temperature}: it must be 0 (always the likeliest token) or above")
    given = cfg.generation
    generation = replace(
        given,
        max_response_tokens=given.max_response_tokens if max_tokens is None else max_tokens,
        temperature=given.temperature if temperature is None else temperature,
    )
    return replace(cfg, generation=generation)


def _context(cfg: RunConfig, policy: Path, rows: Sequence[RawRow], prompts: Prompts) -> int:
    """Tokens that the longest prompt and its answer take. Raises DataError for one that the model cannot read."""
    most, answer = context_length(policy), cfg.generation.max_response_tokens
    for row, ids in zip(rows, prompts.prompt_ids, strict=True):
        if len(ids) + answer > most:
            told = f"{len(ids)} tokens, and up to {answer} of an answer; the model reads {most}"
            raise DataError(row.place, "prompt too long", told)
    return max(map(len, prompts.prompt_ids)) + answer


async def _sample(cfg: RunConfig, policy: Path, members: Members, logs: Path) -> Rollouts:
    async with open_generation(cfg, Attempt(f"{cfg.name}-generate", 0, logs), policy) as generation:
        rollouts = Rollouts.concat([part async for part in generation.sample(members)])
    place = {sample_id: row for row, sample_id in enumerate(rollouts.sample_id)}
    return rollouts.take([place[sample_id] for sample_id in members.sample_id])


def _line(row: Mapping[str, Any], response: str, reason: str) -> str:
    # A parquet row may hold what JSON has no word for, such as a date.
    return json.dumps({**row, "response": response, "finish_reason": reason}, ensure_ascii=False, default=str) + "\n"
