from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cluster.models import ModelError
from rlhf_cluster.models.batching import (
    dummy_batch,
    filled_up,
    from_response_frame,
    in_order,
    micro_batches,
    pack,
    response_mask,
    share,
    singles,
    to_response_frame,
)

PROMPTS = [np.array([5, 6], np.int32), np.array([7], np.int32)]
RESPONSES = [np.array([8, 9, 10], np.int32), np.array([11], np.int32)]


def test_padded_rows_by_hand() -> None:
    (batch,) = micro_batches(PROMPTS, RESPONSES, singles(2), 10)
    assert batch.input_ids.tolist() == [[5, 6, 8, 9, 10], [7, 11, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert batch.response_positions().tolist() == [1, 2, 3, 5]  # P-1 .. P+R-2, then the second row's 0
    assert batch.response_targets().tolist() == [8, 9, 10, 11]
    assert batch.last_positions().tolist() == [4, 6]


def test_packed_row_by_hand() -> None:
    (batch,) = micro_batches(PROMPTS, RESPONSES, [[1, 0]], 100)
    assert batch.input_ids.tolist() == [[7, 11, 5, 6, 8, 9, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4]]
    assert batch.sequences.tolist() == [1, 0]
    assert batch.response_positions().tolist() == [0, 3, 4, 5]
    assert batch.response_targets().tolist() == [11, 8, 9, 10]
    assert batch.last_positions().tolist() == [1, 6]


def test_packed_row_shorter_than_its_neighbour_counts_on() -> None:
    (batch,) = micro_batches(PROMPTS * 2, RESPONSES * 2, [[1], [0, 3]], 100)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert batch.sequences.tolist() == [0, 3, 1]
    assert batch.last_positions().tolist() == [4, 6, 8]


def test_shared_prompt_by_hand() -> None:
    """Two responses to the prompt 5 6, then another prompt in a row of its own."""
    prompts, responses = [PROMPTS[0], PROMPTS[1], PROMPTS[0]], [*RESPONSES, np.array([12, 13], np.int32)]
    (batch,) = micro_batches(prompts, responses, [[0, 2], [1]], 100, shared=True)
    assert batch.input_ids.tolist() == [[5, 6, 8, 9, 10, 12, 13], [7, 11, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 1, 2, 3, 4, 5, 6]]
    assert batch.segment_ids is not None
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]]
    assert batch.sequences.tolist() == [0, 2, 1]
    assert batch.response_positions().tolist() == [1, 2, 3, 1, 5, 7]  # 12 is predicted where the prompt ends, as 8 is
    assert batch.response_targets().tolist() == [8, 9, 10, 12, 13, 11]
    assert batch.last_positions().tolist() == [4, 6, 8]


def test_a_batch_in_which_nothing_is_shared_asks_for_no_mask() -> None:
    (batch,) = micro_batches(PROMPTS, RESPONSES, singles(2), 100, shared=True)
    assert batch.segment_ids is None


def test_share_by_hand() -> None:
    prompts = [np.array([1, 2]), np.array([3]), np.array([1, 2]), np.array([1, 2]), np.array([3])]
    responses = [np.ones(length) for length in (4, 2, 3, 2, 20)]
    assert share(prompts, responses, 11) == [[0, 2, 3], [1], [4]]  # 2+4+3+2 = 11; 20 do not fit beside 1+2
    assert share(prompts, responses, 10) == [[0, 2], [1], [3], [4]]
    assert share(prompts, responses, 1) == singles(5)


@pytest.mark.parametrize("limit", [1, 20, 37, 1000])
def test_micro_batches_keep_the_limit_and_every_sequence(limit: int, ragged: tuple) -> None:
    prompts, responses = ragged
    batches = micro_batches(prompts, responses, singles(len(prompts)), limit)
    assert all(batch.padded_tokens <= limit or len(batch.sequences) == 1 for batch in batches)
    assert sorted(np.concatenate([batch.sequences for batch in batches]).tolist()) == list(range(len(prompts)))
    for batch in batches:
        assert all(np.array_equal(a, responses[s]) for s, a in zip(batch.sequences, _targets(batch), strict=True))


def _targets(batch: object) -> list[np.ndarray]:
    return batch.split(batch.response_targets())  # type: ignore[attr-defined]


def test_bucketing_wastes_little() -> None:
    rng = np.random.default_rng(0)
    prompts = [np.ones(8, np.int32)] * 256
    responses = [np.ones(n, np.int32) for n in rng.integers(1, 120, 256)]
    real = sum(8 + len(response) for response in responses)
    padded = sum(batch.padded_tokens for batch in micro_batches(prompts, responses, singles(256), 2048))
    assert padded < 1.15 * real < 256 * 127 / 1.5  # without buckets all rows are 127 wide


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ModelError, match="sequence 1 has an empty prompt"):
        micro_batches([PROMPTS[0], PROMPTS[0][:0]], RESPONSES, singles(2), 10)


