"""What flows between rooms: one frozen type per stage, each an immutable Arrow table checked at the door that makes it.

Legend of shapes: `P` prompt tokens, `R` response tokens, `B` sequences, `T` padded length, `K` ranked responses.
A per-token array of length R speaks of the response token at the same index: its logprob, the value before it, its
advantage. No other frame exists between rooms.

A record is columnar and ragged: per-token data are list columns. Arrow goes through Ray's object store without a copy,
is sliced without a copy, and lies down as Parquet as it is. This module knows nothing of torch, Ray or configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

R = TypeVar("R", bound="Record")

TOKENS = pa.list_(pa.int32())
PER_TOKEN = pa.list_(pa.float32())
QUARANTINED = "quarantined"  # begins why there is no response, or no score, of a sample that workers were lost over


class RecordError(ValueError):
    """A table that is not what its record promises."""


class Column:
    """A column of a record: declares its Arrow type, reads it as numpy (numbers), `list[str]` (text) or views
    (lists)."""

    def __init__(self, type_: pa.DataType, per_token: bool = False) -> None:
        self.type = type_
        self.per_token = per_token

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, record: Record | None, owner: type) -> Any:
        if record is None:
            return self
        # Read once: kept under the column's own name, which then stands before this descriptor. Tables do not change.
        value = vars(record)[self.name] = _read(record.table.column(self.name))
        return value


def _read(column: pa.ChunkedArray) -> Any:
    # Combining copies, even a single chunk.
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if pa.types.is_list(array.type):
        return _views(array)
    if pa.types.is_string(array.type):
        return array.to_pylist()
    return array.to_numpy(zero_copy_only=False)


def _views(array: pa.ListArray) -> list[Any]:
    """A list column as one numpy view per row (a list of views where lists are nested)."""
    offsets = array.offsets.to_numpy()
    if pa.types.is_list(array.values.type):
        inner = _views(array.values)
        return [inner[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
    values = array.values.to_numpy(zero_copy_only=False)
    return [values[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]


@dataclass(frozen=True, eq=False)
class Record:
    """A table with at least the columns that its class declares; more columns are the row's own and travel along."""

    table: pa.Table
    COLUMNS: ClassVar[dict[str, Column]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = {name: column for name, column in vars(cls).items() if isinstance(column, Column)}
        cls.COLUMNS = {**cls.COLUMNS, **own}

    def __post_init__(self) -> None:
        self._check(self.COLUMNS)

    def _check(self, names: Iterable[str]) -> None:
        kind, table, schema = type(self).__name__, self.table, self.table.schema
        for name in names:
            column, place = self.COLUMNS[name], schema.get_field_index(name)
            if place < 0:
                raise RecordError(f"{kind} has no column {name!r}; it has {table.column_names}")
            found = schema.field(place).type
            if found != column.type:
                raise RecordError(f"{kind}.{name} is {found}; it must be {column.type}")
            values = table.column(place)
            if values.null_count:
                raise RecordError(f"{kind}.{name} has {values.null_count} missing values of {len(values)}")
            if column.per_token:
                lengths, expected = pc.list_value_length(values), pc.list_value_length(table.column("response_ids"))
                if not lengths.equals(expected):
                    raise RecordError(f"{kind}.{name} does not have one entry for each response token")

    @classmethod
    def _known(cls, table: pa.Table, checked: type[Record]) -> Self:
        """A record whose columns of `checked` were checked: rows of one, or one that has more columns now. Checks take
        most of the time that the driver has for a small table."""
        record = object.__new__(cls)
        object.__setattr__(record, "table", table)
        record._check([name for name in cls.COLUMNS if name not in checked.COLUMNS])
        return record

    def __reduce__(self) -> tuple[Any, ...]:
        """The table alone travels, not the columns read from it: as a stream of Arrow's own, of which a slice holds
        only its rows. Column by column, as Ray would take a table apart, it takes forty times as long."""
        stream = pa.BufferOutputStream()
        with pa.ipc.new_stream(stream, self.table.schema) as writer:
            writer.write_table(self.table)
        return _arrived, (type(self), stream.getvalue())

    def __len__(self) -> int:
        return self.table.num_rows

    @classmethod
    def schema(cls) -> pa.Schema:
        return pa.schema([(name, column.type) for name, column in cls.COLUMNS.items()])

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[Any]]) -> Self:
        """Builds a record from Python columns; columns beyond the declared ones get the type Arrow infers."""
        arrays = {
            name: pa.array(values, cls.COLUMNS[name].type if name in cls.COLUMNS else None)
            for name, values in columns.items()
        }
        return cls(pa.table(arrays))

    @classmethod
    def empty(cls) -> Self:
        return cls(cls.schema().empty_table())

    @classmethod
    def concat(cls, parts: Iterable[Self]) -> Self:
        """All rows, as the type of the parts, which may promise more than `cls` does."""
        parts = list(parts)
        if not parts:
            return cls.empty()
        kind = type(parts[0])
        if len(parts) == 1:
            return parts[0]
        table = pa.concat_tables([part.table for part in parts], promote_options="default").combine_chunks()
        return kind._known(table, kind) if all(type(part) is kind for part in parts) else kind(table)

    def take(self, rows: Sequence[int] | np.ndarray) -> Self:
        return self._known(self.table.take(pa.array(rows, pa.int64())), type(self))

    def slice(self, start: int, stop: int) -> Self:
        return self._known(self.table.slice(start, stop - start), type(self))

    def extend(self, type_: type[R], columns: Mapping[str, Sequence[Any]]) -> R:
        """This record's rows with more columns, as the record type of the next stage."""
        table = self.table
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, type_.COLUMNS[name].type))
        return type_._known(table, type(self))

    def sort_by(self, column: str) -> Self:
        return self._known(self.table.sort_by(column), type(self))


