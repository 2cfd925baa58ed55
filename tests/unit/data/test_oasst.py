from __future__ import annotations

from typing import Any

import pytest

from rlhf_cluster.data.oasst import looks_like_oasst, parse_oasst
from rlhf_cluster.data.rows import DataError, Message, Place, RawRow

PLACE = Place("trees.jsonl", 0, 1)


def user(text: str, *replies: dict[str, Any]) -> dict[str, Any]:
    return {"role": "prompter", "text": text, "replies": list(replies)}


def reply(text: str, rank: int | None, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    ranked = {} if rank is None else {"rank": rank}
    return {"role": "assistant", "text": text, "replies": list(replies), **ranked, **more}


def raw(root: Any) -> RawRow:
    return RawRow(PLACE, {"message_tree_id": "t", "prompt": root})


TREE = user(
    "q",
    reply("best", 0, user("q2", reply("alone", None)), user("q3", reply("p", 0), reply("r", 0), reply("s", 2))),
    reply("worse", 1),
    reply("unranked", None),
    reply("gone", 2, user("never seen"), deleted=True),
)


def test_a_tree_gives_a_prompt_per_prompter_and_a_ranking_per_two_ranked_replies() -> None:
    errors: list[DataError] = []
    tree = parse_oasst(raw(TREE), errors.append)
    assert not errors
    q = Message("user", "q")
    below = (q, Message("assistant", "best"))
    contexts = [(q,), (*below, Message("user", "q2")), (*below, Message("user", "q3"))]
    assert [row.messages for row in tree.prompts] == contexts
    rankings = [(row.prompt.messages, row.responses, row.ranks) for row in tree.comparisons]
    assert rankings == [
        (contexts[0], ("best", "worse"), (1, 2)),
        (contexts[2], ("p", "r", "s"), (1, 1, 2)),
    ]
    assert [row.response for row in tree.demonstrations] == ["best", "p", "r"]


def test_what_cannot_be_used_is_told_and_the_rest_stays() -> None:
    errors: list[DataError] = []
    root = user(
        "q",
        reply("same", 0, {"role": "wizard", "text": "x", "replies": []}, user("q2")),
        reply("same", 1, reply("an assistant below an assistant", None)),
    )
    tree = parse_oasst(raw(root), errors.append)
    assert [error.reason for error in errors] == ["response above itself", "wrong message roles", "wrong message roles"]
    assert [row.messages[-1].content for row in tree.prompts] == ["q", "q2"]
    assert not tree.comparisons


def test_another_layout_is_refused_by_its_columns() -> None:
    row = RawRow(PLACE, {"prompt": "text", "score": 1})
    assert not looks_like_oasst(row)
    with pytest.raises(DataError, match=r"missing column: 'prompt' with 'replies'.* the row has prompt, score"):
        parse_oasst(row, lambda error: None)
