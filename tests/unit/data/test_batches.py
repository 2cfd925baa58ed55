from __future__ import annotations

from collections import Counter

import pytest

from rlhf_cluster.data.batches import PromptOrder, heldout_members
from rlhf_cluster.data.rows import DataError
from rlhf_cluster.data.seeded import stable_seed
from rlhf_cluster.records import Prompts


def prompts(count: int) -> Prompts:
    ids = [f"p{i}" for i in range(count)]
    return Prompts.of({"prompt_id": ids, "prompt_ids": [[i] for i in range(count)], "answer": list(range(count))})


def test_a_batch_by_hand() -> None:
    members = PromptOrder(prompts(5), seed=1).members(3, batch_size=4, samples_per_prompt=2)
    first, second = members.prompt_id[0], members.prompt_id[2]
    assert members.prompt_id == [first, first, second, second]
    assert members.sample_id == [f"3/{first}/0", f"3/{first}/1", f"3/{second}/0", f"3/{second}/1"]
    assert members.sample_index.tolist() == [0, 1, 0, 1]
    assert members.step.tolist() == [3] * 4
    assert members.seed.tolist() == [stable_seed(1, 3, name, index) for name in (first, second) for index in (0, 1)]
    assert [ids.tolist() for ids in members.prompt_ids] == [[int(name[1:])] for name in members.prompt_id]
    assert members.table.column("answer").to_pylist() == [int(name[1:]) for name in members.prompt_id]


def test_steps_walk_through_epochs_that_have_each_prompt_once() -> None:
    order = PromptOrder(prompts(6), seed=0)
    walk = [name for step in range(9) for name in order.members(step, 4, 1).prompt_id]
    epochs = [walk[start : start + 6] for start in range(0, 36, 6)]
    assert all(Counter(epoch) == Counter(f"p{i}" for i in range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_a_resumed_run_goes_on_exactly() -> None:
    whole = PromptOrder(prompts(7), seed=4)
    batches = [whole.members(step, 6, 2).table for step in range(8)]
    resumed = PromptOrder(prompts(7), seed=4)
    assert [resumed.members(step, 6, 2).table.equals(batches[step]) for step in (7, 5, 6)] == [True] * 3
    assert not PromptOrder(prompts(7), seed=5).members(5, 6, 2).table.equals(batches[5])


def test_ids_and_seeds_stay_unique_where_a_prompt_comes_twice() -> None:
    members = PromptOrder(prompts(2), seed=0).members(0, batch_size=10, samples_per_prompt=2)
    assert len(set(members.sample_id)) == len(set(members.seed.tolist())) == 10
    by_prompt = Counter(members.prompt_id)
    for name, count in by_prompt.items():
        indices = [int(i) for i, p in zip(members.sample_index, members.prompt_id, strict=True) if p == name]
        assert indices == list(range(count))


def test_seeds_fit_31_bits_and_do_not_repeat() -> None:
    order = PromptOrder(prompts(64), seed=0)
    seeds = [int(seed) for step in range(20) for seed in order.members(step, 64, 1).seed]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) > 2**30


def test_held_out_members_are_all_prompts_and_the_same_before_and_after() -> None:
    rows = prompts(3)
    members = heldout_members(rows, label_step=-1, samples_per_prompt=2, seed=0)
    assert members.prompt_id == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert members.sample_id[:2] == ["-1/p0/0", "-1/p0/1"]
    assert members.table.equals(heldout_members(rows, -1, 2, 0).table)
    assert set(members.seed.tolist()).isdisjoint(PromptOrder(rows, 0).members(0, 6, 2).seed.tolist())


@pytest.mark.parametrize(("batch_size", "samples"), [(5, 2), (4, 0), (0, 1)])
def test_a_batch_that_does_not_divide_is_refused_with_the_numbers(batch_size: int, samples: int) -> None:
    with pytest.raises(DataError, match=f"samples_per_prompt={samples} does not divide batch_size={batch_size}"):
        PromptOrder(prompts(3), 0).members(0, batch_size, samples)


def test_no_prompts_make_no_batches() -> None:
    with pytest.raises(DataError, match="no prompts"):
        PromptOrder(Prompts.empty(), 0)


def test_a_refill_is_a_pure_function_with_ids_and_seeds_of_its_own() -> None:
    order = PromptOrder(prompts(6), seed=0)
    refill = order.refill(3, 0, count=2, samples_per_prompt=2)
    assert refill.table.equals(PromptOrder(prompts(6), seed=0).refill(3, 0, 2, 2).table)
    assert len(set(refill.prompt_id)) == 2 and refill.step.tolist() == [3] * 4
    assert all(i.startswith("3+1/") for i in refill.sample_id)
    again, batch = order.refill(3, 1, 2, 2), order.members(3, 12, 2)
    for ids in (lambda rows: rows.sample_id, lambda rows: rows.seed.tolist()):
        assert len({*ids(refill), *ids(again), *ids(batch)}) == 4 + 4 + 12
    assert (
        order.refill(4, 0, 2, 2).prompt_id != refill.prompt_id or order.refill(5, 0, 2, 2).prompt_id != refill.prompt_id
    )


def test_a_refill_brings_prompts_that_the_batch_has_not() -> None:
    """As long as there are any: a prompt's group would else be two, or one of twice the size."""
    order = PromptOrder(prompts(6), seed=0)
    batch = set(order.members(0, 8, 2).prompt_id)
    others = {f for f in prompts(6).prompt_id if f not in batch}
    assert len(batch) == 4 and set(order.refill(0, 0, 2, 2, batch).prompt_id) == others
    more = order.refill(0, 0, 5, 2, batch).prompt_id
    assert len(more) == 10 and others < set(more)
