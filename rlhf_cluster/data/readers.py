"""Raw rows from files: parquet, arrow, jsonl(.gz), json, Hugging Face dataset directories. Knows no column's meaning.

Everything is streamed: a file larger than memory can be read, except one whole JSON array. Each row carries the file,
its index and, where the file has lines, its line. `on_error` gets what is wrong with a row and may let reading go on;
as a rule it raises. The `datasets` library is not needed: its directories are Arrow streams with a list beside them.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_cluster.data.rows import DataError, Place, RawRow

OnError = Callable[[DataError], None]

BATCH_ROWS = 1024
NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def raise_error(error: DataError) -> NoReturn:
    raise error


def read_rows(path: str | Path, on_error: OnError = raise_error) -> Iterator[RawRow]:
    """The rows of a file, a directory or a glob pattern. Raises DataError where there are none."""
    files = row_files(path)
    seen = False
    for file in files:
        for row in _read_file(file, on_error):
            seen = True
            if row is not None:
                yield row
    if not seen:
        raise DataError(Place(str(path)), "no rows", "the file is readable and holds not a single row")


def row_files(path: str | Path) -> list[Path]:
    """The files that a path stands for, in name order (or in the order that a saved dataset lists)."""
    where = Path(path)
    if where.is_dir():
        return _directory_files(where)
    if where.exists():
        return [where]
    found = sorted(glob.glob(str(path)))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if not found:
        raise DataError(Place(str(path)), "no such file or directory")
    return [Path(name) for name in found]


def _directory_files(where: Path) -> list[Path]:
    if (where / "dataset_dict.json").exists():
        splits = json.loads((where / "dataset_dict.json").read_text("utf-8"))["splits"]
        if len(splits) != 1:
            hint = f"it holds {', '.join(splits)}; name one, as {where}/{splits[0]}"
            raise DataError(Place(str(where)), "several splits", hint)
        return _directory_files(where / splits[0])
    if (where / "state.json").exists():
        state = json.loads((where / "state.json").read_text("utf-8"))
        return [where / entry["filename"] for entry in state["_data_files"]]
    return _shards(where)


def _shards(where: Path) -> list[Path]:
    """A plain directory of shards, or one with a `data/` directory of them, as the hub lays it out."""
    files = [file for file in sorted(where.iterdir()) if _kind(file) and file.name not in NOT_ROWS]
    if not files and (where / "data").is_dir():
        return _shards(where / "data")
    if not files:
        raise DataError(Place(str(where)), "no rows", f"the directory holds no file of {', '.join(READERS)}")
    kinds = sorted({_kind(file) for file in files})
    if len(kinds) > 1:
        raise DataError(Place(str(where)), "several kinds of file", f"{', '.join(kinds)}; name one file or a pattern")
    splits = sorted({split for file in files for split in SPLITS if file.name.startswith((f"{split}-", f"{split}."))})
    if len(splits) > 1:
        hint = f"it holds {', '.join(splits)}; name one, as {where}/{splits[0]}*{_kind(files[0])}"
        raise DataError(Place(str(where)), "several splits", hint)
    return files


def _kind(file: Path) -> str:
    """The ending by which a file is read, the empty text where none fits."""
    name = file.name.lower()
    return next((ending for ending in READERS if name.endswith(ending)), "")


def _read_file(file: Path, on_error: OnError) -> Iterator[RawRow | None]:
    """None stands for a row that `on_error` was told of."""
    if not file.exists():
        raise DataError(Place(str(file)), "no such file or directory")
    if not _kind(file):
        raise DataError(Place(str(file)), "unknown kind of file", f"rows are read from {', '.join(READERS)}")
    if file.stat().st_size == 0:
        raise DataError(Place(str(file)), "empty file")
    try:
        yield from READERS[_kind(file)](file, on_error)
    except (pa.ArrowException, EOFError, gzip.BadGzipFile, zlib.error, OSError) as broken:
        on_error(DataError(Place(str(file)), "unreadable file", f"not a sound {_kind(file)} file ({broken})"))
        yield None


def _read_parquet(file: Path, on_error: OnError) -> Iterator[RawRow]:
    with pq.ParquetFile(file) as parquet:
        yield from _from_batches(file, parquet.iter_batches(batch_size=BATCH_ROWS))


def _read_arrow(file: Path, on_error: OnError) -> Iterator[RawRow]:
    """Both Arrow layouts bear this ending: the IPC file says so in its first bytes, the stream does not."""
    with pa.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            yield from _from_batches(file, (reader.get_batch(i) for i in range(reader.num_record_batches)))
        else:
            source.seek(0)
            yield from _from_batches(file, iter(pa.ipc.open_stream(source)))


def _from_batches(file: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[RawRow]:
    index = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for values in batch.slice(start, BATCH_ROWS).to_pylist():
                yield RawRow(Place(str(file), index), values)
                index += 1


def _read_jsonl(file: Path, on_error: OnError) -> Iterator[RawRow | None]:
    """One JSON object per line; empty lines are skipped. A line that is a bare text is the row `{"prompt": text}`."""
    with _open(file) as lines:
        index = 0
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_row(line, Place(str(file), index, number), on_error)
                index += 1


def _json_row(line: bytes, place: Place, on_error: OnError) -> RawRow | None:
    try:
        return _as_row(json.loads(line.decode("utf-8-sig")), place)
    except UnicodeDecodeError as broken:
        on_error(DataError(place, "not UTF-8", f"byte {broken.start} of the line"))
    except json.JSONDecodeError as broken:
        on_error(DataError(place, "not JSON", f"{broken.msg} at character {broken.pos}"))
    except DataError as broken:
        on_error(broken)
    return None


def _as_row(value: Any, place: Place) -> RawRow:
    if isinstance(value, str):
        return RawRow(place, {"prompt": value})
    if not isinstance(value, dict):
        raise DataError(place, "not a row", f"a JSON object is wanted, this is a {type(value).__name__}")
    return RawRow(place, value)


def _read_json(file: Path, on_error: OnError) -> Iterator[RawRow | None]:
    """An array of objects; without the opening bracket the file is read as one object per line, as many are."""
    with _open(file) as source:
        is_array = source.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not is_array:
        yield from _read_jsonl(file, on_error)
        return
    with _open(file) as source:
        try:
            values = json.loads(source.read().decode("utf-8-sig"))
        except UnicodeDecodeError as broken:
            raise DataError(Place(str(file)), "not UTF-8", f"byte {broken.start}") from broken
        except json.JSONDecodeError as broken:
            raise DataError(Place(str(file), line=broken.lineno), "not JSON", broken.msg) from broken
    for index, value in enumerate(values):
        try:
            yield _as_row(value, Place(str(file), index))
        except DataError as error:
            on_error(error)
            yield None


def _open(file: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb")


READERS: dict[str, Callable[[Path, OnError], Iterator[RawRow | None]]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".json.gz": _read_json,
}
