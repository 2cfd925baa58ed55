"""Records: checked at the door that makes them, read without a copy, joined by sample id."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_cluster.records import (
    Comparisons,
    Members,
    Prompts,
    RecordError,
    ReferencedRollouts,
    RefLogprobs,
    Rollouts,
    ScoredRollouts,
    Scores,
    join,
)

ROLLOUTS: dict[str, list[Any]] = {
    "prompt_id": ["p", "q", "p"],
    "prompt_ids": [[1, 2], [3], [1, 2]],
    "step": [0, 0, 0],
    "sample_index": [0, 0, 1],
    "sample_id": ["0/p/0", "0/q/0", "0/p/1"],
    "seed": [11, 12, 13],
    "response_ids": [[4, 5, 6], [7], [8, 9]],
    "rollout_logprobs": [[-0.5, -1.0, -1.5], [-2.0], [-2.5, -3.0]],
    "weight_versions": [[0, 0, 1], [0], [0, 1]],
    "finish_reason": ["stop", "length", "stop"],
    "temperature": [1.0, 1.0, 1.0],
    "incarnation": ["a", "a", "b"],
}


@pytest.fixture
def rollouts() -> Rollouts:
    return Rollouts.of(ROLLOUTS)


def test_columns_are_inherited_in_the_order_of_the_stages() -> None:
    assert list(Prompts.COLUMNS) == ["prompt_id", "prompt_ids"]
    assert list(Members.COLUMNS) == ["prompt_id", "prompt_ids", "step", "sample_index", "sample_id", "seed"]
    assert list(ReferencedRollouts.COLUMNS)[-3:] == ["score", "failure", "ref_logprobs"]
    assert Rollouts.schema().field("response_ids").type == pa.list_(pa.int32())


def test_columns_are_read_by_kind(rollouts: Rollouts) -> None:
    assert len(rollouts) == 3
    assert rollouts.sample_id == ["0/p/0", "0/q/0", "0/p/1"]
    assert rollouts.seed.tolist() == [11, 12, 13]
    assert [row.tolist() for row in rollouts.response_ids] == ROLLOUTS["response_ids"]
    assert rollouts.rollout_logprobs[0].dtype == np.float32


def test_list_columns_are_views_also_of_a_slice(rollouts: Rollouts) -> None:
    part = rollouts.slice(1, 3)
    assert [row.tolist() for row in part.response_ids] == [[7], [8, 9]]
    assert not any(row.flags.owndata for row in part.response_ids)


def test_nested_lists_are_rows_of_views() -> None:
    comparisons = Comparisons.of(
        {
            "prompt_id": ["p", "q"],
            "prompt_ids": [[1], [2]],
            "responses": [[[3, 4], [5]], [[6], [7, 8, 9], [10]]],
            "ranks": [[1, 2], [2, 1, 2]],
        }
    )
    second = comparisons.slice(1, 2)
    assert [response.tolist() for response in second.responses[0]] == [[6], [7, 8, 9], [10]]
    assert second.ranks[0].tolist() == [2, 1, 2]


def test_a_missing_column_is_named() -> None:
    with pytest.raises(RecordError, match=r"Prompts has no column 'prompt_ids'; it has \['prompt_id'\]"):
        Prompts(pa.table({"prompt_id": ["p"]}))


def test_a_column_of_another_type_is_named() -> None:
    with pytest.raises(RecordError, match=r"Prompts\.prompt_ids is list<.*int64>; it must be list<.*int32>"):
        Prompts(pa.table({"prompt_id": ["p"], "prompt_ids": [[1]]}))


def test_missing_values_are_counted() -> None:
    with pytest.raises(RecordError, match=r"Prompts\.prompt_id has 1 missing values of 2"):
        Prompts.of({"prompt_id": ["p", None], "prompt_ids": [[1], [2]]})


@pytest.mark.parametrize("column", ["rollout_logprobs", "weight_versions"])
def test_per_token_columns_have_one_entry_per_response_token(column: str) -> None:
    short = [row[1:] for row in ROLLOUTS[column]]
    with pytest.raises(RecordError, match=rf"Rollouts\.{column} does not have one entry for each response token"):
        Rollouts.of({**ROLLOUTS, column: short})


def test_per_token_lengths_are_compared_across_chunks(rollouts: Rollouts) -> None:
    """Tables that were concatenated without a copy come in chunks that need not meet."""
    halves = pa.chunked_array(
        [
            rollouts.table.column("rollout_logprobs").slice(0, 2).combine_chunks(),
            rollouts.table.column("rollout_logprobs").slice(2).combine_chunks(),
        ]
    )
    index = rollouts.table.column_names.index("rollout_logprobs")
    assert len(Rollouts(rollouts.table.set_column(index, "rollout_logprobs", halves))) == 3


def test_a_rows_own_columns_travel_along(rollouts: Rollouts) -> None:
    prompts = Prompts.of({"prompt_id": ["p", "q"], "prompt_ids": [[1], [2]], "answer": ["4", "5"]})
    assert prompts.take([1]).table.column("answer").to_pylist() == ["5"]


def test_take_and_sort_keep_rows_whole(rollouts: Rollouts) -> None:
    assert rollouts.take([2, 0]).seed.tolist() == [13, 11]
    assert rollouts.sort_by("sample_id").seed.tolist() == [11, 13, 12]
    assert type(rollouts.take(np.array([0]))) is Rollouts


def test_concat_of_slices_is_the_whole(rollouts: Rollouts) -> None:
    again = Rollouts.concat([rollouts.slice(0, 1), rollouts.slice(1, 1), rollouts.slice(1, 3)])
    assert again.table.equals(rollouts.table)
    assert again.table.column("response_ids").num_chunks == 1


def test_empty_records_can_be_read() -> None:
    for nothing in (Rollouts.empty(), Rollouts.concat([])):
        assert len(nothing) == 0
        assert nothing.response_ids == [] and nothing.sample_id == [] and nothing.seed.tolist() == []


def test_extend_makes_the_next_stage(rollouts: Rollouts) -> None:
    members = Members(rollouts.table.select(list(Members.COLUMNS)))
    added = {name: ROLLOUTS[name] for name in Rollouts.COLUMNS if name not in Members.COLUMNS}
    assert members.extend(Rollouts, added).table.equals(rollouts.table)
    assert members.table.num_columns == 6  # a record is not filled in


def test_join_is_by_sample_id_in_the_rollouts_order(rollouts: Rollouts) -> None:
    scores = Scores.of(
        {
            "sample_id": ["0/q/0", "0/p/1", "0/p/0"],
            "score": [2.0, 3.0, 1.0],
            "failure": [""] * 3,
            "politeness": [0.2, 0.3, 0.1],
        }
    )
    scored = join(rollouts, scores, None)
    assert type(scored) is ScoredRollouts
    assert scored.sample_id == rollouts.sample_id
    assert scored.score.tolist() == [1.0, 2.0, 3.0]
    assert scored.table.column("politeness").to_pylist() == [0.1, 0.2, 0.3]  # named parts travel along


def test_join_with_a_reference(rollouts: Rollouts) -> None:
    scores = Scores.of({"sample_id": rollouts.sample_id, "score": [1.0, 2.0, 3.0], "failure": [""] * 3})
    ref = RefLogprobs.of(
        {"sample_id": rollouts.sample_id[::-1], "ref_logprobs": [[-1.0, -2.0], [-3.0], [-4.0, -5.0, -6.0]]}
    )
    joined = join(rollouts, scores, ref)
    assert type(joined) is ReferencedRollouts
    assert [row.tolist() for row in joined.ref_logprobs] == [[-4.0, -5.0, -6.0], [-3.0], [-1.0, -2.0]]


def test_join_refuses_a_reference_of_other_tokens(rollouts: Rollouts) -> None:
    scores = Scores.of({"sample_id": rollouts.sample_id, "score": [1.0, 2.0, 3.0], "failure": [""] * 3})
    ref = RefLogprobs.of({"sample_id": rollouts.sample_id, "ref_logprobs": [[-1.0], [-1.0], [-1.0]]})
    with pytest.raises(RecordError, match="one entry for each response token"):
        join(rollouts, scores, ref)


@pytest.mark.parametrize(
    ("answered", "missing"), [(["0/p/0", "0/q/0"], 1), (["0/p/0", "0/q/0", "0/p/1", "0/x/0"], 0), (["0/p/0"] * 3, 2)]
)
def test_join_refuses_answers_about_other_samples(rollouts: Rollouts, answered: list[str], missing: int) -> None:
    scores = Scores.of({"sample_id": answered, "score": [0.0] * len(answered), "failure": [""] * len(answered)})
    with pytest.raises(RecordError, match=f"asked about 3 samples, answered about {len(answered)}, {missing} missing"):
        join(rollouts, scores, None)


def test_parquet_gives_the_record_back(rollouts: Rollouts, tmp_path: Path) -> None:
    pq.write_table(rollouts.table, tmp_path / "rollouts.parquet")
    assert Rollouts(pq.read_table(tmp_path / "rollouts.parquet")).table.equals(rollouts.table)


def test_a_column_is_read_once_and_only_the_table_travels() -> None:
    prompts = Prompts.of({"prompt_id": ["a", "b"], "prompt_ids": [[1, 2], [3]]})
    untouched = len(pickle.dumps(prompts))
    assert prompts.prompt_ids is prompts.prompt_ids and prompts.prompt_id is prompts.prompt_id
    assert len(pickle.dumps(prompts)) == untouched
    again = pickle.loads(pickle.dumps(prompts))
    assert vars(again).keys() == {"table"} and again.prompt_id == ["a", "b"]
    assert [ids.tolist() for ids in again.prompt_ids] == [[1, 2], [3]]


@pytest.mark.parametrize("span", [(0, 3), (1, 2), (0, 0)])
def test_of_a_slice_only_its_rows_travel_and_arrive_without_a_copy(rollouts: Rollouts, span: tuple[int, int]) -> None:
    many = Rollouts.concat([rollouts] * 100)
    sent: list[pickle.PickleBuffer] = []
    told = pickle.dumps(many.slice(*span), protocol=5, buffer_callback=sent.append)
    (stream,) = sent
    assert stream.raw().nbytes < 5000 and len(told) < 500
    arrived = pickle.loads(told, buffers=sent)
    assert type(arrived) is Rollouts and arrived.table.equals(many.slice(*span).table)
    assert arrived.table.schema == many.table.schema
    for ids in arrived.response_ids:
        assert np.shares_memory(ids, np.frombuffer(stream, np.uint8))
