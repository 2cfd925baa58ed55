from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.config import DataConfig
from rlhf_cluster.data import sentiment
from rlhf_cluster.data.rows import DataError
from rlhf_cluster.data.sources import load_corpus
from rlhf_cluster.data.split import Corpus


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def hh(question: str, good: str, bad: str) -> dict[str, str]:
    return {
        which: f"\n\nHuman: {question}\n\nAssistant: {text}" for which, text in (("chosen", good), ("rejected", bad))
    }


def train_and_held(corpus: Corpus) -> tuple[set[str], set[str]]:
    train = [*corpus.prompts, *(row.prompt for row in (*corpus.demonstrations, *corpus.comparisons))]
    held = [*corpus.heldout_prompts, *(row.prompt for row in corpus.heldout_comparisons)]
    return {row.id for row in train}, {row.id for row in held}


def test_files_are_read_each_into_its_own_kind(tmp_path: Path) -> None:
    cfg = DataConfig(
        prompts=write(tmp_path / "p.jsonl", [{"prompt": f"p{i}"} for i in range(6)]),
        demonstrations=write(tmp_path / "d.jsonl", [{"prompt": f"d{i}", "completion": "x"} for i in range(4)]),
        comparisons=write(
            tmp_path / "c.jsonl", [{"prompt": f"c{i}", "chosen": "x", "rejected": "y"} for i in range(10)]
        ),
        heldout_prompts=2,
    )
    corpus = load_corpus(cfg, 0)
    sizes = (corpus.prompts, corpus.heldout_prompts, corpus.demonstrations)
    assert [len(rows) for rows in sizes] == [4, 2, 4]
    assert (len(corpus.comparisons), len(corpus.heldout_comparisons)) == (8, 2)
    assert corpus.too_long == "refuse"


def test_a_file_that_is_not_named_is_not_missed(tmp_path: Path) -> None:
    corpus = load_corpus(
        DataConfig(demonstrations=write(tmp_path / "d.jsonl", [{"prompt": "d", "completion": "x"}])), 0
    )
    assert (len(corpus.demonstrations), corpus.prompts, corpus.comparisons) == (1, (), ())


def test_a_bad_row_of_the_users_own_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"promt": "b"}])
    with pytest.raises(DataError, match=r"p\.jsonl, line 2: missing column: 'prompt'; the row has promt"):
        load_corpus(DataConfig(prompts=path, heldout_prompts=0), 0)


def test_hh_drops_and_counts_what_it_cannot_use(tmp_path: Path) -> None:
    rows = [hh(f"q{i}", "good", "bad") for i in range(8)]
    rows += [
        hh("q0", "other", "bad"),
        hh("q9", "", "bad"),
        {**hh("x", "a", "b"), "rejected": hh("y", "a", "b")["rejected"]},
    ]
    cfg = DataConfig(source="hh", path=write(tmp_path / "hh.jsonl", rows), heldout_prompts=1, heldout_fraction=0.0)
    corpus = load_corpus(cfg, 0)
    assert len(corpus.prompts) + len(corpus.heldout_prompts) == 8
    assert len(corpus.comparisons) + len(corpus.heldout_comparisons) == 9
    reasons = {
        reason: corpus.dropped[reason] for reason in ("empty response", "different contexts", "duplicate prompt")
    }
    assert reasons == {"empty response": 1, "different contexts": 1, "duplicate prompt": 1}
    assert corpus.too_long == "drop"


def test_hh_keeps_a_conversation_on_one_side(tmp_path: Path) -> None:
    rows = [hh(f"q{i}", "good", "bad") for i in range(8)]
    rows += [hh(f"q{i}\n\nAssistant: good\n\nHuman: and then?", "well", "no") for i in range(8)]
    cfg = DataConfig(source="hh", path=write(tmp_path / "hh.jsonl", rows), heldout_prompts=3, heldout_fraction=0.25)
    corpus = load_corpus(cfg, 0)
    train = [*corpus.prompts, *(row.prompt for row in (*corpus.demonstrations, *corpus.comparisons))]
    held = [*corpus.heldout_prompts, *(row.prompt for row in corpus.heldout_comparisons)]
    assert held and {len(prompt.messages) for prompt in train} == {1, 3}
    assert not {prompt.messages[0] for prompt in train} & {prompt.messages[0] for prompt in held}


