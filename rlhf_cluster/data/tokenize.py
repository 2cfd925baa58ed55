"""Records from text rows: the chat template makes the prompt, the response is its own text and one EOS.

    prompt_ids   = the template's text of the conversation, with the generation prompt, tokenised
    response_ids = the response's text, tokenised, + [EOS]

The template alone decides about BOS and other special tokens; nothing is added when its text is tokenised, so BOS
cannot come twice. Where a template is prefix-stable (a conversation's text begins with the text of its beginning), the
two together are what it gives for the whole conversation, up to and with the EOS. Response and prompt are tokenised
apart because the policy, too, continues from whole prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
from jinja2 import TemplateError

from rlhf_cluster.data.drops import Drops
from rlhf_cluster.data.rows import ComparisonRow, DataError, DemonstrationRow, Message, Place, PromptRow, dense_ranks
from rlhf_cluster.data.split import TooLong
from rlhf_cluster.records import Comparisons, Demonstrations, Prompts, Record

R = TypeVar("R", bound=Record)


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any
    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> Any: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> Any: ...


@dataclass(frozen=True)
class Encoded(Generic[R]):
    """A record and, by reason, how many rows (or single responses of a ranking) were dropped on the way to it."""

    record: R
    dropped: dict[str, int]


def encode_prompts(
    rows: Sequence[PromptRow], tokenizer: Tokenizer, max_prompt_tokens: int, too_long: TooLong = "refuse"
) -> Encoded[Prompts]:
    """Prompts with the rows' own columns (null where a row has none).

    Raises DataError for a prompt of more than `max_prompt_tokens` tokens, or drops it where `too_long` is "drop".
    """
    gate = _Gate(too_long)
    kept: list[PromptRow] = []
    ids: list[list[int]] = []
    for row in rows:
        with gate:
            ids.append(_checked_prompt(row, tokenizer, max_prompt_tokens))
            kept.append(row)
    table = _table(Prompts, {"prompt_id": [row.id for row in kept], "prompt_ids": ids}, rows, gate)
    return Encoded(Prompts(_with_own_columns(table, kept)), gate.drops.counts())


def encode_demonstrations(
    rows: Sequence[DemonstrationRow],
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    max_tokens: int,
    too_long: TooLong = "refuse",
) -> Encoded[Demonstrations]:
    """Demonstrations; `max_tokens` bounds prompt and response together, EOS included (the model's context)."""
    gate = _Gate(too_long)
    columns: dict[str, list[Any]] = {"prompt_id": [], "prompt_ids": [], "response_ids": []}
    for row in rows:
        with gate:
            prompt = _checked_prompt(row.prompt, tokenizer, max_prompt_tokens)
            response = _checked_response(row.response, len(prompt), tokenizer, max_tokens, row.prompt.place)
            _append(columns, row.prompt.id, prompt, response)
    table = _table(Demonstrations, columns, [row.prompt for row in rows], gate)
    return Encoded(Demonstrations(table), gate.drops.counts())


def encode_comparisons(
    rows: Sequence[ComparisonRow],
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    max_tokens: int,
    too_long: TooLong = "refuse",
) -> Encoded[Comparisons]:
    """Comparisons; `max_tokens` bounds the prompt and each single response together, EOS included.

    Where too long responses are dropped, the ranking of the others stays if at least one pair of it has a winner.
    """
    gate = _Gate(too_long)
    columns: dict[str, list[Any]] = {"prompt_id": [], "prompt_ids": [], "responses": [], "ranks": []}
    for row in rows:
        with gate:
            prompt = _checked_prompt(row.prompt, tokenizer, max_prompt_tokens)
            responses, ranks = _ranked_responses(row, len(prompt), tokenizer, max_tokens, gate)
            _append(columns, row.prompt.id, prompt, responses, ranks)
    table = _table(Comparisons, columns, [row.prompt for row in rows], gate)
    return Encoded(Comparisons(table), gate.drops.counts())


def prompt_tokens(messages: Iterable[Message], tokenizer: Tokenizer, place: Place) -> list[int]:
    """The conversation as the policy sees it before it answers. Raises DataError where the template refuses it."""
    if not tokenizer.chat_template:
        raise DataError(place, "the tokenizer has no chat template", "set model.chat_template")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError as refusal:
        raise DataError(place, "the chat template refuses the conversation", str(refusal)) from refusal
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def response_tokens(text: str, tokenizer: Tokenizer, place: Place) -> list[int]:
    """The response's tokens, ending with the one EOS in it. Raises DataError where the text itself holds EOS."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(place, "the tokenizer has no EOS token", "every response ends with one; set it")
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if eos in ids:
        raise DataError(place, "EOS inside a response", f"token {eos} at position {ids.index(eos)} of {len(ids)}")
    return [*ids, eos]


class _Gate:
    """`with gate:` around a row: its DataError rises, or is counted and the loop goes on to the next row."""

    def __init__(self, too_long: TooLong) -> None:
        self._drop = too_long == "drop"
        self.drops = Drops()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not self._drop or not isinstance(error, DataError):
            return False
        self.drops.add(error)
        return True


def _checked_prompt(row: PromptRow, tokenizer: Tokenizer, most: int) -> list[int]:
    ids = prompt_tokens(row.messages, tokenizer, row.place)
    if len(ids) > most:
        raise DataError(row.place, "prompt too long", f"{len(ids)} tokens; allowed are data.max_prompt_tokens={most}")
    return ids


def _checked_response(text: str, prompt: int, tokenizer: Tokenizer, most: int, place: Place) -> list[int]:
    ids = response_tokens(text, tokenizer, place)
    if prompt + len(ids) > most:
        seen = f"{prompt} prompt + {len(ids)} response tokens; the model's context takes {most}"
        raise DataError(place, "response too long", seen)
    return ids


def _ranked_responses(
    row: ComparisonRow, prompt: int, tokenizer: Tokenizer, most: int, gate: _Gate
) -> tuple[list[list[int]], tuple[int, ...]]:
    responses: list[list[int]] = []
    ranks: list[int] = []
    for text, rank in zip(row.responses, row.ranks, strict=True):
        with gate:
            responses.append(_checked_response(text, prompt, tokenizer, most, row.prompt.place))
            ranks.append(rank)
    if len(set(ranks)) < 2 and len(ranks) < len(row.ranks):
        raise DataError(row.prompt.place, "no ranked pair left", f"{len(ranks)} of {len(row.ranks)} responses fit")
    return responses, dense_ranks(ranks)


def _append(columns: dict[str, list[Any]], *values: Any) -> None:
    for column, value in zip(columns.values(), values, strict=True):
        column.append(value)


def _table(kind: type[Record], columns: dict[str, list[Any]], rows: Sequence[PromptRow], gate: _Gate) -> pa.Table:
    if rows and not columns["prompt_id"]:
        raise DataError(Place(rows[0].place.file), f"nothing is left of {len(rows)} rows", str(gate.drops))
    return kind.of(columns).table


def _with_own_columns(table: pa.Table, rows: Sequence[PromptRow]) -> pa.Table:
    for name in sorted({name for row in rows for name in row.columns}):
        try:
            column = pa.array([row.columns.get(name) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as mixed:
            raise DataError(Place(rows[0].place.file), "column of mixed types", f"{name!r}: {mixed}") from mixed
        table = table.append_column(name, column)
    return table
