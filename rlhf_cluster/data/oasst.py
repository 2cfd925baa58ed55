"""Open Assistant's conversation trees with human rankings of sibling replies (Köpf et al. 2023, arXiv:2304.07327).

One raw row is one tree: a prompter's message with replies, each an assistant's message with replies, and so on. Of it:
a prompt for every prompter's message (with the conversation before it), a comparison for every one with two or more
ranked replies, a demonstration for every reply that people ranked first. In the file rank 0 is the best; equal ranks
are ties; replies without a rank and deleted messages (with all below them) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf_cluster.data.parse import check_turns, comparison, demonstration, prompt_row
from rlhf_cluster.data.rows import (
    ComparisonRow,
    DataError,
    DemonstrationRow,
    Message,
    Place,
    PromptRow,
    RawRow,
    column_names,
)

Path = tuple[Message, ...]

ROLE = {"prompter": "user", "assistant": "assistant"}


@dataclass
class Tree:
    """What one tree gives."""

    prompts: list[PromptRow] = field(default_factory=list)
    demonstrations: list[DemonstrationRow] = field(default_factory=list)
    comparisons: list[ComparisonRow] = field(default_factory=list)


def looks_like_oasst(row: RawRow) -> bool:
    root = row.values.get("prompt")
    return isinstance(root, dict) and "replies" in root


def parse_oasst(row: RawRow, on_error: Callable[[DataError], None]) -> Tree:
    """A tree with what can be used of it; `on_error` is told of each comparison or message that cannot."""
    if not looks_like_oasst(row):
        wanted = "'prompt' with 'replies', a conversation tree"
        raise DataError(row.place, "missing column", f"{wanted}; the row has {column_names(row)}")
    tree = Tree()
    for path, replies in _prompter_nodes((), row.values["prompt"], row.place, on_error):
        try:
            _add(tree, path, replies, row.place)
        except DataError as error:
            on_error(error)
    return tree


def _prompter_nodes(
    above: Path, node: dict[str, Any], place: Place, on_error: Callable[[DataError], None]
) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """(conversation, replies) of every prompter's message at or below `node`."""
    try:
        path = (*above, _message(node, place))
        check_turns(path, path[-1].role, place)
    except DataError as error:
        on_error(error)
        return
    replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
    if path[-1].role == "user":
        yield path, replies
    for reply in replies:
        yield from _prompter_nodes(path, reply, place, on_error)


def _message(node: dict[str, Any], place: Place) -> Message:
    role, text = node.get("role"), node.get("text")
    if role not in ROLE or not isinstance(text, str):
        raise DataError(place, "wrong message roles", f"{role!r}; a message has a text and a role of {', '.join(ROLE)}")
    return Message(ROLE[role], text)


def _add(tree: Tree, path: Path, replies: list[dict[str, Any]], place: Place) -> None:
    """Adds what one prompter's message gives; a ranking that cannot be used still leaves the prompt."""
    tree.prompts.append(prompt_row(path, place))
    ranked = [reply for reply in replies if reply.get("rank") is not None]
    texts, ranks = [reply.get("text") or "" for reply in ranked], [reply["rank"] for reply in ranked]
    if len(ranked) >= 2:
        tree.comparisons.append(comparison(path, texts, ranks, place))
    best = [text for text, rank in zip(texts, ranks, strict=True) if rank == 0]
    tree.demonstrations.extend([demonstration(path, text, place) for text in best])