def test_oasst_is_split_by_tree(tmp_path: Path) -> None:
    def tree(number: int) -> dict[str, Any]:
        below = {"role": "prompter", "text": "and then?", "replies": []}
        replies = [
            {"role": "assistant", "text": f"a{rank}", "rank": rank, "replies": [] if rank else [below]}
            for rank in (0, 1)
        ]
        return {"prompt": {"role": "prompter", "text": f"q{number}", "replies": replies}}

    path = write(tmp_path / "trees.jsonl", [tree(number) for number in range(10)])
    corpus = load_corpus(DataConfig(source="oasst", path=path, heldout_prompts=4, heldout_fraction=0.2), 0)
    roots = [{row.messages[0].content for row in rows} for rows in (corpus.prompts, corpus.heldout_prompts)]
    assert roots[0].isdisjoint(roots[1])
    assert [len(rows) for rows in (corpus.prompts, corpus.heldout_prompts)] == [16, 4]
    assert [len(rows) for rows in (corpus.comparisons, corpus.heldout_comparisons)] == [8, 2]
    assert len(corpus.demonstrations) == 8


def test_sentiment_needs_no_file_and_holds_out_subjects() -> None:
    corpus = load_corpus(DataConfig(source="sentiment"), 0)
    assert len(corpus.heldout_prompts) == 64
    assert len(corpus.prompts) >= 400
    assert len({row.response for row in corpus.demonstrations}) >= 300
    held = {sentiment.subject_of(row) for row in corpus.heldout_prompts}
    seen = {sentiment.subject_of(row) for row in corpus.prompts}
    seen |= {sentiment.subject_of(row.prompt) for row in corpus.demonstrations}
    assert held.isdisjoint(seen)
    assert (corpus.comparisons, corpus.heldout_comparisons) == ((), ())
    other = load_corpus(DataConfig(source="sentiment"), 1)
    assert {sentiment.subject_of(row) for row in other.heldout_prompts} != held


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (DataConfig(source="web"), "data.source=web: allowed: files, sentiment, hh, oasst"),
        (DataConfig(source="hh"), "data.path is empty: data.source=hh needs it"),
        (DataConfig(source="oasst", path="gone.jsonl"), r"gone\.jsonl: no such file"),
        (DataConfig(), "nothing to use for data.source=files"),
    ],
)
def test_what_is_not_there_is_named(cfg: DataConfig, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_corpus(cfg, 0)


def test_a_file_of_another_kind_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    for source in ("hh", "oasst"):
        with pytest.raises(DataError, match=f"nothing to use for data.source={source}: 2 missing column"):
            load_corpus(DataConfig(source=source, path=path), 0)


def test_real_hh(real_data: Callable[[str], Path]) -> None:
    path = str(real_data("hh-rlhf/harmless-base.jsonl.gz"))
    corpus = load_corpus(DataConfig(source="hh", path=path), 0)
    assert len(corpus.comparisons) + len(corpus.heldout_comparisons) == 1734 - 5 - 3 - 1
    reasons = {
        reason: corpus.dropped[reason] for reason in ("different contexts", "empty response", "wrong message roles")
    }
    assert reasons == {"different contexts": 5, "empty response": 3, "wrong message roles": 1}
    train, held = train_and_held(corpus)
    assert train.isdisjoint(held)
    assert len(corpus.heldout_prompts) == 64
    assert len(corpus.heldout_comparisons) == 345


def test_real_oasst(real_data: Callable[[str], Path]) -> None:
    path = str(real_data("oasst/en_trees.jsonl"))
    corpus = load_corpus(DataConfig(source="oasst", path=path), 0)
    rankings = [*corpus.comparisons, *corpus.heldout_comparisons]
    assert len(rankings) == 172
    assert {len(row.ranks) for row in rankings} == {2, 3, 4, 5, 6, 8, 9}
    train, held = train_and_held(corpus)
    assert train.isdisjoint(held)
    roots = {row.prompt.messages[0].content for row in corpus.comparisons}
    assert roots.isdisjoint({row.prompt.messages[0].content for row in corpus.heldout_comparisons})
    assert 35 <= len(corpus.heldout_comparisons) <= 50
