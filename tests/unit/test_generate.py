"""What `rlhf-cluster generate` refuses before anything starts; that it answers is seen in the cluster tests."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlhf_cluster.cli import main
from rlhf_cluster.config import load, to_yaml
from rlhf_cluster.storage.run_directory import DONE, RunLayout


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    """A run that ended after SFT, with the tiny model as its policy."""
    layout = RunLayout(tmp_path / "run")
    layout.resolved_config.parent.mkdir(parents=True)
    layout.resolved_config.write_text(to_yaml(load(["recipe=smoke"])))
    (layout.stages / "sft").mkdir(parents=True)
    (layout.stages / "sft" / "policy").symlink_to(tiny)
    (layout.stages / "sft" / DONE).write_text("{}")
    return layout.path


@pytest.mark.parametrize(
    ("row", "options", "sentence"),
    [
        (
            {"prompt": "a" * 99999},
            [],
            "line 1: prompt too long: 100... tokens, and up to .* of an answer; the model reads ",
        ),
        ({"prompt": "a"}, ["--max-tokens", "9999"], "line 1: prompt too long: .* up to 9999 of an answer; the model"),
        ({"prompt": "a"}, ["--max-tokens", "0"], "--max-tokens 0: it must be at least 1"),
        ({"prompt": "a"}, ["--temperature", "-1"], r"--temperature -1\.0: it must be 0 \(always"),
        ({"prompt": "a", "response": "b"}, [], "line 1: a column of the answer: 'response' would be written over"),
        ({"prompt": "a"}, ["--output", "{there}"], "it is there already; name another file, or add --overwrite"),
        ({"prompt": "a"}, ["--output", "{there}/a/b"], "there is no directory"),
    ],
)
def test_refused(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], row: dict[str, str], options: list[str], sentence: str
) -> None:
    there, prompts = tmp_path / "there.jsonl", tmp_path / "prompts.jsonl"
    there.write_text("kept")
    prompts.write_text(json.dumps(row) + "\n")
    code = main(["generate", str(run), str(prompts), *(option.format(there=there) for option in options)])
    assert (code, there.read_text()) == (2, "kept")
    said = capfd.readouterr()
    assert said.out == ""
    assert re.search(sentence, said.err), said.err
