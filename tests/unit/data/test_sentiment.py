from __future__ import annotations

from collections import Counter
from statistics import mean

from rlhf_cluster.data import sentiment
from rlhf_cluster.data.labelers import make_labeler


def test_there_are_12_prompts_about_each_of_64_subjects() -> None:
    rows = sentiment.prompts()
    by_subject = Counter(sentiment.subject_of(row) for row in rows)
    assert len(by_subject) == 64
    assert set(by_subject.values()) == {12}
    assert len({row.id for row in rows}) == len(rows) == 768


def test_every_prompt_is_one_short_user_turn_that_names_its_subject() -> None:
    for row in sentiment.prompts():
        (message,) = row.messages
        assert message.role == "user"
        assert sentiment.subject_of(row) in message.content
        assert len(message.content.split()) <= 15
        assert "{" not in message.content


def test_subjects_carry_no_sentiment() -> None:
    names = [name for names in sentiment.SUBJECTS.values() for name in names]
    assert make_labeler("vader").score(names, []) == [0.0] * len(names)


def test_answers_are_distinct_sentences_of_10_to_25_words() -> None:
    rows = sentiment.demonstrations()
    texts = [row.response for row in rows]
    assert len(set(texts)) == len(texts) == 64 * 9
    assert len({(row.prompt.id, row.response) for row in rows}) == len(rows)
    for row in rows:
        assert 10 <= len(row.response.split()) <= 25, row.response
        assert row.response.endswith(".")
        assert row.response.count(".") == 1
        assert sentiment.subject_of(row.prompt) in row.response


def test_a_third_of_the_answers_is_positive_neutral_negative_and_the_mean_is_near_zero() -> None:
    scores = make_labeler("vader").score([row.response for row in sentiment.demonstrations()], [])
    third = len(scores) // 3
    assert all(score > 0.5 for score in scores[0::3])
    assert all(score == 0.0 for score in scores[1::3])
    assert all(score < -0.3 for score in scores[2::3])
    assert len(scores[0::3]) == len(scores[1::3]) == len(scores[2::3]) == third
    assert abs(mean(scores)) < 0.1


def test_every_prompt_of_a_demonstration_is_one_of_the_prompts() -> None:
    known = {row.id for row in sentiment.prompts()}
    assert {row.prompt.id for row in sentiment.demonstrations()} <= known


def test_the_same_rows_every_time() -> None:
    assert sentiment.prompts() == sentiment.prompts()
    assert sentiment.demonstrations() == sentiment.demonstrations()
