"""What is kept away from training: whole groups, chosen by seed, so that no held-out prompt is ever trained on.

A group is what must stay on one side: a prompt with all its comparisons, a conversation tree, a subject. Takes the rows
of a source as a `Pool`, gives a `Corpus`. Knows neither files nor tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from rlhf_cluster.config import DataConfig
from rlhf_cluster.data.drops import Drops
from rlhf_cluster.data.rows import ComparisonRow, DataError, DemonstrationRow, Place, PromptRow
from rlhf_cluster.data.seeded import seeded_order

TooLong = Literal["refuse", "drop"]

SET_ASIDE = "{} of what is held out (data.heldout_prompts, data.heldout_fraction)"
ALL_TIED = "all responses tied"
DUPLICATE = "duplicate prompt"

T = TypeVar("T")


def by_prompt(prompt: PromptRow) -> str:
    return prompt.id


@dataclass
class Pool:
    """All that a source has, before the split. `group` says which rows must stay together."""

    place: Place
    too_long: TooLong
    group: Callable[[PromptRow], str] = by_prompt
    prompts: list[PromptRow] = field(default_factory=list)
    demonstrations: list[DemonstrationRow] = field(default_factory=list)
    comparisons: list[ComparisonRow] = field(default_factory=list)
    heldout_comparisons: list[ComparisonRow] = field(default_factory=list)  # where the source says which
    drops: Drops = field(default_factory=Drops)


@dataclass(frozen=True)
class Corpus:
    """Text rows for the three stages. Held-out prompts and comparisons share no group with anything else here.

    `dropped` counts, by reason, every row that was read and is not here. `too_long` says what tokenising does with a
    row beyond the limits: refuse it (the user's own files) or drop and count it (public data sets).
    """

    prompts: tuple[PromptRow, ...]
    heldout_prompts: tuple[PromptRow, ...]
    demonstrations: tuple[DemonstrationRow, ...]
    comparisons: tuple[ComparisonRow, ...]
    heldout_comparisons: tuple[ComparisonRow, ...]
    dropped: Mapping[str, int]
    too_long: TooLong


def split(pool: Pool, cfg: DataConfig, seed: int) -> Corpus:
    """Held-out rows first, then `data.max_*` on what is left for training; held-out rows are not thinned by them.

    A comparison of a prompt held out for the evaluation is held out too, so their share may exceed the fraction.
    """
    deduplicate(pool)
    held = _heldout_groups(pool, cfg, seed)
    prompts, held_prompts = _part(pool.prompts, lambda row: pool.group(row) in held)
    comparisons, held_comparisons = _part(pool.comparisons, lambda row: pool.group(row.prompt) in held)
    if pool.heldout_comparisons:
        pool.drops.add_count(SET_ASIDE.format("comparisons"), len(held_comparisons))
        held_comparisons = pool.heldout_comparisons
    demonstrations, aside = _part(pool.demonstrations, lambda row: pool.group(row.prompt) in held)
    _refuse_empty(pool, cfg, prompts, comparisons, demonstrations)
    kept = Corpus(
        prompts=_thin(prompts, cfg.max_prompts, _prompt_name, seed),
        heldout_prompts=_thin(held_prompts, cfg.heldout_prompts, _prompt_name, seed) if cfg.heldout_prompts else (),
        demonstrations=_thin(demonstrations, cfg.max_demonstrations, _demonstration_name, seed),
        comparisons=_thin(comparisons, cfg.max_comparisons, _comparison_name, seed),
        heldout_comparisons=tuple(held_comparisons),
        dropped={},
        too_long=pool.too_long,
    )
    pool.drops.add_count(SET_ASIDE.format("demonstrations"), len(aside))
    pool.drops.add_count(SET_ASIDE.format("prompts"), len(held_prompts) - len(kept.heldout_prompts))
    pool.drops.add_count("beyond data.max_prompts", len(prompts) - len(kept.prompts))
    pool.drops.add_count("beyond data.max_demonstrations", len(demonstrations) - len(kept.demonstrations))
    pool.drops.add_count("beyond data.max_comparisons", len(comparisons) - len(kept.comparisons))
    return replace(kept, dropped=pool.drops.counts())


def deduplicate(pool: Pool) -> None:
    """One prompt of each conversation; comparisons where all are tied go, since no pair of them has a winner."""
    unique: dict[str, PromptRow] = {}
    for row in pool.prompts:
        first = unique.setdefault(row.id, row)
        if first is not row:
            pool.drops.add(DataError(row.place, DUPLICATE, f"as in {first.place}"))
    pool.prompts = list(unique.values())
    for ranking in (*pool.comparisons, *pool.heldout_comparisons):
        if not ranking.decides:
            pool.drops.add(DataError(ranking.prompt.place, ALL_TIED, f"{len(ranking.ranks)} responses of one rank"))
    pool.comparisons = [row for row in pool.comparisons if row.decides]
    given, pool.heldout_comparisons = pool.heldout_comparisons, [r for r in pool.heldout_comparisons if r.decides]
    if given and not pool.heldout_comparisons:
        raise DataError(given[0].prompt.place, ALL_TIED, f"so are all {len(given)} held-out rankings; give others")


def _heldout_groups(pool: Pool, cfg: DataConfig, seed: int) -> set[str]:
    """Those of comparisons that the source holds out. Then groups in seeded order, each taken while it still helps to
    reach the number of prompts or, where the source holds out none, of comparisons."""
    prompts = Counter(pool.group(row) for row in pool.prompts)
    comparisons = Counter(pool.group(row.prompt) for row in pool.comparisons)
    _check_sizes(pool, cfg)
    held = {pool.group(row.prompt) for row in pool.heldout_comparisons}
    wanted = 0 if held else cfg.heldout_fraction * len(pool.comparisons)
    names = sorted((prompts.keys() | comparisons.keys()) - held)
    held_prompts, held_comparisons = sum(prompts[name] for name in held), 0
    for name in (names[position] for position in seeded_order(names, seed, "held-out")):
        helps_prompts = held_prompts < cfg.heldout_prompts and prompts[name]
        helps_comparisons = held_comparisons < wanted and comparisons[name]
        if helps_prompts or helps_comparisons:
            held.add(name)
            held_prompts += prompts[name]
            held_comparisons += comparisons[name]
    return held


def _check_sizes(pool: Pool, cfg: DataConfig) -> None:
    if not 0 <= cfg.heldout_fraction < 1:
        raise DataError(pool.place, "bad data.heldout_fraction", f"{cfg.heldout_fraction}; allowed: 0 up to but not 1")
    if pool.prompts and not 0 <= cfg.heldout_prompts < len(pool.prompts):
        allowed = f"there are {len(pool.prompts)} distinct prompts, so use 0 to {len(pool.prompts) - 1}"
        raise DataError(pool.place, f"data.heldout_prompts={cfg.heldout_prompts} leaves no prompt to train on", allowed)


def _refuse_empty(pool: Pool, cfg: DataConfig, *left: Sequence[object]) -> None:
    had: dict[str, Sequence[object]] = {
        "prompts": pool.prompts,
        "comparisons": pool.comparisons,
        "demonstrations": pool.demonstrations,
    }
    for (name, rows), rest in zip(had.items(), left, strict=True):
        if rows and not rest:
            seen = f"data.heldout_prompts={cfg.heldout_prompts} and data.heldout_fraction={cfg.heldout_fraction}"
            if pool.heldout_comparisons:
                seen = f"data.heldout_prompts={cfg.heldout_prompts} and the prompts of data.heldout_comparisons"
            raise DataError(pool.place, f"no {name} left to train on", f"{seen} set all {len(rows)} aside; lower them")


def _part(rows: Iterable[T], is_held: Callable[[T], bool]) -> tuple[list[T], list[T]]:
    """(for training, held out)"""
    train: list[T] = []
    held: list[T] = []
    for row in rows:
        (held if is_held(row) else train).append(row)
    return train, held


def _thin(rows: list[T], most: int, name: Callable[[T], str], seed: int) -> tuple[T, ...]:
    """A seeded choice of `most` rows (0: all), kept in file order; files are often sorted, the first would not do."""
    if most == 0:
        return tuple(rows)
    return tuple(rows[position] for position in sorted(seeded_order([name(row) for row in rows], seed, "thin")[:most]))


def _prompt_name(row: PromptRow) -> str:
    return row.id


def _demonstration_name(row: DemonstrationRow) -> str:
    return f"{row.prompt.id}/{row.response}"


def _comparison_name(row: ComparisonRow) -> str:
    return "/".join((row.prompt.id, *row.responses))
