"""Running text for the pretraining mix: documents from files, joined and cut into blocks.

Takes rows with a `text` column (any kind of file that `readers` reads) or plain `.txt` files, each a document; gives
`Pretraining`. EOS stands after every document; the last piece, shorter than a block, falls away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from rlhf_cluster.data.readers import read_rows, row_files
from rlhf_cluster.data.rows import DataError, Place, RawRow, column_names
from rlhf_cluster.data.tokenize import Tokenizer
from rlhf_cluster.records import Pretraining


def read_texts(path: str) -> Iterator[str]:
    """The documents of a file, a directory or a pattern. Raises DataError for none at all, or a row without text."""
    if is_plain_text(path):
        yield from _plain_texts(path)
        return
    yield from map(text_of, read_rows(path))


def is_plain_text(path: str) -> bool:
    """Whether a path names files of text itself, each a document, and not of rows."""
    return path.lower().endswith(".txt")


def text_of(row: RawRow) -> str:
    """The document of a row. Raises DataError where there is none."""
    text = row.values.get("text")
    if not isinstance(text, str):
        raise DataError(row.place, "missing column", f"'text'; the row has {column_names(row)}")
    return text


def text_tokens(texts: Iterable[str], tokenizer: Tokenizer) -> list[int]:
    """The length of each document in tokens, without the EOS after it."""
    return [len(_ids(text, tokenizer)) for text in texts]


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Of a document, which may be longer than a model reads at once: transformers would warn of that."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _plain_texts(path: str) -> Iterator[str]:
    for file in row_files(path):
        try:
            yield file.read_text("utf-8")
        except UnicodeDecodeError as broken:
            raise DataError(Place(str(file)), "unreadable file", f"not UTF-8 text ({broken.reason})") from broken


def pack_texts(texts: Iterable[str], tokenizer: Tokenizer, tokens: int, place: Place) -> Pretraining:
    """Blocks of `tokens` tokens each. Raises DataError where the text does not fill one."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(place, "the tokenizer has no EOS token", "every document ends with one; set it")
    documents = [np.array([*_ids(text, tokenizer), eos], np.int32) for text in texts]
    ids = np.concatenate([np.empty(0, np.int32), *documents])
    count = len(ids) // tokens
    if not count:
        raise DataError(place, "too little text", f"{len(ids)} tokens; an example of the pretraining mix has {tokens}")
    return Pretraining.of({"token_ids": list(ids[: count * tokens].reshape(count, tokens))})
