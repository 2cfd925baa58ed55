"""What a person types: how it is read, and what the exit code says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cluster.cli import main, parse


def test_overrides_may_stand_on_both_sides_of_an_option() -> None:
    args = parse(["config", "a=1", "--stage", "sft", "b=2", "c=3"])
    assert (args.stage, args.overrides) == ("sft", ["a=1", "b=2", "c=3"])


@pytest.mark.parametrize(
    "arguments", [["config", "a=1", "--nope"], ["chat", "runs/a", "b=2"], ["run", "a=1", "-x", "b"]]
)
def test_what_no_command_takes_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(("rows", "code"), [([{"prompt": "a"}], 0), ([{"prompt": "a"}, {"promt": "b"}], 2)])
def test_data_check_says_by_its_exit_code_whether_a_run_would_take_the_file(
    rows: list[dict[str, str]], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(tmp_path / "p.jsonl")]) == code
    assert "usable    1 prompts" in capsys.readouterr().out


def test_a_refused_config_is_one_sentence_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "recipe=smoke", "name=.."]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "rlhf-cluster: name=..: only letters, digits, ., _ and -, and no . at the beginning\n"
