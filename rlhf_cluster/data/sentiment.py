"""The quickstart's own data: short prompts about everyday things, and one-sentence answers of mixed sentiment.

Made from the templates below and nothing else: no file, no download, the same rows on every machine. A third of the
answers is positive, a third neutral, a third negative, so that the policy after SFT starts near the middle of the
sentiment scale and PPO has room both ways. No subject carries a sentiment of its own.
"""

from __future__ import annotations

from rlhf_cluster.data.rows import DemonstrationRow, Message, Place, PromptRow
from rlhf_cluster.data.seeded import seeded_order

SOURCE = "the package's sentiment data"
DEMONSTRATIONS_PER_SUBJECT = 9


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


SUBJECTS: dict[str, tuple[str, ...]] = {
    "place": _names(
        "hotel, restaurant, museum, library, bakery, market, garden, park, beach, cinema, theatre, airport, "
        "train station, bookshop, campsite, gym, swimming pool, zoo, café, city centre, hostel, gallery, "
        "harbour, supermarket"
    ),
    "thing": _names(
        "book, film, coffee, breakfast, soup, pizza, sandwich, bicycle, laptop, phone, camera, umbrella, "
        "backpack, armchair, mattress, kettle, notebook, jacket, board game, documentary, podcast, newspaper, "
        "dishwasher, desk lamp"
    ),
    "event": _names(
        "train ride, bus ride, flight, walking tour, cooking class, lecture, concert, boat trip, guided tour, "
        "chess lesson, pottery workshop, staff meeting, school trip, piano recital, football match, ferry "
        "crossing"
    ),
}

PROMPTS: dict[str, tuple[str, ...]] = {
    "place": (
        "Write one sentence about the {s}.",
        "Describe your visit to the {s} in one sentence.",
        "What was the {s} like?",
        "Tell me about the {s} in a single sentence.",
        "How was your time at the {s}?",
        "Write a one-sentence review of the {s}.",
        "What did you think of the {s}?",
        "Sum up your afternoon at the {s} in one sentence.",
        "You have just come back from the {s}. How was it?",
        "Give me your opinion of the {s} in one sentence.",
        "A friend asks you about the {s}. What do you say?",
        "Finish this in one sentence: when I walked into the {s},",
    ),
    "thing": (
        "Write one sentence about the {s}.",
        "Describe the {s} in one sentence.",
        "What was the {s} like?",
        "Tell me about the {s} in a single sentence.",
        "What did you think of the {s}?",
        "Write a one-sentence review of the {s}.",
        "How did you find the {s}?",
        "Sum up the {s} in one sentence.",
        "Give me your opinion of the {s} in one sentence.",
        "A friend asks you about the {s}. What do you say?",
        "What would you tell someone who asks about the {s}?",
        "Finish this in one sentence: after a week with the {s},",
    ),
    "event": (
        "Write one sentence about the {s}.",
        "Describe the {s} in one sentence.",
        "What was the {s} like?",
        "Tell me about the {s} in a single sentence.",
        "How did the {s} go?",
        "Write a one-sentence review of the {s}.",
        "What did you think of the {s}?",
        "Sum up the {s} in one sentence.",
        "You have just come back from the {s}. How was it?",
        "Give me your opinion of the {s} in one sentence.",
        "A friend asks you about the {s}. What do you say?",
        "Finish this in one sentence: by the end of the {s},",
    ),
}

