"""From ragged sequences to the tensors of one forward and back: the only place that pads or packs.

Takes prompts and responses as numpy ids and a plan of rows; gives `PackedBatch`es and what finds the way back. It
refuses to know pad ids: everything follows from true lengths.

One mechanism serves padding and packing. Sequences stand in rows from the left, each with positions counting from 0;
what fills a row up on the right goes on counting. Models get `input_ids` and `position_ids` and no attention mask:
transformers then keeps the sequences of a row apart where positions restart (its `find_packed_sequence_indices`), and
causality alone keeps the filling, which is always to the right, out of every token that is read. Without packing no
mask has to be built at all, so sdpa may take its fastest kernels. A mask made from a pad id would hide EOS where the
two are equal.

Sharing is the exception: responses to one prompt stand behind it in one row, so that the prompt is computed once, each
with positions that go on from the prompt's; `segment_ids` say what may see what, and `forward` makes the mask of them.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlhf_cluster.models import ModelError

FILL = 0  # any id that every vocabulary has: no token that is read ever attends to it
NOBODY = -1  # the sequence of a dummy batch

Ids = Sequence[np.ndarray]
Rows = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch: S sequences in B rows of T tokens; N is the number of response tokens of all S together.

    Per-sequence arrays and everything flat ([N]) run through the sequences in one order: row by row, left to right.
    """

    input_ids: Tensor  # i64 [B, T]
    position_ids: Tensor  # i64 [B, T]
    segment_ids: Tensor | None  # i64 [B, T]: 0 in a prompt, k in the k-th response to it; None: no prompt is shared
    sequences: np.ndarray  # i64 [S]: index in the caller's lists, NOBODY in a dummy
    prompt_ends: np.ndarray  # i64 [S]: flat position (row * T + column) of the prompt's last token
    response_starts: np.ndarray  # i64 [S]: flat position of the response's first token
    response_lengths: np.ndarray  # i64 [S]: R

    @property
    def padded_tokens(self) -> int:
        return self.input_ids.numel()

    def response_positions(self) -> Tensor:
        """The flat position of what stands before each response token, i64 [N]: its hidden state predicts the token."""
        positions = self._within_responses() - 1
        positions[np.cumsum(self.response_lengths) - self.response_lengths] = self.prompt_ends
        return self._index(positions)

    def response_targets(self) -> Tensor:
        """The response tokens themselves, i64 [N]."""
        return self.input_ids.reshape(-1)[self._index(self._within_responses())]

    def last_positions(self) -> Tensor:
        """Flat position of each sequence's true last token, i64 [S]."""
        return self._index(self.response_starts + self.response_lengths - 1)

    def policy_arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """What `PolicyModule.forward` takes before the temperature."""
        return *self._body_arguments(), self.response_positions(), self.response_targets()

    def value_arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """What `ScalarHeadModel.forward` takes to give the value before each response token, [N]."""
        return *self._body_arguments(), self.response_positions()

    def score_arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """What `ScalarHeadModel.forward` takes to give the score of each sequence, [S]."""
        return *self._body_arguments(), self.last_positions()

    def _body_arguments(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.input_ids, self.position_ids, self.segment_ids

    def select(self, ragged: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The caller's per-token arrays, one per sequence of this batch; zeros for a dummy's."""
        pairs = zip(self.sequences, self.response_lengths, strict=True)
        return [np.zeros(length, np.float32) if s == NOBODY else ragged[s] for s, length in pairs]

    def split(self, flat: Tensor) -> list[np.ndarray]:
        """[N] -> one f32 [R] per sequence."""
        values = flat.detach().float().cpu().numpy()
        return np.split(values, np.cumsum(self.response_lengths)[:-1])

    def to(self, device: torch.device | str) -> PackedBatch:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            segment_ids=None if self.segment_ids is None else self.segment_ids.to(device),
        )

    def _within_responses(self) -> np.ndarray:
        spans = zip(self.response_starts, self.response_lengths, strict=True)
        return np.concatenate([np.arange(start, start + length) for start, length in spans])

    def _index(self, positions: np.ndarray) -> Tensor:
        return torch.from_numpy(positions.astype(np.int64)).to(self.input_ids.device)


def singles(count: int) -> list[list[int]]:
    """The plan of rows without packing: each sequence has a row of its own."""
    return [[index] for index in range(count)]


def pack(lengths: Sequence[int], context: int) -> list[list[int]]:
    """The plan of rows with packing: best fit in the caller's order, rows of at most `context` tokens.

    Not sorted by length first: that fills a percent or two better, but puts short sequences together in rows of many
    and long ones alone, so that the caller's shuffle would no longer decide what an optimizer step sees.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index, length in enumerate(lengths):
        if length > context:
            raise ModelError(f"sequence {index} has {length} tokens; a packed row holds {context}: shorten or drop it")
        slot = bisect.bisect_left(room, (length, 0))
        free, row = room.pop(slot) if slot < len(room) else (context, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        bisect.insort(room, (free - length, row))
    return rows


def share(prompts: Ids, responses: Ids, context: int) -> list[list[int]]:
    """The plan of rows in which sequences of the same prompt share it: as many as a row of `context` tokens holds, or
    one that is longer alone."""
    rows: list[list[int]] = []
    widths: list[int] = []
    last: dict[bytes, int] = {}  # the row that a prompt's next response may join
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        row = last.get(prompt.tobytes())
        if row is None or widths[row] + len(response) > context:
            row = last[prompt.tobytes()] = len(rows)
            rows.append([])
            widths.append(len(prompt))
        rows[row].append(index)
        widths[row] += len(response)
    return rows


def micro_batches(
    prompts: Ids, responses: Ids, rows: Rows, tokens_per_micro_batch: int, shared: bool = False
) -> list[PackedBatch]:
    """Rows, longest first, in batches of at most `tokens_per_micro_batch` padded tokens (rows x the longest of them).

    A row that is longer than the limit gets a batch of its own. `shared`: all sequences of a row have its first one's
    prompt, which stands there once. Raises ModelError for a sequence without a prompt: the hidden state before its
    first token would be another sequence's.
    """
    for index in (s for row in rows for s in row):
        if not len(prompts[index]):
            raise ModelError(f"sequence {index} has an empty prompt; give it at least one token")
    with_prompt = [row[:1] if shared else row for row in rows]
    lengths = [
        sum(len(prompts[s]) for s in own) + sum(len(responses[s]) for s in row)
        for own, row in zip(with_prompt, rows, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda row: (-lengths[row], row))
    batches, start = [], 0
    while start < len(order):
        width = lengths[order[start]]
        stop = start + max(1, tokens_per_micro_batch // width)
        batches.append(_batch(prompts, responses, [rows[row] for row in order[start:stop]], width, shared))
        start = stop
    return batches


@dataclass(frozen=True)
class Layout:
    """How sequences become micro-batches."""

    tokens_per_micro_batch: int  # padded
    shared_row: int  # tokens of a row in which responses to one prompt share it; 0: each stands alone

    def rows(self, prompts: Ids, responses: Ids) -> list[list[int]]:
        return share(prompts, responses, self.shared_row) if self.shared_row else singles(len(prompts))

    def batches(self, prompts: Ids, responses: Ids, rows: Rows) -> list[PackedBatch]:
        return micro_batches(prompts, responses, rows, self.tokens_per_micro_batch, shared=bool(self.shared_row))


def dummy_batch() -> PackedBatch:
    """One row of two tokens that belongs to nobody: for a rank that must enter a collective forward without rows.

    Its `mask` is False, so its loss is 0, but every module still runs, which ZeRO-3 needs to keep ranks together.
    """
    batch = _batch([np.zeros(1, np.int32)], [np.zeros(1, np.int32)], [[0]], 2)
    return replace(batch, sequences=np.array([NOBODY]))


def filled_up(batches: Sequence[PackedBatch], count: int) -> list[PackedBatch]:
    """`batches` and as many dummies as make `count`: what the busiest rank has, so that all enter as many forwards."""
    return [*batches, *(dummy_batch() for _ in range(count - len(batches)))]


def in_order(batches: Sequence[PackedBatch], parts: Sequence[Sequence[np.ndarray]], count: int) -> list[np.ndarray]:
    """Puts what each batch gave per sequence back into the caller's order of `count` sequences; dummies fall away."""
    found = {
        int(sequence): part
        for batch, own in zip(batches, parts, strict=True)
        for sequence, part in zip(batch.sequences, own, strict=True)
    }
    return [found[sequence] for sequence in range(count)]


def response_mask(lengths: Sequence[int] | np.ndarray) -> Tensor:
    """bool [B, max R] from true lengths."""
    each = torch.as_tensor(np.asarray(lengths, np.int64))
    return torch.arange(int(each.max()) if len(each) else 0)[None, :] < each[:, None]


def to_response_frame(ragged: Sequence[np.ndarray]) -> Tensor:
    """Arrays [R] -> f32 [B, max R], 0 where there is no token."""
    mask = response_mask([len(row) for row in ragged])
    frame = torch.zeros(mask.shape)
    if len(ragged):
        frame[mask] = torch.from_numpy(np.concatenate(ragged).astype(np.float32))
    return frame


def from_response_frame(frame: Tensor, lengths: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """[B, max R] -> f32 arrays [R]; the inverse of `to_response_frame`."""
    values = frame.detach().float().cpu().numpy()
    return [row[:length].copy() for row, length in zip(values, lengths, strict=True)]


def _batch(prompts: Ids, responses: Ids, rows: Rows, width: int, shared: bool = False) -> PackedBatch:
    sequences = np.array([s for row in rows for s in row], np.int64)
    response_lengths = np.array([len(responses[s]) for s in sequences], np.int64)
    input_ids = np.full((len(rows), width), FILL, np.int64)
    position_ids, segment_ids = (np.zeros((len(rows), width), np.int64) for _ in range(2))
    prompt_ends, response_starts = [], []
    for number, row in enumerate(rows):
        column = 0
        for place, s in enumerate(row):
            prompt, response = prompts[s], responses[s]
            if place == 0 or not shared:
                input_ids[number, column : column + len(prompt)] = prompt
                position_ids[number, column:] = np.arange(width - column)
                column += len(prompt)
                prompt_ends.append(number * width + column - 1)
            else:
                position_ids[number, column:] = np.arange(len(prompt), len(prompt) + width - column)
                prompt_ends.append(prompt_ends[-1])
            response_starts.append(number * width + column)
            input_ids[number, column : column + len(response)] = response
            segment_ids[number, column:] = place + 1
            column += len(response)
    return PackedBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(segment_ids) if shared and len(sequences) > len(rows) else None,
        sequences,
        np.array(prompt_ends, np.int64),
        np.array(response_starts, np.int64),
        response_lengths,
    )
