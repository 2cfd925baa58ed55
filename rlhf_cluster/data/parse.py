"""Rows of meaning from raw rows, by the column names that the ecosystem uses. Each function takes one raw row.

    prompts          prompt                                     text or messages
    demonstrations   prompt + completion | messages             completion: text or one assistant message
    comparisons      prompt + chosen + rejected                 text or messages; messages may repeat the prompt
                     chosen + rejected                          message lists that share a prefix (implicit prompt)
                     prompt + completions                       [{completion, rank}, ...], rank 1 the best, ties allowed

A text prompt is a conversation of one user turn. Text is kept as it is: nothing is trimmed, nothing repaired. What
cannot be used raises DataError with the file, the row and what is wrong. Knows no tokenizer and no file format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_cluster.data.rows import (
    ComparisonRow,
    DataError,
    DemonstrationRow,
    Message,
    Place,
    PromptRow,
    RawRow,
    column_names,
    dense_ranks,
)
from rlhf_cluster.records import ReferencedRollouts, Scores

ROLES = ("system", "user", "assistant")
KNOWN_COLUMNS = {"prompt", "completion", "messages", "chosen", "rejected", "completions"}
# A prompt's own columns travel beside these through every stage, so they cannot bear the same names.
RESERVED_COLUMNS = set(ReferencedRollouts.COLUMNS) | set(Scores.COLUMNS) | {"gold"}  # the last: held-out samples


def parse_prompt(row: RawRow) -> PromptRow:
    """The prompt and its own columns: all that no layout above claims, and `prompt` where it was given as messages."""
    own = {name: value for name, value in row.values.items() if name not in KNOWN_COLUMNS}
    taken = sorted(RESERVED_COLUMNS & set(own))
    if taken:
        seen = f"{', '.join(taken)}; rollouts have columns of that name, rename it"
        raise DataError(row.place, "reserved column", seen)
    given = _column(row, "prompt")
    messages = _messages(given, "prompt", row.place)
    if not isinstance(given, str):
        own["prompt"] = [{"role": message.role, "content": message.content} for message in messages]
    return prompt_row(messages, row.place, own)


def parse_demonstration(row: RawRow) -> DemonstrationRow:
    if "messages" in row.values and "completion" not in row.values:
        prompt, response = _last_turn(_messages(row.values["messages"], "messages", row.place), row.place)
        return demonstration(prompt, response, row.place)
    prompt = _messages(_column(row, "prompt"), "prompt", row.place)
    return demonstration(prompt, _answer(_column(row, "completion"), prompt, "completion", row.place), row.place)


def parse_comparison(row: RawRow) -> ComparisonRow:
    if "completions" in row.values:
        return _ranked(row)
    chosen, rejected = _column(row, "chosen"), _column(row, "rejected")
    if row.values.get("prompt") is None:
        return _implicit(chosen, rejected, row.place)
    prompt = _messages(row.values["prompt"], "prompt", row.place)
    responses = [_answer(chosen, prompt, "chosen", row.place), _answer(rejected, prompt, "rejected", row.place)]
    return comparison(prompt, responses, [1, 2], row.place)


def demonstration(prompt: Sequence[Message], response: str, place: Place) -> DemonstrationRow:
    """A checked demonstration, for every source of them."""
    return DemonstrationRow(prompt_row(prompt, place), _not_empty(response, "response", place))


def comparison(
    prompt: Sequence[Message], responses: Sequence[str], ranks: Sequence[Any], place: Place
) -> ComparisonRow:
    """A checked comparison, for every source of them. Ranks are made dense; only their order has a meaning."""
    if len(responses) < 2:
        raise DataError(place, "too few responses", f"a ranking needs at least 2, this has {len(responses)}")
    for response in responses:
        _not_empty(response, "response", place)
    checked = [_rank(rank, place) for rank in ranks]
    _same_text_same_rank(responses, checked, place)
    return ComparisonRow(prompt_row(prompt, place), tuple(responses), dense_ranks(checked))


def prompt_row(messages: Sequence[Message], place: Place, columns: Mapping[str, Any] | None = None) -> PromptRow:
    """A checked prompt, for every source of them."""
    check_turns(messages, "user", place)
    for message in messages:
        _not_empty(message.content, "prompt" if message is messages[-1] else f"{message.role} turn", place)
    return PromptRow.of(messages, place, columns)


def check_turns(messages: Sequence[Message], last: str, place: Place) -> None:
    """An optional system turn, then user and assistant in turn, ending with `last`: what chat templates take."""
    turns = [message.role for message in messages]
    body = turns[1:] if turns[:1] == ["system"] else turns
    expected = [("user", "assistant")[index % 2] for index in range(len(body))]
    if not body or body != expected or body[-1] != last:
        allowed = f"an optional system turn, then user and assistant in turn, ending with {last}"
        raise DataError(place, "wrong message roles", f"{', '.join(turns) or 'none'}; allowed: {allowed}")


def _ranked(row: RawRow) -> ComparisonRow:
    prompt = _messages(_column(row, "prompt"), "prompt", row.place)
    entries = _rows_of(_column(row, "completions"))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(row.place, "wrong type", "'completions' must be a list of {completion, rank}")
    for entry in entries:
        missing = [name for name in ("completion", "rank") if entry.get(name) is None]
        if missing:
            found = ", ".join(sorted(entry)) or "none"
            raise DataError(row.place, "missing column", f"{missing[0]!r} in an entry of 'completions'; it has {found}")
    responses = [_answer(entry["completion"], prompt, "completions", row.place) for entry in entries]
    return comparison(prompt, responses, [entry["rank"] for entry in entries], row.place)


def _implicit(chosen: Any, rejected: Any, place: Place) -> ComparisonRow:
    if isinstance(chosen, str) or isinstance(rejected, str):
        hint = "without it 'chosen' and 'rejected' must be message lists (for text dialogues: data.source=hh)"
        raise DataError(place, "missing column", f"'prompt'; {hint}")
    context, best = _last_turn(_messages(chosen, "chosen", place), place)
    other, worst = _last_turn(_messages(rejected, "rejected", place), place)
    if context != other:
        raise DataError(place, "different contexts", "'chosen' and 'rejected' differ before their last turn")
    return comparison(context, [best, worst], [1, 2], place)


def _column(row: RawRow, name: str) -> Any:
    if row.values.get(name) is None:
        what = "is null in this row" if name in row.values else f"the row has {column_names(row)}"
        raise DataError(row.place, "missing column", f"{name!r}; {what}")
    return row.values[name]


def _rows_of(value: Any) -> Any:
    """A list of objects; Hugging Face `Sequence` features store one as an object of lists."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, entry, strict=False)) for entry in zip(*value.values(), strict=False)]
    return value