# Answers: an opening that fits the kind of subject, then an ending that fits any. Positive, neutral, negative.
OPENINGS: dict[str, tuple[tuple[str, ...], ...]] = {
    "place": (
        (
            "The {s} was lovely and full of light",
            "I really enjoyed the {s}, where everyone was friendly",
            "The staff at the {s} were kind and helpful",
            "The {s} was clean, calm and welcoming",
        ),
        (
            "The {s} is on the corner of a long street",
            "The {s} opens at nine and closes at six",
            "We went to the {s} on a Tuesday",
            "The {s} has two floors and a small door at the back",
        ),
        (
            "The {s} was dirty and unpleasant",
            "The staff at the {s} were rude and ignored us",
            "The {s} was a disappointment from the start",
            "I was annoyed by the terrible noise at the {s}",
        ),
    ),
    "thing": (
        (
            "The {s} was excellent from the first moment",
            "I was delighted with the {s}",
            "The {s} was a wonderful surprise",
            "The {s} is one of the best I have ever had",
        ),
        (
            "The {s} was there when I came in on Tuesday",
            "I came across the {s} one day after work",
            "The {s} was about what I had in mind",
            "My brother mentioned the {s} on Monday",
        ),
        (
            "The {s} was awful from the first moment",
            "I was disappointed by the {s}",
            "The {s} was a sad waste of money",
            "The {s} is one of the worst I have ever had",
        ),
    ),
    "event": (
        (
            "The {s} was great fun from start to finish",
            "I really enjoyed the {s}",
            "The {s} was a wonderful way to spend the day",
            "Everyone we met during the {s} was cheerful and friendly",
        ),
        (
            "The {s} began at ten and took about two hours",
            "The {s} was on a Tuesday in the second week of May",
            "There were about twelve of us at the {s}",
            "The {s} was in the same building as last year",
        ),
        (
            "The {s} was boring and much too long",
            "I regret that I went to the {s}",
            "The {s} was a miserable way to spend the day",
            "Everyone we met during the {s} was tired and angry",
        ),
    ),
}

ENDINGS: tuple[tuple[str, ...], ...] = (
    (
        ", and I would happily recommend it to anyone.",
        ", and it made the whole week better for all of us.",
        ", so I left with a big smile and a good story to tell.",
        ", and I am glad that we took our time over it.",
    ),
    (
        ", and after that we took the late bus home.",
        ", and I have thought about it once or twice since then.",
        ", and I wrote the date on a card.",
        ", and that is all there is to say about it.",
    ),
    (
        ", and I would warn anyone who asks me about it.",
        ", and it ruined the rest of the week for all of us.",
        ", so I left with a headache and a bad mood.",
        ", and I am still upset about the time that it cost me.",
    ),
)


def subject_of(prompt: PromptRow) -> str:
    """What a prompt asks about: the group of the held-out split."""
    return str(prompt.columns["subject"])


def prompts() -> list[PromptRow]:
    """Every prompt about every subject, 64 subjects x 12 templates, in a fixed mixed order."""
    texts = [(kind, subject, text) for kind, subject in _subjects() for text in PROMPTS[kind]]
    order = seeded_order([f"{subject}/{text}" for _, subject, text in texts], SOURCE)
    return [_prompt(texts[index][1], texts[index][2], row) for row, index in enumerate(order)]


def demonstrations() -> list[DemonstrationRow]:
    """9 answers about every subject, 3 of each sentiment, all different, each to a prompt chosen for it."""
    rows: list[DemonstrationRow] = []
    for kind, subject in _subjects():
        asked = seeded_order(PROMPTS[kind], SOURCE, subject)
        for number in range(DEMONSTRATIONS_PER_SUBJECT):
            prompt = _prompt(subject, PROMPTS[kind][asked[number]], len(rows))
            rows.append(DemonstrationRow(prompt, _answer(kind, subject, number)))
    return rows


def _subjects() -> list[tuple[str, str]]:
    return [(kind, subject) for kind, names in SUBJECTS.items() for subject in names]


def _prompt(subject: str, template: str, row: int) -> PromptRow:
    text = template.format(s=subject)
    return PromptRow.of((Message("user", text),), Place(SOURCE, row), {"subject": subject})


def _answer(kind: str, subject: str, number: int) -> str:
    """The number-th answer about a subject: sentiments in turn, pairs of opening and ending in seeded order."""
    sentiment, turn = number % 3, number // 3
    openings, endings = OPENINGS[kind][sentiment], ENDINGS[sentiment]
    pairs = [f"{opening}{ending}" for opening in openings for ending in endings]
    return pairs[seeded_order(pairs, SOURCE, subject, sentiment)[turn]].format(s=subject)
