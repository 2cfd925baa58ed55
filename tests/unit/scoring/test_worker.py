"""The weighted sum of parts, its columns, and what a part that fails costs: nothing, its sample, or the run."""

from __future__ import annotations

import math
import re
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_cluster.config import ConfigError, RewardConfig, RewardPart
from rlhf_cluster.data.batches import heldout_members
from rlhf_cluster.data.parse import parse_prompt
from rlhf_cluster.data.rows import Place, RawRow
from rlhf_cluster.data.tokenize import encode_prompts
from rlhf_cluster.models.tokenizer import load_tokenizer
from rlhf_cluster.records import Rollouts, Scores
from rlhf_cluster.scoring.worker import RewardError, RewardWorker, ScorerInputs, from_here

RESPONSES = ["4", "5", "4 4 4 4"]
FUNCTION = """
def score(samples):
    return [BAD if sample.response == "5" else 1.0 for sample in samples]
"""


@pytest.fixture
def rollouts(tiny: Path) -> Rollouts:
    """Three answers to 2+2, the last one cut off."""
    tokenizer = load_tokenizer(tiny)
    responses = [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in RESPONSES
    ]
    count = len(responses)
    return Rollouts.of(
        {
            "prompt_id": ["p"] * count,
            "prompt_ids": [tokenizer("2+2=", add_special_tokens=False)["input_ids"]] * count,
            "step": [0] * count,
            "sample_index": list(range(count)),
            "sample_id": [f"0/p/{i}" for i in range(count)],
            "seed": list(range(count)),
            "response_ids": responses,
            "rollout_logprobs": [[-1.0] * len(ids) for ids in responses],
            "weight_versions": [[0] * len(ids) for ids in responses],
            "finish_reason": ["stop", "stop", "length"],
            "temperature": [1.0] * count,
            "incarnation": ["test"] * count,
            "answer": ["4"] * count,
        }
    )


def scored(rollouts: Rollouts, tiny: Path, *parts: RewardPart, **changed: float) -> Scores:
    cfg = RewardConfig(list(parts), backoff_s=0.0, **changed)
    return RewardWorker(cfg, ScorerInputs("", str(tiny), "float32", "eager", 0, 60.0)).score(rollouts)


def test_the_score_is_the_weighted_sum_and_each_part_is_told(rollouts: Rollouts, tiny: Path) -> None:
    """Exact match: 1, 0, 0. Tokens with EOS: 2, 2, 8, which are 0, 0 and 6 3-grams of bytes, 3 of these said before."""
    found = scored(
        rollouts,
        tiny,
        RewardPart("exact", weight=2.0),
        RewardPart("length", weight=-0.25),
        RewardPart("repetition", name="again", weight=-1.0),
    )
    table = found.table
    assert table.column("reward/exact").to_pylist() == [1.0, 0.0, 0.0]
    assert table.column("reward/length").to_pylist() == [2.0, 2.0, 8.0]
    again = table.column("reward/again").to_numpy()
    assert again.tolist() == pytest.approx([0.0, 0.0, 0.5])
    assert found.score.tolist() == pytest.approx([2.0 - 0.5, -0.5, -2.0 - 0.5])
    assert {"reward_s/exact", "reward_s/length", "reward_s/again"} <= set(table.column_names)
    assert not any(found.failure)


def test_parts_alike_get_numbers(rollouts: Rollouts, tiny: Path) -> None:
    names = scored(rollouts, tiny, RewardPart("random"), RewardPart("random"), RewardPart("exact", "random")).table
    assert {"reward/random", "reward/random_2", "reward/random_3"} <= set(names.column_names)


def test_text_is_without_special_tokens_and_columns_are_the_rows_own(
    rollouts: Rollouts, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(samples):\n"
        "    assert [s.prompt for s in samples] == ['2+2='] * 3, samples\n"
        "    assert [s.response for s in samples] == ['4', '5', '4 4 4 4'], samples\n"
        "    assert [s.ended for s in samples] == [True, True, False], samples\n"
        "    assert all(s.columns == {'answer': '4'} for s in samples), samples\n"
        "    return [1.0] * 3\n"
    )
    found = scored(rollouts, tiny, RewardPart("function", path=f"{tmp_path / 'mine.py'}:score"))
    assert list(found.failure) == [""] * 3 and found.score.tolist() == [1.0] * 3


