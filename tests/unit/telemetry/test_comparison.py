from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest

from rlhf_cluster.telemetry.comparison import (
    Comparison,
    Gold,
    ReportError,
    Sample,
    compare,
    gold_of,
    printable,
    read_samples,
    write_samples,
)


def test_worked_by_hand() -> None:
    # prompt means: before 1, 3, 2; after 2, 3, 7; differences 1, 0, 5: mean 2, variance (1 + 4 + 9) / 2 = 7
    before = [[0.0, 2.0], [3.0, 3.0], [1.0, 3.0]]
    after = [[1.0, 3.0], [2.0, 4.0], [7.0, 7.0]]
    kl = [[1.0, 1.0], [2.0, 2.0], [2.0, 4.0]]  # means 1, 2, 3: variance 1
    c = compare(before, after, kl, gold_of("vader", []))
    assert (c.prompts, c.samples_per_prompt, c.gold) == (3, 2, "vader")
    assert (c.before_mean, c.after_mean, c.difference, c.kl_mean) == (2.0, 4.0, 2.0, 2.0)
    assert c.before_se == pytest.approx(math.sqrt(1 / 3))
    assert c.after_se == pytest.approx(math.sqrt(7 / 3))
    assert c.difference_se == pytest.approx(math.sqrt(7 / 3))
    assert c.kl_se == pytest.approx(math.sqrt(1 / 3))
    assert c.standard_errors == pytest.approx(2 / math.sqrt(7 / 3))


def test_standard_error_is_the_spread_of_repeated_experiments() -> None:
    """Brute force: the stated error agrees with how much the paired difference scatters over fresh experiments."""
    rng = random.Random(0)
    stated, differences = [], []
    for _ in range(400):
        level = [rng.gauss(0, 3) for _ in range(16)]  # prompts differ a lot, which pairing takes out
        before = [[x + rng.gauss(0, 1) for _ in range(2)] for x in level]
        after = [[x + 0.5 + rng.gauss(0, 1) for _ in range(2)] for x in level]
        c = compare(before, after, before, Gold("g", ""))
        stated.append(c.difference_se)
        differences.append(c.difference)
    assert statistics.fmean(stated) == pytest.approx(statistics.stdev(differences), rel=0.12)
    assert statistics.fmean(differences) == pytest.approx(0.5, abs=0.05)


def test_the_same_shift_for_all_has_no_error() -> None:
    c = compare([[0.0], [4.0]], [[1.0], [5.0]], [[0.0], [0.0]], Gold("g", ""))
    assert (c.difference, c.difference_se, c.standard_errors) == (1.0, 0.0, math.inf)
    same = compare([[0.0], [4.0]], [[0.0], [4.0]], [[0.0], [0.0]], Gold("g", ""))
    assert same.standard_errors == 0.0


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([[1.0]], [[1.0]], "at least 2 prompts"),
        ([[1.0], [2.0]], [[1.0], [2.0, 3.0]], "same prompts and samples"),
        ([[1.0], [2.0]], [[1.0], [2.0], [3.0]], "same prompts and samples"),
        ([[], []], [[], []], "same prompts and samples"),
        ([[1.0], [2.0]], [[1.0], [math.nan]], "after of prompt 1"),
    ],
)
def test_refuses(before: list[list[float]], after: list[list[float]], said: str) -> None:
    with pytest.raises(ReportError, match=said):
        compare(before, after, before, Gold("g", ""))


def test_json_round_trip_and_refusal() -> None:
    c = compare([[0.0], [4.0]], [[1.0], [7.0]], [[0.1], [0.2]], gold_of("vader", []))
    assert Comparison.from_json(c.to_json()) == c
    with pytest.raises(ReportError, match="exactly the fields"):
        Comparison.from_json('{"gold": "vader"}')
    with pytest.raises(ReportError, match="not JSON"):
        Comparison.from_json("{")


def test_samples_round_trip_and_the_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    samples = [Sample("p\n\u2028", "b", "a ☀", 0.0, 1.0), Sample("q", "", "x", -1.0, 0.5)]
    write_samples(path, samples)
    assert read_samples(path) == samples
    path.write_text(path.read_text() + '{"prompt": "r"}\n')
    with pytest.raises(ReportError, match="line 3"):
        read_samples(path)


def test_printable_takes_what_steers() -> None:
    assert printable("a\x1b[31m\tb\n\u202e\ud800é日") == "a\ufffd[31m\tb\n\ufffd\ufffdé日"


def test_who_scored_is_said() -> None:
    said = compare([[0.0], [4.0]], [[1.0], [7.0]], [[0.1], [0.2]], gold_of("vader", ["model"])).about_gold
    assert "stand-in for a human labeler" in said
    assert "PPO never sees" in said
    assert gold_of("exact", ["model"]).about == "PPO never sees the scores of 'exact'."


@pytest.mark.parametrize(
    ("labeler", "rewards"), [("", ["model"]), ("exact", ["exact"]), ("exact", ["exact", "length"])]
)
def test_a_score_that_was_trained_on_is_never_said_to_be_unseen(labeler: str, rewards: list[str]) -> None:
    gold = gold_of(labeler, rewards)
    assert "trained to raise" in gold.about and "never sees" not in gold.about
    assert gold.name.endswith("a part of the reward" if len(rewards) > 1 else "the reward itself")
