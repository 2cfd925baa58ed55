from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest

from rlhf_cluster.data.labelers import LabelerError, make_labeler, rank


@pytest.mark.parametrize(
    ("scores", "margin", "ranks"),
    [
        ([0.1, 0.9, 0.5], 0.0, [3, 1, 2]),
        ([0.5, 0.5, -1.0, 0.5], 0.0, [1, 1, 2, 1]),
        ([0.9, 0.5, 0.1], 0.45, [1, 1, 2]),
        ([0.1, 0.5, 0.9], 0.45, [2, 1, 1]),
        ([1.0, 0.75, 0.5, 0.25, 0.0], 0.25, [1, 1, 2, 2, 3]),
        ([-0.5], 0.1, [1]),
        ([], 0.1, []),
    ],
)
def test_ranks_by_hand(scores: list[float], margin: float, ranks: list[int]) -> None:
    assert rank(scores, margin) == ranks


def by_removal(scores: Sequence[float], margin: float) -> list[int]:
    """The definition word by word: take the best that is left and all within the margin of it, again and again."""
    ranks = [0] * len(scores)
    left, group = set(range(len(scores))), 0
    while left:
        group += 1
        leader = max(scores[i] for i in left)
        for i in [i for i in left if leader - scores[i] <= margin]:
            ranks[i] = group
            left.remove(i)
    return ranks


def test_ranks_agree_with_the_definition_and_never_contradict_the_scores() -> None:
    for scores in itertools.product([-0.6, -0.1, 0.0, 0.2, 0.25], repeat=4):
        for margin in (0.0, 0.1, 0.2, 0.3):
            ranks = rank(scores, margin)
            assert ranks == by_removal(scores, margin)
            for (score, mine), (other, theirs) in itertools.permutations(zip(scores, ranks, strict=True), 2):
                assert mine <= theirs or score < other
                assert mine != theirs or abs(score - other) <= margin


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(LabelerError, match=r"of response 1 \(of 3\) is not finite"):
        rank([0.0, bad, 1.0], 0.1)


@pytest.mark.parametrize("margin", [-0.1, math.nan, math.inf])
def test_a_margin_that_makes_no_sense_is_refused(margin: float) -> None:
    with pytest.raises(LabelerError, match="tie_margin"):
        rank([0.0, 1.0], margin)


def test_vader_scores_lie_on_their_scale() -> None:
    good, bad, plain = make_labeler("vader").score(
        ["I love it, it is great!", "I hate it, it is awful.", "It is a box."], []
    )
    assert -1 <= bad < -0.5
    assert plain == 0.0
    assert 0.5 < good <= 1


def test_vader_by_hand() -> None:
    """The lexicon has 'good' at 1.9: 1.9 / sqrt(1.9^2 + 15)."""
    assert make_labeler("vader").score(["good"], [])[0] == pytest.approx(1.9 / math.sqrt(1.9**2 + 15), abs=1e-4)


def test_an_unknown_labeler_is_refused_with_those_that_exist() -> None:
    with pytest.raises(LabelerError, match="no labeler 'human'; allowed: vader"):
        make_labeler("human")


def test_who_knows_the_answer_minds_no_white_space_around() -> None:
    assert make_labeler("exact").score(["4", " 4\n", "5", "4 4"], ["4", 4, "4", "4"]) == [1.0, 1.0, 0.0, 0.0]
