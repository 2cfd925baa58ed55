"""Running text: documents from files, and blocks of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_cluster.data.rows import DataError, Place
from rlhf_cluster.data.text import pack_texts, read_texts


def test_documents_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two")))
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    (tmp_path / "1.txt").write_text("one")
    (tmp_path / "2.txt").write_text("two")
    for name in ("a.jsonl", "a.parquet", "*.txt"):
        assert list(read_texts(str(tmp_path / name))) == ["one", "two"]


def test_blocks_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    """Two documents of 3 and 2 bytes and an EOS each make 7 tokens: 2 blocks of 3, and one token falls away."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("abc", "de")]
    expected = [*ids[0], tokenizer.eos_token_id, *ids[1]]
    blocks = pack_texts(["abc", "de"], tokenizer, 3, Place("t"))
    assert [block.tolist() for block in blocks.token_ids] == [expected[:3], expected[3:6]]


def test_what_cannot_be_used_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: missing column: 'text'; the row has body"):
        list(read_texts(str(tmp_path / "rows.jsonl")))
    with pytest.raises(DataError, match=r"gone\.txt: no such file"):
        list(read_texts(str(tmp_path / "gone.txt")))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary\.txt: unreadable file: not UTF-8 text"):
        list(read_texts(str(tmp_path / "binary.txt")))
    with pytest.raises(DataError, match=r"t: too little text: 4 tokens; an example of the pretraining mix has 5"):
        pack_texts(["abc"], tokenizer, 5, Place("t"))
    with pytest.raises(DataError, match="no EOS token"):
        pack_texts(["abc"], make_tokenizer(eos=None), 2, Place("t"))