def _arrived(kind: type[R], stream: pa.Buffer) -> R:
    """The other end of `Record.__reduce__`: views of what came, which was checked where it was made."""
    return kind._known(pa.ipc.open_stream(stream).read_all(), kind)


@dataclass(frozen=True, eq=False)
class Prompts(Record):
    """Inputs to the policy; further columns are the row's own (an answer, a source), for reward functions that ask."""

    prompt_id = Column(pa.string())
    prompt_ids = Column(TOKENS)


@dataclass(frozen=True, eq=False)
class Demonstrations(Record):
    """What a person would have answered (InstructGPT step 1). `response_ids` ends with EOS."""

    prompt_id = Column(pa.string())
    prompt_ids = Column(TOKENS)
    response_ids = Column(TOKENS)


@dataclass(frozen=True, eq=False)
class Comparisons(Record):
    """K responses of one prompt with their ranks, 1 the best; equal ranks are ties (InstructGPT step 2)."""

    prompt_id = Column(pa.string())
    prompt_ids = Column(TOKENS)
    responses = Column(pa.list_(TOKENS))
    ranks = Column(pa.list_(pa.int32()))


@dataclass(frozen=True, eq=False)
class Pretraining(Record):
    """Blocks of running text, all of one length, for the pretraining mix (InstructGPT eq. 2)."""

    token_ids = Column(TOKENS)


@dataclass(frozen=True, eq=False)
class Members(Prompts):
    """The members of a batch, fixed at admission: which response to sample, and with which seed."""

    step = Column(pa.int64())
    sample_index = Column(pa.int32())
    sample_id = Column(pa.string())
    seed = Column(pa.int64())


@dataclass(frozen=True, eq=False)
class Rollouts(Members):
    """A prompt with one sampled response. `rollout_logprobs` are the sampler's, at the sampling temperature."""

    response_ids = Column(TOKENS)
    rollout_logprobs = Column(PER_TOKEN, per_token=True)
    weight_versions = Column(TOKENS, per_token=True)
    finish_reason = Column(pa.string())
    temperature = Column(pa.float32())
    incarnation = Column(pa.string())


@dataclass(frozen=True, eq=False)
class Scores(Record):
    """What the reward says of a response: one scalar, or why there is none (`failure`, empty where there is; the score
    is then 0). Further columns of each part of it: the scalar `reward/<name>`, the seconds `reward_s/<name>`, and why
    there is none, `reward_failure/<name>`, which need not be the sample's failure."""

    sample_id = Column(pa.string())
    score = Column(pa.float32())
    failure = Column(pa.string())


@dataclass(frozen=True, eq=False)
class RefLogprobs(Record):
    """Logprobs of the response under the frozen reference policy, at the sampling temperature."""

    sample_id = Column(pa.string())
    ref_logprobs = Column(PER_TOKEN)


@dataclass(frozen=True, eq=False)
class ScoredRollouts(Rollouts):
    """A rollout with its score: what the learner takes when no reference is asked for."""

    score = Column(pa.float32())
    failure = Column(pa.string())


@dataclass(frozen=True, eq=False)
class ReferencedRollouts(ScoredRollouts):
    """A scored rollout with the reference's logprobs: what the learner takes when the KL penalty is on."""

    ref_logprobs = Column(PER_TOKEN, per_token=True)


def join(rollouts: Rollouts, scores: Scores, ref: RefLogprobs | None) -> ScoredRollouts:
    """Joins by `sample_id`. Raises RecordError when an answer lacks a sample or speaks of one that was not asked."""
    table = _with_answer(rollouts.table, scores.table)
    if ref is None:
        return ScoredRollouts._known(table, Rollouts)
    return ReferencedRollouts._known(_with_answer(table, ref.table), Rollouts)


def _with_answer(table: pa.Table, answer: pa.Table) -> pa.Table:
    rows = pc.index_in(table.column("sample_id"), value_set=answer.column("sample_id").combine_chunks())
    if rows.null_count or answer.num_rows != table.num_rows:
        raise RecordError(
            f"asked about {table.num_rows} samples, answered about {answer.num_rows}, {rows.null_count} missing"
        )
    matched = answer.take(rows)
    for field in answer.schema:
        if field.name != "sample_id":
            table = table.append_column(field, matched.column(field.name))
    return table


@dataclass(frozen=True)
class Controls:
    """What the driver steers one `update` by: the KL coefficients, in the rewards and in the policy's loss, and by what
    scores are normalised before they are rewards, (score - mean) / std. Where it is not to `learn`, the batch is looked
    at and no weight moves."""

    kl_coef: float
    kl_loss_coef: float = 0.0
    score_mean: float = 0.0
    score_std: float = 1.0
    learn: bool = True


@dataclass(frozen=True)
class UpdateStats:
    """What one `update` of the learner says of itself: scalars by metric name, seconds by part."""

    step: int
    weight_version: int
    metrics: Mapping[str, float]
