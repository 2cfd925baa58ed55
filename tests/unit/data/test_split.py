from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf_cluster.config import DataConfig
from rlhf_cluster.data.rows import ComparisonRow, DataError, DemonstrationRow, Message, Place, PromptRow
from rlhf_cluster.data.split import Corpus, Pool, split

PLACE = Place("made")


def prompt(text: str) -> PromptRow:
    return PromptRow.of((Message("user", text),), PLACE)


def comparison(text: str, ranks: tuple[int, ...] = (1, 2)) -> ComparisonRow:
    return ComparisonRow(prompt(text), tuple("abcdefgh"[: len(ranks)]), ranks)


def pool(prompts: int = 0, comparisons: int = 0, demonstrations: int = 0) -> Pool:
    made = Pool(PLACE, "refuse")
    made.prompts = [prompt(f"t{i}") for i in range(prompts)]
    made.comparisons = [comparison(f"t{i // 2}") for i in range(comparisons)]
    made.demonstrations = [DemonstrationRow(prompt(f"t{i}"), "a") for i in range(demonstrations)]
    return made


def config(**values: int | float) -> DataConfig:
    return replace(DataConfig(heldout_prompts=0, heldout_fraction=0.0), **values)


def ids(corpus: Corpus) -> tuple[set[str], set[str]]:
    """(all prompts that training sees, all that are held out)"""
    train = {row.id for row in corpus.prompts} | {row.prompt.id for row in corpus.comparisons}
    train |= {row.prompt.id for row in corpus.demonstrations}
    held = {row.id for row in corpus.heldout_prompts} | {row.prompt.id for row in corpus.heldout_comparisons}
    return train, held


def test_nothing_held_out_keeps_everything_in_order() -> None:
    made = pool(5, 6, 4)
    corpus = split(made, config(), 0)
    assert corpus.prompts == tuple(made.prompts)
    assert corpus.comparisons == tuple(made.comparisons)
    assert corpus.demonstrations == tuple(made.demonstrations)
    assert (corpus.heldout_prompts, corpus.heldout_comparisons, corpus.dropped) == ((), (), {})


@pytest.mark.parametrize("seed", range(5))
def test_held_out_rows_share_no_prompt_with_training_and_nothing_is_lost(seed: int) -> None:
    corpus = split(pool(40, 60, 40), config(heldout_prompts=8, heldout_fraction=0.25), seed)
    train, held = ids(corpus)
    assert train.isdisjoint(held)
    assert len(corpus.heldout_prompts) == 8
    assert 15 <= len(corpus.heldout_comparisons) < 60
    kept = sum(map(len, (corpus.prompts, corpus.comparisons, corpus.demonstrations)))
    kept += len(corpus.heldout_prompts) + len(corpus.heldout_comparisons)
    assert kept + sum(corpus.dropped.values()) == 40 + 60 + 40


def test_comparisons_alone_are_split_to_the_fraction_by_whole_prompts() -> None:
    corpus = split(pool(comparisons=40), config(heldout_prompts=64, heldout_fraction=0.2), 0)
    assert (len(corpus.comparisons), len(corpus.heldout_comparisons)) == (32, 8)
    train, held = ids(corpus)
    assert train.isdisjoint(held)
    assert len(held) == 4


def test_the_seed_chooses() -> None:
    cfg = config(heldout_prompts=5)
    assert split(pool(30), cfg, 0) == split(pool(30), cfg, 0)
    assert split(pool(30), cfg, 0).heldout_prompts != split(pool(30), cfg, 1).heldout_prompts


def test_whole_groups_stay_together() -> None:
    made = pool(40, 0, 40)
    made.group = lambda row: row.messages[0].content[:2]
    corpus = split(made, config(heldout_prompts=3), 0)
    train = {made.group(row) for row in corpus.prompts} | {made.group(row.prompt) for row in corpus.demonstrations}
    assert train.isdisjoint({made.group(row) for row in corpus.heldout_prompts})
    assert len(corpus.heldout_prompts) == 3


def test_limits_thin_the_training_rows_alone_and_are_counted() -> None:
    cfg = config(heldout_prompts=4, max_prompts=5, max_comparisons=3, max_demonstrations=2)
    corpus = split(pool(20, 20, 20), cfg, 0)
    full = split(pool(20, 20, 20), config(heldout_prompts=4), 0)
    assert (len(corpus.prompts), len(corpus.comparisons), len(corpus.demonstrations)) == (5, 3, 2)
    assert {row.id for row in corpus.prompts} < {row.id for row in full.prompts}
    assert corpus.heldout_prompts == full.heldout_prompts
    assert corpus.heldout_comparisons == full.heldout_comparisons
    assert corpus.dropped["beyond data.max_prompts"] == 20 - 4 - 5
    assert corpus.dropped["beyond data.max_demonstrations"] == 16 - 2


def test_duplicates_and_rankings_of_ties_go_and_are_counted() -> None:
    made = pool(3)
    made.prompts += [prompt("t1"), prompt("t1")]
    made.comparisons = [comparison("t0", (1, 1)), comparison("t1")]
    corpus = split(made, config(), 0)
    assert [row.messages[0].content for row in corpus.prompts] == ["t0", "t1", "t2"]
    assert len(corpus.comparisons) == 1
    assert corpus.dropped == {"duplicate prompt": 2, "all responses tied": 1}


@pytest.mark.parametrize(
    ("made", "values", "message"),
    [
        (
            pool(5),
            {"heldout_prompts": 5},
            "heldout_prompts=5 leaves no prompt to train on: .* 5 distinct .* use 0 to 4",
        ),
        (pool(comparisons=1), {"heldout_fraction": 0.5}, "no comparisons left to train on: .*heldout_fraction=0.5"),
        (pool(5), {"heldout_fraction": 1.0}, "bad data.heldout_fraction: 1.0; allowed: 0 up to but not 1"),
        (pool(5), {"heldout_fraction": float("nan")}, "bad data.heldout_fraction: nan"),
    ],
)
def test_a_split_that_leaves_nothing_is_refused_with_the_numbers(
    made: Pool, values: dict[str, float], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        split(made, config(**values), 0)


@pytest.mark.parametrize("seed", range(3))
def test_comparisons_that_the_source_holds_out_keep_their_prompts_from_training(seed: int) -> None:
    made = pool(10, 12, 10)
    made.heldout_comparisons = [comparison("t3"), comparison("t4"), comparison("elsewhere"), comparison("x", (1, 1))]
    corpus = split(made, config(heldout_prompts=3, heldout_fraction=0.9), seed)
    train, held = ids(corpus)
    assert train.isdisjoint(held)
    assert list(corpus.heldout_comparisons) == made.heldout_comparisons and len(made.heldout_comparisons) == 3
    assert {prompt("t3").id, prompt("t4").id} <= {row.id for row in corpus.heldout_prompts}
    assert len(corpus.heldout_prompts) == 3
    away = sum(row.prompt.id in held for row in made.comparisons)  # 4 of t3 and t4, and those of the third prompt
    assert away >= 4 and len(corpus.comparisons) == 12 - away
    of_held = "of what is held out (data.heldout_prompts, data.heldout_fraction)"
    assert corpus.dropped == {
        f"comparisons {of_held}": away,
        f"demonstrations {of_held}": 3,
        "all responses tied": 1,
    }
