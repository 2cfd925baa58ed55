"""What is to be said of the held-out responses that a run leaves, without its gold score and without its reward; and a
few of them, to be kept beside the results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from afinn import Afinn
from transformers import AutoTokenizer

from rlhf_cluster.telemetry.comparison import read_samples

BEFORE, AFTER = Path("stages/before/heldout.parquet"), Path("heldout_after.parquet")  # within a run's directory
KEPT, SAMPLES = 8, Path(__file__).parent / "samples"


@dataclass(frozen=True)
class Text:
    """Means over the responses of one policy."""

    blind: float  # valence by a lexicon (AFINN) that nothing is trained on
    ended: float  # share that end by themselves
    distinct_2: float  # different pairs of words over all pairs
    tokens: float


def read(heldout: Path, tokenizer: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file of held-out samples, and the text of each response."""
    rows = pq.read_table(heldout).to_pylist()
    texts = AutoTokenizer.from_pretrained(tokenizer).batch_decode(
        [row["response_ids"] for row in rows], skip_special_tokens=True
    )
    return rows, texts


def read_text(heldout: Path, tokenizer: Path) -> Text:
    rows, texts = read(heldout, tokenizer)
    lexicon = Afinn()
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return Text(
        fmean(lexicon.score(text) for text in texts),
        fmean(row["finish_reason"] == "stop" for row in rows),
        len(set(pairs)) / len(pairs),
        fmean(len(row["response_ids"]) for row in rows),
    )


def table_of_text(rows: Mapping[str, list[Text]]) -> str:
    """Means over seeds, as Markdown."""
    lines = ["| policy | blind lexicon | ended | distinct-2 | tokens |", "|---|---|---|---|---|"]
    for name, texts in rows.items():
        means = [fmean(values) for values in zip(*map(dataclasses.astuple, texts), strict=True)]
        lines.append("| {} | {:+.2f} | {:.2f} | {:.2f} | {:.1f} |".format(name, *means))
    return "\n".join(lines)


def keep(benchmark: str, seed: int, runs: Mapping[str, Path], *, prompts: bool = True) -> None:
    """Leaves the first `KEPT` held-out prompts of each arm, with one response before and one after, in `samples/`;
    `prompts=False`: without the prompts, where those are other people's texts."""
    SAMPLES.mkdir(exist_ok=True)
    rows = [
        {"arm": arm, **{name: value for name, value in dataclasses.asdict(one).items() if prompts or name != "prompt"}}
        for arm, run in runs.items()
        for one in islice(read_samples(run / "samples.jsonl"), KEPT)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (SAMPLES / f"{benchmark}-{seed}.jsonl").write_text("".join(lines), "utf-8")
