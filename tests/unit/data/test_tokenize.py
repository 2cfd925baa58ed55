from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_cluster.data.rows import ComparisonRow, DataError, DemonstrationRow, Message, Place, PromptRow
from rlhf_cluster.data.tokenize import encode_comparisons, encode_demonstrations, encode_prompts

Make = Callable[..., PreTrainedTokenizerFast]

TALK = (Message("user", "hi"), Message("assistant", "hello"), Message("user", "é?"))


def prompt(text: str, row: int = 0, **columns: Any) -> PromptRow:
    return PromptRow.of((Message("user", text),), Place("p.jsonl", row, row + 1), columns)


def length(text: str) -> int:
    """Tokens of a one-turn prompt by the template of the fixture: one per byte, one per special token."""
    return 1 + (1 + len("user\n") + len(text.encode()) + 1 + 1) + (1 + len("assistant\n"))


def test_prompt_ids_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    bos, start, end = tokenizer.convert_tokens_to_ids(["<s>", "<|im_start|>", "<|im_end|>"])
    byte = {
        text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("user\n", "é", "\n", "assistant\n")
    }
    expected = [bos, start, *byte["user\n"], *byte["é"], end, *byte["\n"], start, *byte["assistant\n"]]
    record = encode_prompts([prompt("é")], tokenizer, 100).record
    assert record.prompt_ids[0].tolist() == expected
    assert len(expected) == length("é")
    assert record.prompt_id == [prompt("é").id]


def test_bos_comes_once_though_template_and_tokenizer_both_add_it(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    ids = encode_prompts([prompt("x")], tokenizer, 100).record.prompt_ids[0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    row = DemonstrationRow(prompt("x"), "y")
    response = encode_demonstrations([row], tokenizer, 100, 200).record.response_ids[0].tolist()
    assert tokenizer.bos_token_id not in response


def test_prompt_and_response_are_what_the_template_gives_up_to_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    row = DemonstrationRow(PromptRow.of(TALK, Place("x")), "so it is")
    record = encode_demonstrations([row], tokenizer, 200, 300).record
    turns = [{"role": turn.role, "content": turn.content} for turn in (*TALK, Message("assistant", "so it is"))]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    ours = [*record.prompt_ids[0].tolist(), *record.response_ids[0].tolist()]
    assert ours == whole[: len(ours)]
    assert tokenizer.decode(whole[len(ours) :]) == "\n"
    assert ours[-1] == tokenizer.eos_token_id


def test_comparisons_keep_all_responses_with_their_ranks(tokenizer: PreTrainedTokenizerFast) -> None:
    row = ComparisonRow(prompt("u"), ("a", "bb", "c"), (2, 1, 2))
    record = encode_comparisons([row], tokenizer, 100, 200).record
    texts = [tokenizer.decode(ids.tolist()) for ids in record.responses[0]]
    assert texts == ["a<|im_end|>", "bb<|im_end|>", "c<|im_end|>"]
    assert record.ranks[0].tolist() == [2, 1, 2]


def test_own_columns_travel_and_are_null_where_a_row_has_none(tokenizer: PreTrainedTokenizerFast) -> None:
    record = encode_prompts([prompt("a", answer=1), prompt("b", source="x")], tokenizer, 100).record
    assert record.table.column("answer").to_pylist() == [1, None]
    assert record.table.column("source").to_pylist() == [None, "x"]


def test_a_column_of_mixed_types_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"p\.jsonl: column of mixed types: 'answer'"):
        encode_prompts([prompt("a", answer=1), prompt("b", answer="x")], tokenizer, 100)


def test_a_prompt_may_have_just_as_many_tokens_as_allowed(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(encode_prompts([prompt("abc")], tokenizer, length("abc")).record) == 1
    with pytest.raises(DataError) as caught:
        encode_prompts([prompt("abc", row=4)], tokenizer, length("abc") - 1)
    most = length("abc") - 1
    expected = f"p.jsonl, line 5: prompt too long: {most + 1} tokens; allowed are data.max_prompt_tokens={most}"
    assert str(caught.value) == expected


def test_dropping_keeps_the_others_and_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [prompt("abc"), prompt("abcd", answer=1), prompt("ab"), prompt("abcde")]
    encoded = encode_prompts(rows, tokenizer, length("abc"), "drop")
    assert encoded.record.prompt_id == [rows[0].id, rows[2].id]
    assert encoded.dropped == {"prompt too long": 2}


def test_the_context_bounds_prompt_and_response_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    row = DemonstrationRow(prompt("u"), "abc")
    fits = length("u") + len("abc") + 1
    assert len(encode_demonstrations([row], tokenizer, 100, fits).record) == 1
    with pytest.raises(
        DataError, match=f"response too long: {length('u')} prompt \\+ 4 response tokens; .* {fits - 1}"
    ):
        encode_demonstrations([row], tokenizer, 100, fits - 1)


def ranking(lengths: Sequence[int], ranks: tuple[int, ...]) -> ComparisonRow:
    return ComparisonRow(prompt("u"), tuple("abcdefgh"[i] * size for i, size in enumerate(lengths)), ranks)


@pytest.mark.parametrize(
    ("row", "kept", "dropped"),
    [
        (ranking((2, 50, 3), (3, 1, 2)), [2, 1], {"response too long": 1}),
        (ranking((2, 50, 3), (2, 1, 2)), None, {"response too long": 1, "no ranked pair left": 1}),
        (ranking((2, 50), (2, 1)), None, {"response too long": 1, "no ranked pair left": 1}),
    ],
)
def test_a_ranking_without_its_too_long_responses(
    tokenizer: PreTrainedTokenizerFast, row: ComparisonRow, kept: list[int] | None, dropped: dict[str, int]
) -> None:
    other = ranking((1, 1), (1, 2))
    encoded = encode_comparisons([row, other], tokenizer, 100, length("u") + 10, "drop")
    assert [ranks.tolist() for ranks in encoded.record.ranks] == ([kept] if kept else []) + [[1, 2]]
    assert encoded.dropped == dropped
    with pytest.raises(DataError, match="response too long"):
        encode_comparisons([row], tokenizer, 100, length("u") + 10)


def test_nothing_left_is_an_error_that_says_why(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"p\.jsonl: nothing is left of 2 rows: 2 prompt too long"):
        encode_prompts([prompt("a"), prompt("b")], tokenizer, 3, "drop")


def test_no_rows_are_an_empty_record(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(encode_prompts([], tokenizer, 3).record) == 0
    assert encode_comparisons([], tokenizer, 3, 3).record.table.schema.field("responses").type == pa.list_(
        pa.list_(pa.int32())
    )


def test_eos_within_a_response_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"line 1: EOS inside a response: token 2 at position 1 of 3"):
        encode_demonstrations([DemonstrationRow(prompt("u"), "a<|im_end|>b")], tokenizer, 100, 200)


def test_a_tokenizer_without_template_or_eos_is_refused(make_tokenizer: Make) -> None:
    row = DemonstrationRow(prompt("u"), "a")
    with pytest.raises(DataError, match="no chat template"):
        encode_demonstrations([row], make_tokenizer(template=None), 100, 200)
    with pytest.raises(DataError, match="no EOS token"):
        encode_demonstrations([row], make_tokenizer(eos=None), 100, 200)


def test_a_template_that_refuses_a_role_names_the_row(make_tokenizer: Make) -> None:
    strict = make_tokenizer(template="{{ raise_exception('only user turns') }}")
    with pytest.raises(
        DataError, match=r"p\.jsonl, line 3: the chat template refuses the conversation: only user turns"
    ):
        encode_prompts([prompt("u", row=2)], strict, 100)