def _messages(value: Any, name: str, place: Place) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("user", value),)
    value = _rows_of(value)
    if not isinstance(value, list):
        raise DataError(place, "wrong type", f"{name!r} must be text or a list of messages, is {type(value).__name__}")
    return tuple(_message(turn, name, place) for turn in value)


def _message(turn: Any, name: str, place: Place) -> Message:
    role = turn.get("role") if isinstance(turn, dict) else None
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(role, str) or not isinstance(content, str):
        wanted = f"a message of {name!r} must be {{role: text, content: text}}"
        raise DataError(place, "wrong type", f"{wanted}, is {repr(turn)[:80]}")
    if role not in ROLES:
        raise DataError(place, "wrong message roles", f"{role!r} in {name!r}; allowed: {', '.join(ROLES)}")
    return Message(role, content)


def _answer(value: Any, prompt: Sequence[Message], name: str, place: Place) -> str:
    """A response: text, one assistant message, or a full conversation that begins with the prompt."""
    if isinstance(value, str):
        return value
    messages = _messages([value] if isinstance(value, dict) and "role" in value else value, name, place)
    if not messages:
        raise DataError(place, "empty response", f"{name!r} is an empty list")
    if len(messages) > 1 and messages[:-1] != tuple(prompt):
        raise DataError(place, "different contexts", f"{name!r} is a conversation that does not begin with 'prompt'")
    return _last_turn((*prompt, messages[-1]), place)[1]


def _last_turn(messages: Sequence[Message], place: Place) -> tuple[tuple[Message, ...], str]:
    """(context, response) of a conversation that ends with the assistant's turn."""
    check_turns(messages, "assistant", place)
    return tuple(messages[:-1]), messages[-1].content


def _not_empty(text: str, what: str, place: Place) -> str:
    if not text.strip():
        raise DataError(place, f"empty {what}", "only white space" if text else "")
    try:
        text.encode()
    except UnicodeEncodeError as broken:
        raise DataError(place, f"broken {what}", f"half a character (a lone surrogate) at {broken.start}") from broken
    return text


def _rank(value: Any, place: Place) -> int:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value != int(value) or value < 0:
        raise DataError(place, "bad rank", f"{value!r}; a rank is a whole number, 1 (or 0) the best")
    return int(value)


def _same_text_same_rank(responses: Sequence[str], ranks: Sequence[int], place: Place) -> None:
    """One text above itself teaches nothing; the same text twice in a tie is harmless."""
    first: dict[str, int] = {}
    for response, rank in zip(responses, ranks, strict=True):
        if first.setdefault(response, rank) != rank:
            seen = f"ranks {first[response]} and {rank} have the same text, as when chosen equals rejected"
            raise DataError(place, "response above itself", seen)
