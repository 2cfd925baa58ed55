"""Anthropic's hh-rlhf: `chosen` and `rejected` are whole dialogues as one text (Bai et al. 2022, arXiv:2204.05862).

    "\\n\\nHuman: ...\\n\\nAssistant: ...\\n\\nHuman: ...\\n\\nAssistant: RESPONSE"

Takes one raw row, gives one comparison. The two dialogues agree up to the last assistant turn; the few rows that do
not raise DataError, as do empty responses and turns that do not alternate.
"""

from __future__ import annotations

import re

from rlhf_cluster.data.parse import comparison
from rlhf_cluster.data.rows import ComparisonRow, DataError, Message, Place, RawRow, column_names

TURN = re.compile(r"\n\n(Human|Assistant):")
LAST = "\n\nAssistant:"
ROLE = {"Human": "user", "Assistant": "assistant"}


def looks_like_hh(row: RawRow) -> bool:
    texts = (row.values.get("chosen"), row.values.get("rejected"))
    return all(isinstance(text, str) and text.startswith("\n\nHuman:") for text in texts)


def parse_hh(row: RawRow) -> ComparisonRow:
    chosen_context, chosen = _split(row, "chosen")
    rejected_context, rejected = _split(row, "rejected")
    if chosen_context != rejected_context:
        raise DataError(row.place, "different contexts", "'chosen' and 'rejected' differ before their last turn")
    return comparison(_turns(chosen_context, row.place), [chosen, rejected], [1, 2], row.place)


def _split(row: RawRow, name: str) -> tuple[str, str]:
    """(context, response) at the last assistant turn."""
    text = row.values.get(name)
    if not isinstance(text, str):
        raise DataError(row.place, "missing column", f"text {name!r}; the row has {column_names(row)}")
    context, found, response = text.rpartition(LAST)
    if not found or TURN.search(response):
        raise DataError(row.place, "no last assistant turn", f"{name!r} does not end with an assistant turn")
    return context, response.strip()


def _turns(context: str, place: Place) -> list[Message]:
    before, *parts = TURN.split(context)
    if before.strip() or not parts:
        raise DataError(place, "no human turn", "a dialogue begins with a blank line and 'Human:'")
    return [Message(ROLE[who], text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]
