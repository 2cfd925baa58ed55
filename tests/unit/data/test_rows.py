from __future__ import annotations

import subprocess
import sys

import pytest

from rlhf_cluster.data.rows import DataError, Message, Place, PromptRow, dense_ranks, prompt_id
from rlhf_cluster.data.seeded import seeded_order, stable_hash, stable_seed


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (Place("a.jsonl", 2, 4), "a.jsonl, line 4"),
        (Place("a.parquet", 2), "a.parquet, row 2 (counting from 0)"),
        (Place("a.parquet"), "a.parquet"),
    ],
)
def test_a_place_names_what_the_user_can_look_up(place: Place, text: str) -> None:
    assert str(place) == text


def test_the_error_names_place_reason_and_detail() -> None:
    error = DataError(Place("a.jsonl", 0, 1), "bad rank", "nan")
    assert str(error) == "a.jsonl, line 1: bad rank: nan"
    assert error.reason == "bad rank"


def test_ids_and_hashes_are_fixed_for_ever() -> None:
    """Sample ids and seeds on disk depend on these: a change here breaks resuming old runs."""
    assert prompt_id([Message("user", "hé")]) == "a5a922a558d0e436"
    assert stable_hash(0, "a", 1) == 7336057261638159117
    assert stable_seed(0, "a", 1) == 7336057261638159117 >> 33


def test_another_process_gives_the_same_hash() -> None:
    code = "from rlhf_cluster.data.seeded import stable_hash; print(stable_hash('x', 7))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == stable_hash("x", 7)


def test_an_id_depends_on_roles_and_turns_and_not_on_the_place() -> None:
    one = PromptRow.of([Message("user", "ab")], Place("x", 1))
    assert one.id == PromptRow.of([Message("user", "ab")], Place("y", 2), {"answer": 1}).id
    others = ([Message("system", "ab")], [Message("user", "a"), Message("user", "b")], [Message("user", "ab ")])
    assert len({one.id, *(prompt_id(other) for other in others)}) == 4


def test_an_order_is_a_permutation_that_survives_new_rows() -> None:
    names = [f"n{i}" for i in range(50)]
    order = [names[i] for i in seeded_order(names, 3)]
    assert sorted(order) == sorted(names)
    assert order != names
    assert order != [names[i] for i in seeded_order(names, 4)]
    more = [*names[:20], "new", *names[20:]]
    assert [name for name in (more[i] for i in seeded_order(more, 3)) if name != "new"] == order


def test_dense_ranks_keep_the_order_and_close_the_gaps() -> None:
    assert dense_ranks([0, 3, 3, -1]) == (2, 3, 3, 1)
    assert dense_ranks([]) == ()
