from __future__ import annotations

from typing import Any

import pytest

from rlhf_cluster.data.hh import looks_like_hh, parse_hh
from rlhf_cluster.data.rows import DataError, Message, Place, RawRow

CONTEXT = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three, Human: not a turn"


def raw(chosen: Any, rejected: Any) -> RawRow:
    return RawRow(Place("hh.jsonl", 0, 1), {"chosen": chosen, "rejected": rejected})


def test_a_dialogue_becomes_context_and_two_responses() -> None:
    row = parse_hh(raw(f"{CONTEXT}\n\nAssistant: good\n\nreally", f"{CONTEXT}\n\nAssistant: bad"))
    assert row.prompt.messages == (
        Message("user", "one"),
        Message("assistant", "two"),
        Message("user", "three, Human: not a turn"),
    )
    assert (row.responses, row.ranks) == (("good\n\nreally", "bad"), (1, 2))


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (f"{CONTEXT}\n\nAssistant: x", "\n\nHuman: other\n\nAssistant: y", "different contexts"),
        (f"{CONTEXT}\n\nAssistant:", f"{CONTEXT}\n\nAssistant: y", "empty response"),
        (f"{CONTEXT}\n\nAssistant: x", f"{CONTEXT}\n\nAssistant: x", "response above itself"),
        (f"{CONTEXT}\n\nAssistant: x\n\nHuman: more", f"{CONTEXT}\n\nAssistant: y", "no last assistant turn"),
        ("no turns", "no turns", "no last assistant turn"),
        ("\n\nAssistant: x", "\n\nAssistant: y", "no human turn"),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: x", "\n\nHuman: a\n\nHuman: b\n\nAssistant: y", "wrong message roles"),
        ("\n\nHuman:\n\nAssistant: x", "\n\nHuman:\n\nAssistant: y", "empty prompt"),
        (None, "\n\nHuman: a\n\nAssistant: y", "missing column"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(chosen: Any, rejected: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_hh(raw(chosen, rejected))
    assert caught.value.reason == reason


def test_only_whole_dialogues_look_like_hh() -> None:
    assert looks_like_hh(raw(CONTEXT, CONTEXT))
    assert not looks_like_hh(raw("text", CONTEXT))
    assert not looks_like_hh(raw([], CONTEXT))
