"""What a file is and what would become of its rows: `rlhf-cluster data check PATH`.

Takes a path and, for token lengths, a tokenizer; gives a `CheckReport` and its plain text. Goes through the whole file
whatever it meets: a bad row is counted and the first ones are named. Only a file that is not there, or has no rows,
raises DataError. Knows no config: limits of length and the held-out split are not its concern.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from rlhf_cluster.data import sources
from rlhf_cluster.data.drops import Dropped, Drops
from rlhf_cluster.data.hh import looks_like_hh
from rlhf_cluster.data.oasst import looks_like_oasst
from rlhf_cluster.data.readers import read_rows
from rlhf_cluster.data.rows import DataError, Place, RawRow
from rlhf_cluster.data.split import Pool, deduplicate
from rlhf_cluster.data.text import is_plain_text, read_texts, text_of, text_tokens
from rlhf_cluster.data.tokenize import Tokenizer, prompt_tokens, response_tokens

TEXT, UNKNOWN = "text", "unknown"

KINDS: dict[str, str] = {
    "prompts": "prompts for PPO (data.prompts)",
    "demonstrations": "demonstrations for SFT (data.demonstrations)",
    "comparisons": "comparisons for the reward model (data.comparisons)",
    "hh": "Anthropic preference pairs (data.source=hh)",
    "oasst": "Open Assistant conversation trees (data.source=oasst)",
    "text": "running text for the pretraining mix (data.pretraining)",
    UNKNOWN: "no known layout; wanted is 'prompt', 'prompt' + 'completion', 'messages', "
    "'prompt' + 'chosen' + 'rejected', 'prompt' + 'completions', or 'text'",
}

PUBLIC = ("hh", "oasst")  # whose bad rows are dropped and counted

FILL: dict[str, sources.Fill] = {
    "prompts": sources.fill_prompts,
    "demonstrations": sources.fill_demonstrations,
    "comparisons": sources.fill_comparisons,
    "hh": sources.fill_hh,
    "oasst": sources.fill_oasst,
}


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens of a set of texts; responses count their EOS."""

    count: int
    smallest: int
    median: float
    mean: float
    p95: float
    largest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        median, p95 = np.percentile(lengths, [50, 95])
        return cls(len(lengths), min(lengths), float(median), float(np.mean(lengths)), float(p95), max(lengths))

    def __str__(self) -> str:
        middle = f"median {self.median:.0f}, mean {self.mean:.1f}, 95 % {self.p95:.0f}"
        return f"min {self.smallest}, {middle}, max {self.largest}"


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. `refused` counts the rows that cannot be used, for which a run would refuse the user's own
    files. `usable` counts rows by record; `tokens` is empty without a tokenizer; `pairs` counts the
    pairs of all rankings, `tied_pairs` those without a winner; `k` is the number of rankings of each size."""

    path: str
    kind: str
    rows: int
    refused: int
    columns: tuple[str, ...]
    usable: Mapping[str, int]
    dropped: Mapping[str, Dropped]
    k: Mapping[int, int]
    pairs: int
    tied_pairs: int
    tokens: Mapping[str, Lengths]

    @property
    def accepted(self) -> bool:
        """Whether a run would take the file: something of it is usable, and of the user's own every row."""
        return bool(self.usable) and (not self.refused or self.kind in PUBLIC)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def check(path: str | Path, tokenizer: Tokenizer | None = None) -> CheckReport:
    """Reads all of `path`. Raises DataError for a missing path, an unknown kind of file, or no rows at all."""
    if is_plain_text(str(path)):
        return _of_plain_text(str(path), tokenizer)
    pool = Pool(Place(str(path)), "drop")
    texts: list[str] = []
    rows = list(read_rows(path, pool.drops.add))
    unread = sum(pool.drops.counts().values())
    kind = next((found for found in map(guess_kind, rows) if found != UNKNOWN), UNKNOWN)
    if kind == TEXT:
        _each(rows, lambda row: texts.append(text_of(row)), pool.drops)
    elif kind != UNKNOWN:
        _each(rows, partial(FILL[kind], pool), pool.drops)
    tokens = _token_lengths(pool, texts, tokenizer) if tokenizer is not None else {}
    k = Counter(len(row.ranks) for row in pool.comparisons)
    tied = sum(one == other for row in pool.comparisons for one, other in combinations(row.ranks, 2))
    refused = sum(pool.drops.counts().values()) + (len(rows) if kind == UNKNOWN else 0)
    deduplicate(pool)
    made: dict[str, Sequence[object]] = {
        "prompts": pool.prompts,
        "demonstrations": pool.demonstrations,
        "comparisons": pool.comparisons,
        "documents": texts,
    }
    return CheckReport(
        path=str(path),
        kind=kind,
        rows=len(rows) + unread,
        refused=refused,
        columns=tuple(rows[0].values) if rows else (),
        usable={name: len(usable) for name, usable in made.items() if usable},
        dropped=pool.drops.by_reason,
        k=dict(sorted(k.items())),
        pairs=sum(count * size * (size - 1) // 2 for size, count in k.items()),
        tied_pairs=tied,
        tokens=tokens,
    )


def guess_kind(row: RawRow) -> str:
    """The layout of a row by the columns that it has, `unknown` where none fits."""
    has = {name for name, value in row.values.items() if value is not None}
    if looks_like_oasst(row):
        return "oasst"
    if looks_like_hh(row):
        return "hh"
    if {"chosen", "rejected"} <= has or {"prompt", "completions"} <= has:
        return "comparisons"
    if {"prompt", "completion"} <= has or "messages" in has:
        return "demonstrations"
    if "prompt" in has:
        return "prompts"
    return TEXT if "text" in has else UNKNOWN


def _of_plain_text(path: str, tokenizer: Tokenizer | None) -> CheckReport:
    """Of `.txt`, where each file is a document."""
    texts = list(read_texts(path))
    tokens = {} if tokenizer is None else {"document": Lengths.of(text_tokens(texts, tokenizer))}
    return CheckReport(path, TEXT, len(texts), 0, (), {"documents": len(texts)}, {}, {}, 0, 0, tokens)


def _each(rows: Iterable[RawRow], take: Callable[[RawRow], None], drops: Drops) -> None:
    """Takes every row; one that cannot be used is counted, and the next is tried."""
    for row in rows:
        try:
            take(row)
        except DataError as error:
            drops.add(error)


def _token_lengths(pool: Pool, texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, Lengths]:
    """By record; a prompt that the template refuses, or a response with EOS inside, is noted and not measured."""
    asked = [row.prompt for row in pool.demonstrations] + [row.prompt for row in pool.comparisons]
    prompts = pool.prompts or asked
    ranked = [(text, row.prompt.place) for row in pool.comparisons for text in row.responses]
    answers = ranked or [(row.response, row.prompt.place) for row in pool.demonstrations]
    lengths: dict[str, list[int]] = {"prompt": [], "response": [], "document": text_tokens(texts, tokenizer)}
    for row in prompts:
        try:
            lengths["prompt"].append(len(prompt_tokens(row.messages, tokenizer, row.place)))
        except DataError as error:
            pool.drops.add(error)
    for text, place in answers:
        try:
            lengths["response"].append(len(response_tokens(text, tokenizer, place)))
        except DataError as error:
            pool.drops.add(error)
    return {name: Lengths.of(values) for name, values in lengths.items() if values}


def _lines(report: CheckReport) -> Iterable[str]:
    yield f"{report.path}: {KINDS[report.kind]}"
    yield f"{'rows':<10}{report.rows:,}; columns {', '.join(report.columns) or 'none'}"
    yield f"{'usable':<10}{', '.join(f'{count:,} {name}' for name, count in report.usable.items()) or 'none'}"
    if report.k:
        yield f"{'K':<10}{', '.join(f'{count:,} of {size} responses' for size, count in report.k.items())}"
        yield f"{'ties':<10}{report.tied_pairs:,} of {report.pairs:,} pairs ({report.tied_pairs / report.pairs:.1%})"
    for name, lengths in report.tokens.items():
        yield f"{name:<10}tokens {lengths}"
    yield f"{'dropped':<10}{sum(entry.count for entry in report.dropped.values()):,}"
    for reason, entry in report.dropped.items():
        yield f"{entry.count:>9,} {reason}"
        yield from (f"{'':<12}{example}" for example in entry.examples)
    if not report.accepted:
        if report.usable:
            yield f"a run would refuse it: {report.refused:,} of {report.rows:,} rows cannot be used"
        else:
            yield "a run would refuse it: nothing of it can be used"
