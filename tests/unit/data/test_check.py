from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_cluster.data.check import Lengths, check, guess_kind
from rlhf_cluster.data.rows import DataError, Place, RawRow

PAIR = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
DIALOGUE = "\n\nHuman: u\n\nAssistant: a"


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"prompt": "u", "answer": 1}, "prompts"),
        ({"prompt": "u", "completion": "a"}, "demonstrations"),
        ({"messages": PAIR}, "demonstrations"),
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, "comparisons"),
        ({"chosen": PAIR, "rejected": PAIR}, "comparisons"),
        ({"prompt": "u", "completions": []}, "comparisons"),
        ({"chosen": DIALOGUE, "rejected": DIALOGUE}, "hh"),
        ({"prompt": {"text": "q", "replies": []}}, "oasst"),
        ({"text": "t", "source": "s"}, "text"),
        ({"prompt": "u", "text": "t"}, "prompts"),
        ({"question": "u", "answer": "a"}, "unknown"),
        ({"prompt": None}, "unknown"),
    ],
)
def test_the_kind_is_guessed_by_the_columns(values: dict[str, Any], kind: str) -> None:
    assert guess_kind(RawRow(Place("x"), values)) == kind


def test_a_report_counts_everything_and_stops_at_nothing(tmp_path: Path) -> None:
    def ranking(*ranks: Any) -> dict[str, Any]:
        entries = [{"completion": "abcd"[i], "rank": rank} for i, rank in enumerate(ranks)]
        return {"prompt": "u", "completions": entries}

    rows = [ranking(1, 2), "{not json", ranking(1), ranking(1, 1, 2), {"other": 1}, ranking(3, 3), *[ranking(1)] * 4]
    report = check(write(tmp_path / "c.jsonl", rows))
    assert (report.kind, report.rows, report.usable) == ("comparisons", 10, {"comparisons": 2})
    assert {reason: entry.count for reason, entry in report.dropped.items()} == {
        "not JSON": 1,
        "too few responses": 5,
        "missing column": 1,
        "all responses tied": 1,
    }
    lines = [example.split(":")[0].rsplit(" ", 1)[1] for example in report.dropped["too few responses"].examples]
    assert lines == ["3", "7", "8"]
    assert (report.k, report.pairs, report.tied_pairs) == ({2: 2, 3: 1}, 5, 2)


def test_the_text_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "a"}, {"prompt": " "}])
    assert str(check(path)).splitlines() == [
        f"{path}: prompts for PPO (data.prompts)",
        "rows      3; columns prompt",
        "usable    1 prompts",
        "dropped   2",
        "        1 empty prompt",
        f"            {path}, line 3: empty prompt: only white space",
        "        1 duplicate prompt",
        f"            {path}, line 2: duplicate prompt: as in {path}, line 1",
        "a run would refuse it: 1 of 3 rows cannot be used",
    ]


@pytest.mark.parametrize(
    ("rows", "accepted"),
    [
        ([{"prompt": "a"}, {"prompt": "a"}], True),
        ([{"prompt": "a"}, {"prompt": ""}], False),
        ([{"question": "q"}], False),
        ([{"prompt": "a", "chosen": "x", "rejected": "y"}], True),
        ([{"prompt": "a", "completions": [{"completion": c, "rank": 1} for c in "xy"]}], False),
        ([{"chosen": DIALOGUE, "rejected": DIALOGUE}, {"chosen": DIALOGUE, "rejected": DIALOGUE[:-1] + "!"}], True),
    ],
)
def test_what_a_run_would_take(tmp_path: Path, rows: list[dict[str, object]], accepted: bool) -> None:
    report = check(write(tmp_path / "d.jsonl", rows))
    assert report.accepted is accepted
    assert ("a run would refuse it" in str(report)) is not accepted


def test_token_lengths_with_a_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a", "completion": "x" * size} for size in (1, 2, 9)]
    report = check(write(tmp_path / "d.jsonl", [*rows, {"prompt": "a", "completion": "x<|im_end|>"}]), tokenizer)
    assert report.tokens["response"] == Lengths(
        count=3, smallest=2, median=3.0, mean=5.0, p95=pytest.approx(9.3), largest=10
    )
    assert report.tokens["prompt"].smallest == report.tokens["prompt"].largest == 1 + 9 + 11
    assert report.dropped["EOS inside a response"].count == 1
    assert "response  tokens min 2, median 3, mean 5.0, 95 % 9, max 10" in str(report)


def test_running_text_is_counted_by_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    report = check(write(tmp_path / "t.jsonl", [{"text": "abc"}, {"text": "a"}, {"text": 5}]), tokenizer)
    assert (report.kind, report.usable, report.refused, report.accepted) == ("text", {"documents": 2}, 1, False)
    assert (report.tokens["document"].smallest, report.tokens["document"].largest) == (1, 3)
    (tmp_path / "plain.txt").write_text("abcd")
    plain = check(tmp_path / "plain.txt", tokenizer)
    assert (plain.kind, plain.usable, plain.accepted) == ("text", {"documents": 1}, True)
    assert str(plain).startswith(f"{tmp_path / 'plain.txt'}: running text for the pretraining mix (data.pretraining)")


def test_an_unknown_layout_is_said_with_its_columns(tmp_path: Path) -> None:
    report = check(write(tmp_path / "q.jsonl", [{"question": "q", "answer": "a"}]))
    assert (report.kind, report.columns, report.usable) == ("unknown", ("question", "answer"), {})
    assert "usable    none" in str(report)


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        check(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("name", "kind", "usable"),
    [
        ("hh-rlhf/harmless-base.jsonl.gz", "hh", {"prompts": 1724, "demonstrations": 1725, "comparisons": 1725}),
        ("oasst/en_trees.jsonl", "oasst", {"prompts": 373, "demonstrations": 172, "comparisons": 172}),
        ("oasst/prompts_en_250.jsonl", "prompts", {"prompts": 250}),
        ("gsm8k/train.jsonl", "unknown", {}),
    ],
)
def test_real_files(real_data: Callable[[str], Path], name: str, kind: str, usable: dict[str, int]) -> None:
    report = check(real_data(name))
    assert (report.kind, report.usable) == (kind, usable)
