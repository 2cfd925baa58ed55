from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_cluster.data.readers import read_rows
from rlhf_cluster.data.rows import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "completions": [{"completion": "x", "rank": 1}, {"completion": "ÿ", "rank": 2}]},
    {"prompt": "b", "completions": [{"completion": "z", "rank": 1}]},
    {"prompt": "c", "completions": []},
]
TABLE = pa.Table.from_pylist(ROWS)
LINES = "\n".join(json.dumps(row) for row in ROWS) + "\n"


def write(path: Path, kind: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pq.write_table(TABLE, path, row_group_size=2)
    elif kind == "ipc file":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, TABLE.schema) as writer:
            writer.write_table(TABLE, max_chunksize=2)
    elif kind == "ipc stream":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, TABLE.schema) as writer:
            writer.write_table(TABLE, max_chunksize=2)
    elif kind == "gzip":
        path.write_bytes(gzip.compress(LINES.encode()))
    elif kind == "array":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_text(LINES)
    return path


FILES = [
    ("a.parquet", "parquet"),
    ("a.arrow", "ipc file"),
    ("a.arrow", "ipc stream"),
    ("a.jsonl", "lines"),
    ("a.jsonl.gz", "gzip"),
    ("a.json", "array"),
    ("a.json", "lines"),
    ("A.JSONL", "lines"),
]


@pytest.mark.parametrize(("name", "kind"), FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, kind: str) -> None:
    path = write(tmp_path / name, kind)
    rows = list(read_rows(path))
    assert [row.values for row in rows] == ROWS
    assert [(row.place.file, row.place.row) for row in rows] == [(str(path), index) for index in range(3)]


def test_lines_count_from_one_and_empty_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n"only text"\n', encoding="utf-8")
    rows = list(read_rows(path))
    assert [(row.place.row, row.place.line, row.values) for row in rows] == [
        (0, 1, {"a": 1}),
        (1, 3, {"prompt": "only text"}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2: not JSON: Expecting value"),
        (b'{"a": 1}\n[1]\n', "line 2: not a row: a JSON object is wanted, this is a list"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not UTF-8"),
        (b"", "empty file"),
        (b"\n\n", "no rows"),
    ],
)
def test_a_bad_jsonl_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_handler_lets_reading_go_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"a": 3}\n')
    errors: list[DataError] = []
    assert [row.values["a"] for row in read_rows(path, errors.append)] == [1, 3]
    assert [(error.place.line, error.reason) for error in errors] == [(2, "not JSON")]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz"])
def test_garbage_and_cut_files_are_named(tmp_path: Path, name: str) -> None:
    garbage = tmp_path / name
    garbage.write_bytes(b"this is no such file at all")
    with pytest.raises(DataError, match="unreadable file"):
        list(read_rows(garbage))
    whole = write(garbage, dict(FILES)[name] if name != "a.arrow" else "ipc file").read_bytes()
    garbage.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="unreadable file"):
        list(read_rows(garbage))


def test_a_bad_json_array_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n {"a": }]')
    with pytest.raises(DataError, match=r"a\.json, line 2: not JSON"):
        list(read_rows(path))


@pytest.mark.parametrize(("name", "reason"), [("gone.jsonl", "no such file"), ("a.csv", "unknown kind of file")])
def test_missing_and_unknown_files(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "a.csv").write_text("prompt\n")
    with pytest.raises(DataError, match=reason):
        list(read_rows(tmp_path / name))


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    pq.write_table(TABLE.slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no rows"):
        list(read_rows(tmp_path / "a.parquet"))


def test_a_saved_dataset_is_read_in_the_order_that_it_lists(tmp_path: Path) -> None:
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for name in names:
        write(tmp_path / name, "ipc stream")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    rows = list(read_rows(tmp_path))
    assert [Path(row.place.file).name for row in rows] == [name for name in names for _ in ROWS]
    assert [row.values for row in rows] == ROWS * 2


def test_a_saved_dataset_dict_of_one_split_is_that_split(tmp_path: Path) -> None:
    write(tmp_path / "train" / "data-0.arrow", "ipc stream")
    (tmp_path / "train" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    assert len(list(read_rows(tmp_path))) == 3
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(DataError, match=r"several splits: it holds train, test; name one, as .*/train"):
        list(read_rows(tmp_path))


def test_a_shard_that_is_listed_and_not_there(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    with pytest.raises(DataError, match=r"data-0\.arrow: no such file"):
        list(read_rows(tmp_path))


def test_a_directory_as_the_hub_lays_it_out(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "dataset_infos.json").write_text("{}")
    for index in (1, 0):
        write(tmp_path / "data" / f"train-0000{index}-of-00002.parquet", "parquet")
    rows = list(read_rows(tmp_path))
    assert [Path(row.place.file).name[:11] for row in rows] == ["train-00000"] * 3 + ["train-00001"] * 3
    write(tmp_path / "data" / "test-00000-of-00001.parquet", "parquet")
    with pytest.raises(DataError, match="several splits"):
        list(read_rows(tmp_path))
    assert len(list(read_rows(tmp_path / "data" / "train-*.parquet"))) == 6


def test_a_directory_of_two_kinds_or_of_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        list(read_rows(tmp_path))
    write(tmp_path / "a.parquet", "parquet")
    write(tmp_path / "a.jsonl", "lines")
    with pytest.raises(DataError, match=r"several kinds of file: \.jsonl, \.parquet"):
        list(read_rows(tmp_path))
