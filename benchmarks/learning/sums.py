"""The arithmetic task: "a+b=", both below 100, a model made from nothing, and demonstrations that are often wrong.

Data and model are made by seed alone; of the 10,000 sums some are never shown (`data.heldout_prompts`).
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import responses
import small

from rlhf_cluster.models.tiny import byte_tokenizer

BELOW = 100
CONTEXT = 32


def write_data(directory: Path, seed: int, demonstrations: int, wrong: float) -> None:
    """`prompts.jsonl` with every sum and its answer; `demonstrations.jsonl`, of which a share of `wrong` is wrong: a
    digit of the answer is another one."""
    rng = random.Random(seed)
    sums = [(a, b) for a in range(BELOW) for b in range(BELOW)]
    rng.shuffle(sums)
    directory.mkdir(parents=True, exist_ok=True)
    prompts = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    shown = [
        {
            "prompt": row["prompt"],
            "completion": _misprint(row["answer"], rng) if rng.random() < wrong else row["answer"],
        }
        for row in rng.sample(prompts, demonstrations)
    ]
    (directory / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))


def _misprint(answer: str, rng: random.Random) -> str:
    place = rng.randrange(len(answer))
    digit = rng.choice([d for d in "0123456789" if d != answer[place]])
    return answer[:place] + digit + answer[place + 1 :]


def write_model(directory: Path, seed: int) -> None:
    """A small Llama over bytes."""
    small.write_model(byte_tokenizer(), directory, positions=64, seed=seed)


@dataclass(frozen=True)
class Answers:
    """What is to be said of one policy's answers beside whether they are right: no reward sees it."""

    well_formed: float  # share that end by themselves and are a number without leading zeros
    error: float  # mean distance of the well-formed answers from the sum

    @classmethod
    def read(cls, heldout: Path, model: Path) -> Answers:
        rows, texts = responses.read(heldout, model)
        numbers = [
            (int(text), int(row["answer"]))
            for row, text in zip(rows, texts, strict=True)
            if row["finish_reason"] == "stop" and text.isascii() and text.isdigit() and text == str(int(text))
        ]
        distances = [abs(number - answer) for number, answer in numbers]
        return cls(len(numbers) / len(rows), fmean(distances) if distances else math.nan)
