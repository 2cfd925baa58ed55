"""What `run` refuses before anything starts: exit code 2, and a sentence that says where, what, and what is allowed."""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from as_user import User

from rlhf_cluster import cli

RANKED = {
    "prompt": "Name a colour.",
    "completions": [{"completion": "Red.", "rank": 1}, {"completion": "No.", "rank": 2}],
}
ROWS: Mapping[str, list[Any]] = {
    "empty.jsonl": [],
    "prompts.jsonl": [{"prompt": f"Name the number {n}."} for n in range(12)],
    "no_column.jsonl": [{"prompt": "Hello."}, {"question": "Hello?"}],
    "long.jsonl": [{"prompt": "Hello."}, {"prompt": "word " * 60}, *({"prompt": f"Number {n}?"} for n in range(12))],
    "one_response.jsonl": [RANKED, {"prompt": "Hello.", "completions": [{"completion": "Hi.", "rank": 1}]}],
    "nan_rank.jsonl": [
        RANKED,
        RANKED | {"completions": [RANKED["completions"][0], {"completion": "No.", "rank": math.nan}]},
    ],
}
PPO = ("data=files", "stages=[ppo]", "reward=random", "data.prompts={files}/prompts.jsonl")
PPO_OF = ("data=sentiment", "stages=[ppo]", "policy_path={model}")
RM = ("data=files", "stages=[rm]", "rm.ranking.labeler=''", "policy_path={model}")

REFUSED = {
    "an unknown key": (("ppo.stepps=3",), r"unknown key 'ppo\.stepps'; did you mean ppo\.steps.*\?"),
    "a wrong type": (("ppo.steps=many",), r".*ppo\.steps.*'many'.*"),
    "sizes that do not divide": (("ppo.minibatch_size=3",), r"ppo\.minibatch_size=3 does not divide .*; use 2 or 4"),
    "an empty file": ((*PPO, "data.prompts={files}/empty.jsonl"), r".*empty\.jsonl: empty file"),
    "a missing path": ((*PPO, "data.prompts={files}/none.jsonl"), r".*none\.jsonl: no such file or directory"),
    "a row without the column": (
        (*PPO, "data.prompts={files}/no_column.jsonl"),
        r".*no_column\.jsonl.*line 2.*missing column.*'prompt'.*question.*",
    ),
    "a prompt too long": ((*PPO, "data.prompts={files}/long.jsonl"), r".*long\.jsonl.*line 2.*\b3\d\d\b.*\b160\b.*"),
    "a ranking of one": (
        (*RM, "data.comparisons={files}/one_response.jsonl"),
        r".*one_response\.jsonl.*line 2.*at least 2, this has 1",
    ),
    "a rank that is none": ((*RM, "data.comparisons={files}/nan_rank.jsonl"), r".*nan_rank\.jsonl.*line 2.*nan.*"),
    "a context too long": (
        ("model.context=4096",),
        r"model\.context=4096 is beyond .* context of 1024 tokens; lower it",
    ),
    "a reward model that is not there": (
        (*PPO_OF, "reward.path={files}/none"),
        r".*none is not a Hugging Face model directory: it holds no config\.json",
    ),
    "a policy for a reward model": (
        (*PPO_OF, "reward.path={model}"),
        r".* is not a reward model or critic: it holds no score_head\.safetensors",
    ),
    "a reference that is not there": (
        (*PPO_OF, "reward=random", "reference.path={files}/none"),
        r".*none is not a Hugging Face model directory: it holds no config\.json",
    ),
    "a model that is not there": (("model=pretrained", "model.path={files}/nobody"), r"model\.path=.*nobody.*"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    for name, rows in ROWS.items():
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Ray must not be reached; SIGTERM, which the command takes for itself, is given back."""
    from rlhf_cluster.pipeline import runner

    def reached(*_: Any) -> None:
        raise AssertionError("Ray was reached")

    monkeypatch.setattr(runner, "ray_session", reached)
    monkeypatch.setenv("RLHF_CLUSTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(
    case: str, nothing_starts: None, files: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, sentence = REFUSED[case]
    given = [override.format(files=files, model=tiny) for override in overrides]
    assert cli.main(["run", "recipe=smoke", f"dir={tmp_path / 'run'}", *given]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(rf"rlhf-cluster: {sentence}\n", said.err)
    assert not (tmp_path / "run").exists()


def test_a_refusal_is_all_that_a_person_sees(user: User, files: Path, tmp_path: Path) -> None:
    """In a process of its own, where every library is loaded anew and might speak."""
    ended = user.types("run", "recipe=smoke", f"dir={tmp_path / 'run'}", *PPO[:-1], f"data.prompts={files}/empty.jsonl")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"rlhf-cluster: {files}/empty.jsonl: empty file\n"
    assert not user.left_behind()