def test_pack_by_hand() -> None:
    # 6 opens a row, 5 opens another (4 free), 4 fits both and fills the first (free 4) ... best fit takes the fullest.
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_pack_best_fit_equals_brute_force() -> None:
    lengths = np.random.default_rng(1).integers(1, 11, 200).tolist()
    rows: list[list[int]] = []
    for index, length in enumerate(lengths):
        free = [10 - sum(lengths[s] for s in row) for row in rows]
        fitting = [(room, row) for row, room in enumerate(free) if room >= length]
        if fitting:
            rows[min(fitting)[1]].append(index)
        else:
            rows.append([index])
    assert pack(lengths, 10) == rows
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(200))


def test_pack_refuses_what_no_row_holds() -> None:
    with pytest.raises(ModelError, match="sequence 1 has 11 tokens; a packed row holds 10"):
        pack([10, 11], 10)


def test_dummy_runs_but_counts_nothing() -> None:
    dummy = dummy_batch()
    assert dummy.input_ids.shape == (1, 2)
    assert dummy.response_positions().tolist() == [0]
    assert dummy.select([np.ones(3, np.float32)])[0].tolist() == [0.0]


def test_ragged_results_come_back_in_the_callers_order(ragged: tuple) -> None:
    prompts, responses = ragged
    batches = [*micro_batches(prompts, responses, [[6, 0], [1], [2, 3, 4], [5]], 40), dummy_batch()]
    parts = [_targets(batch) for batch in batches]
    back = in_order(batches, parts, len(prompts))
    assert all(np.array_equal(a, b) for a, b in zip(back, responses, strict=True))
    for batch, own in zip(batches[:-1], parts[:-1], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(batch.select(responses), own, strict=True))


def test_response_frame_by_hand_and_back() -> None:
    rows = [np.array([1.0, 2.0], np.float32), np.array([], np.float32), np.array([3.0, 4.0, 5.0], np.float32)]
    frame = to_response_frame(rows)
    assert frame.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    assert response_mask([2, 0, 3]).tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert all(np.array_equal(a, b) for a, b in zip(from_response_frame(frame, [2, 0, 3]), rows, strict=True))


LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


@given(LENGTHS, st.integers(4, 60), st.booleans(), st.integers(0, 3))
def test_whatever_the_lengths_every_token_is_read_once_at_its_own_place(
    lengths: list[tuple[int, int]], limit: int, packed: bool, dummies: int
) -> None:
    """Ids that tell where they stand: prompts count down from -1, responses up from 1 over all sequences."""
    total = [sum(pair) for pair in lengths]
    ids = iter(range(1, 1000))
    responses = [np.array(list(itertools.islice(ids, response))) for _, response in lengths]
    prompts = [-np.arange(1, prompt + 1) for prompt, _ in lengths]
    rows = pack(total, max(*total, 20)) if packed else singles(len(lengths))
    batches = micro_batches(prompts, responses, rows, limit)
    assert sorted(s for batch in batches for s in batch.sequences.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert batch.padded_tokens <= limit or len(batch.input_ids) == 1
        flat, positions = batch.input_ids.reshape(-1), batch.position_ids.reshape(-1)
        assert flat[batch.last_positions()].tolist() == [int(responses[s][-1]) for s in batch.sequences]
        before = flat[batch.response_positions()].split(batch.response_lengths.tolist())
        for s, end, seen in zip(batch.sequences, batch.prompt_ends, before, strict=True):
            own, start = np.concatenate([prompts[s], responses[s]]), end + 1 - len(prompts[s])
            assert flat[start : start + len(own)].tolist() == own.tolist()
            assert positions[start : start + len(own)].tolist() == list(range(len(own)))
            assert seen.tolist() == own[len(prompts[s]) - 1 : -1].tolist()  # what predicts each response token
    everyone = filled_up(batches, len(batches) + dummies)
    parts = [batch.split(batch.response_targets()) for batch in everyone]
    found = in_order(everyone, parts, len(lengths))
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(found, responses, strict=True))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12), st.integers(4, 60))
def test_shared_rows_have_every_response_behind_its_own_prompt(asked: list[tuple[int, int]], context: int) -> None:
    """`asked`: which of four prompts, of 1 to 4 tokens, and how long a response."""
    prompts = [-np.arange(1, which + 2) - 10 * which for which, _ in asked]
    ids = iter(range(1, 1000))
    responses = [np.array(list(itertools.islice(ids, length))) for _, length in asked]
    rows = share(prompts, responses, context)
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(asked)))
    for batch in micro_batches(prompts, responses, rows, 60, shared=True):
        flat, positions = batch.input_ids.reshape(-1), batch.position_ids.reshape(-1)
        before = flat[batch.response_positions()].split(batch.response_lengths.tolist())
        targets = batch.split(batch.response_targets())
        for s, end, start, seen, own in zip(
            batch.sequences, batch.prompt_ends, batch.response_starts, before, targets, strict=True
        ):
            prompt, response = prompts[s], responses[s]
            assert flat[end + 1 - len(prompt) : end + 1].tolist() == prompt.tolist()
            assert positions[end + 1 - len(prompt) : end + 1].tolist() == list(range(len(prompt)))
            assert own.tolist() == response.tolist() == flat[start : start + len(response)].tolist()
            there = positions[start : start + len(response)].tolist()
            assert there == list(range(len(prompt), len(prompt) + len(response)))
            assert seen.tolist() == [prompt[-1], *response[:-1]]
        assert batch.input_ids.shape[1] <= max(
            context, *(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        )