def test_messages_of_a_prompt_reach_a_function_of_trls(rollouts: Rollouts, tiny: Path, tmp_path: Path) -> None:
    """From the row of a file to the function, in a file that has both kinds of prompts."""
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions, answer, **columns):\n"
        "    assert prompts[0] == [{'role': 'user', 'content': '2+2='}] and not columns, (prompts, columns)\n"
        "    assert prompts[1] == '3+3=', prompts\n"
        "    return [float(completions[0][0]['content'] == answer[0]), float(completions[1] == answer[1])]\n"
    )
    given = [[{"role": "user", "content": "2+2="}], "3+3="]
    rows = [parse_prompt(RawRow(Place("p"), {"prompt": prompt, "answer": "4"})) for prompt in given]
    members = heldout_members(encode_prompts(rows, load_tokenizer(tiny), 100).record, 0, 1, 0)
    sampled = ("response_ids", "rollout_logprobs", "weight_versions", "finish_reason", "temperature", "incarnation")
    ended = members.extend(Rollouts, {name: rollouts.table.column(name).to_pylist()[:2] for name in sampled})
    found = scored(ended, tiny, RewardPart("function", path=f"{tmp_path / 'mine.py'}:score"))
    assert list(found.failure) == ["", ""] and found.score.tolist() == [1.0, 0.0]


def test_paths_named_from_here_are_found_from_everywhere(
    rollouts: Rollouts, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def score(samples):\n    return [2.0] * len(samples)\n")
    (tmp_path / "digits.json").write_text('{"type": "integer"}')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    parts = [RewardPart("function", path="mine.py:score"), RewardPart("json_schema", schema="digits.json")]
    cfg = from_here(RewardConfig(parts, backoff_s=0.0))
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = scored(rollouts, tiny, *cfg.parts)
    assert list(found.failure) == [""] * 3 and found.score.tolist() == [3.0, 3.0, 2.0]


def test_only_files_and_directories_are_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = [
        RewardPart("model", path="rm"),
        RewardPart("model", path="/models/rm"),
        RewardPart("model"),
        RewardPart("function", path="rewards/mine.py:score"),
        RewardPart("function", path="package.module:score"),
        RewardPart("http", path="http://localhost:8000/score"),
        RewardPart("json_schema", schema="schemas/person.json"),
    ]
    typed = RewardConfig(parts, path="runs/rm")
    kept = replace(typed, parts=[*map(replace, parts)])
    found = from_here(typed)
    assert found.path == f"{tmp_path}/runs/rm" and from_here(RewardConfig()).path == ""
    assert [part.path for part in found.parts] == [
        f"{tmp_path}/rm",
        "/models/rm",
        "",
        f"{tmp_path}/rewards/mine.py:score",
        "package.module:score",
        "http://localhost:8000/score",
        "",
    ]
    assert [part.schema for part in found.parts] == [""] * 6 + [f"{tmp_path}/schemas/person.json"]
    assert typed == kept  # what was typed is what the run keeps


@pytest.mark.parametrize("there", [None, ""])
def test_a_token_that_a_node_lacks_is_named_with_the_node(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, there: str | None
) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    if there is not None:
        monkeypatch.setenv("MY_TOKEN", there)
    cfg = RewardConfig([RewardPart("http", path="http://localhost:8000")], token_env="MY_TOKEN")
    words = f"reward.token_env=MY_TOKEN, but on node {socket.gethostname()}, where a reward worker runs, there is no"
    with pytest.raises(ConfigError, match=re.escape(words)):
        RewardWorker(cfg, ScorerInputs("", str(tiny), "float32", "eager", 0, 60.0))


@pytest.mark.parametrize("bad", ["1e300", "float('nan')", "float('inf')", "1/0"])
def test_a_failure_costs_its_sample(rollouts: Rollouts, tiny: Path, tmp_path: Path, bad: str) -> None:
    (tmp_path / "mine.py").write_text(FUNCTION.replace("BAD", bad))
    part = RewardPart("function", "mine", path=f"{tmp_path / 'mine.py'}:score")
    found = scored(rollouts, tiny, part, RewardPart("length"))
    assert [bool(failure) for failure in found.failure] == [False, True, False]
    assert found.failure[1].startswith("mine: it ")
    of_parts = [found.table.column(f"reward_failure/{name}").to_pylist() for name in ("mine", "length")]
    assert of_parts == [["", found.failure[1].removeprefix("mine: "), ""], [""] * 3]
    assert found.score.tolist() == [3.0, 0.0, 9.0]
    part.on_failure = "neutral"
    found = scored(rollouts, tiny, part, RewardPart("length"), neutral_score=-5.0)
    assert found.score.tolist() == [3.0, -5.0 + 2.0, 9.0] and not any(found.failure)
    part.on_failure = "stop"
    with pytest.raises(RewardError, match="the reward mine gave no finite score for sample 0/p/1: it "):
        scored(rollouts, tiny, part)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_model_of_ours_stops_the_run(
    rollouts: Rollouts, tiny: Path, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_cluster.scoring.worker.lengths", lambda rollouts: np.array([0.0, bad, 1.0], np.float32))
    with pytest.raises(RewardError, match="the reward length gave no finite score for sample 0/p/1: it gave"):
        scored(rollouts, tiny, RewardPart("length"))
