from __future__ import annotations

import math
from typing import Any

import pytest

from rlhf_cluster.data.parse import parse_comparison, parse_demonstration, parse_prompt
from rlhf_cluster.data.rows import DataError, Message, Place, RawRow

USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
OTHER = {"role": "assistant", "content": "b"}


def raw(**values: Any) -> RawRow:
    return RawRow(Place("f.jsonl", 6, 7), values)


def turns(*messages: dict[str, str]) -> tuple[Message, ...]:
    return tuple(Message(**message) for message in messages)


def test_a_text_prompt_is_one_user_turn_and_keeps_its_own_columns() -> None:
    row = parse_prompt(raw(prompt=" u ", answer=42, chosen="not a column of the prompt's own"))
    assert row.messages == (Message("user", " u "),)
    assert row.columns == {"answer": 42}


def test_a_prompt_of_messages_keeps_them_as_a_column_of_its_own() -> None:
    row = parse_prompt(raw(prompt=[SYSTEM, USER, ANSWER, USER | {"name": "left out"}], answer=42))
    assert row.messages == turns(SYSTEM, USER, ANSWER, USER)
    assert row.columns == {"answer": 42, "prompt": [SYSTEM, USER, ANSWER, USER]}


def test_messages_stored_as_an_object_of_lists() -> None:
    row = parse_prompt(raw(prompt={"role": ["user"], "content": ["u"]}))
    assert (row.messages, row.columns) == (turns(USER), {"prompt": [USER]})


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "u", "completion": "a"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": ANSWER},
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER], "prompt": "u"},
    ],
)
def test_demonstrations_in_each_layout(values: dict[str, Any]) -> None:
    row = parse_demonstration(raw(**values))
    assert (row.prompt.messages, row.response) == (turns(USER), "a")


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "u", "chosen": "a", "rejected": "b"},
        {"prompt": "u", "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": "u", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": [USER], "completions": [{"completion": "a", "rank": 1}, {"completion": "b", "rank": 2.0}]},
        {"prompt": [USER], "completions": {"completion": ["a", "b"], "rank": [0, 5]}},
    ],
)
def test_comparisons_in_each_layout(values: dict[str, Any]) -> None:
    row = parse_comparison(raw(**values))
    assert (row.prompt.messages, row.responses, row.ranks) == (turns(USER), ("a", "b"), (1, 2))


def test_rankings_keep_ties_and_the_order_of_the_file() -> None:
    completions = [{"completion": text, "rank": rank} for text, rank in zip("wxyz", (7, 2, 7, 2), strict=True)]
    row = parse_comparison(raw(prompt="u", completions=completions))
    assert (row.responses, row.ranks, row.decides) == (("w", "x", "y", "z"), (2, 1, 2, 1), True)


def test_a_ranking_of_ties_decides_nothing() -> None:
    completions = [{"completion": "x", "rank": 1}, {"completion": "y", "rank": 1}]
    assert not parse_comparison(raw(prompt="u", completions=completions)).decides


def test_half_a_character_is_named_before_a_tokenizer_meets_it() -> None:
    with pytest.raises(DataError, match=r"^f\.jsonl, line 7: broken prompt: half a character .* at 2"):
        parse_prompt(raw(prompt="ab\ud800"))


PAIR = {"completion": "x", "rank": 1}

BAD = [
    (parse_prompt, {"text": "u", "n": 1}, "missing column: 'prompt'; the row has n, text"),
    (parse_prompt, {"prompt": None}, "missing column: 'prompt'; is null in this row"),
    (parse_prompt, {"prompt": "  \n"}, "empty prompt: only white space"),
    (parse_prompt, {"prompt": ""}, "empty prompt"),
    (parse_prompt, {"prompt": 3}, "wrong type: 'prompt' must be text or a list of messages, is int"),
    (parse_prompt, {"prompt": []}, "wrong message roles: none"),
    (parse_prompt, {"prompt": [USER, ANSWER]}, "wrong message roles: user, assistant"),
    (parse_prompt, {"prompt": [USER, USER]}, "wrong message roles: user, user"),
    (parse_prompt, {"prompt": [USER, ANSWER, SYSTEM, USER]}, "wrong message roles"),
    (parse_prompt, {"prompt": [{"role": "tool", "content": "x"}]}, "wrong message roles: 'tool'"),
    (parse_prompt, {"prompt": [{"role": "user", "content": ["x"]}]}, "wrong type: a message of 'prompt'"),
    (parse_prompt, {"prompt": "u", "seed": 1}, "reserved column: seed"),
    (parse_demonstration, {"prompt": "u"}, "missing column: 'completion'; the row has prompt"),
    (parse_demonstration, {"prompt": "u", "completion": " "}, "empty response"),
    (parse_demonstration, {"prompt": "u", "completion": []}, "empty response: 'completion' is an empty list"),
    (parse_demonstration, {"messages": [USER]}, "wrong message roles: user"),
    (parse_demonstration, {"messages": [ANSWER]}, "wrong message roles: assistant"),
    (parse_comparison, {"prompt": "u", "chosen": "a"}, "missing column: 'rejected'; the row has chosen, prompt"),
    (parse_comparison, {"prompt": "u", "chosen": "a", "rejected": "a"}, "response above itself"),
    (parse_comparison, {"chosen": "a", "rejected": "b"}, "missing column: 'prompt'"),
    (parse_comparison, {"chosen": [USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]}, "different contexts"),
    (parse_comparison, {"prompt": "v", "chosen": [USER, ANSWER], "rejected": "b"}, "different contexts"),
    (parse_comparison, {"prompt": "u", "completions": [PAIR]}, "too few responses: .* at least 2, this has 1"),
    (parse_comparison, {"prompt": "u", "completions": []}, "too few responses: .* at least 2, this has 0"),
    (parse_comparison, {"prompt": "u", "completions": [PAIR, {"completion": "y"}]}, "missing column: 'rank'"),
    (parse_comparison, {"prompt": "u", "completions": "x"}, "wrong type: 'completions'"),
]


@pytest.mark.parametrize(("parse", "values", "message"), BAD)
def test_a_bad_row_is_named_with_what_is_wrong(parse: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^f\.jsonl, line 7: {message}"):
        parse(raw(**values))


@pytest.mark.parametrize("rank", [math.nan, math.inf, -math.inf, 1.5, "1", True, -1])
def test_a_rank_is_a_whole_number(rank: Any) -> None:
    with pytest.raises(DataError, match=r"^f\.jsonl, line 7: bad rank"):
        parse_comparison(raw(prompt="u", completions=[PAIR, {"completion": "y", "rank": rank}]))
