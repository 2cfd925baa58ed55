"""One loader for each `data.source`; all keep the same promise: `load_corpus(cfg, seed) -> Corpus`.

    files      the user's own prompts, demonstrations, comparisons; a bad row is refused
    sentiment  prompts and demonstrations made by the package; a labeler ranks the policy's own samples
    hh         Anthropic's preference pairs: prompts = contexts, demonstrations = chosen responses
    oasst      Open Assistant's conversation trees: K-wise human rankings

Both of these are split by conversation, not by context: a later turn of a held-out conversation is never trained on.
They are public data with known blemishes: bad rows are dropped and counted by reason.
"""

from __future__ import annotations

from collections.abc import Callable

from rlhf_cluster.config import DataConfig
from rlhf_cluster.data import sentiment
from rlhf_cluster.data.hh import parse_hh
from rlhf_cluster.data.oasst import parse_oasst
from rlhf_cluster.data.parse import parse_comparison, parse_demonstration, parse_prompt
from rlhf_cluster.data.readers import read_rows
from rlhf_cluster.data.rows import DataError, DemonstrationRow, Place, PromptRow, RawRow, prompt_id
from rlhf_cluster.data.split import Corpus, Pool, split

Fill = Callable[[Pool, RawRow], None]


def load_corpus(cfg: DataConfig, seed: int) -> Corpus:
    """Reads, checks and splits what `cfg.source` names. Raises DataError for what cannot be used."""
    if cfg.source not in SOURCES:
        raise DataError(Place("config"), f"data.source={cfg.source}", f"allowed: {', '.join(SOURCES)}")
    pool = SOURCES[cfg.source](cfg)
    if not (pool.prompts or pool.demonstrations or pool.comparisons):
        raise DataError(pool.place, f"nothing to use for data.source={cfg.source}", str(pool.drops))
    return split(pool, cfg, seed)


def _files(cfg: DataConfig) -> Pool:
    """Each path may be empty: its stage is then not run on data."""
    pool = Pool(Place(cfg.prompts or cfg.demonstrations or cfg.comparisons or "data.source=files"), "refuse")
    for path, fill in (
        (cfg.prompts, fill_prompts),
        (cfg.demonstrations, fill_demonstrations),
        (cfg.comparisons, fill_comparisons),
        (cfg.heldout_comparisons, fill_heldout_comparisons),
    ):
        for row in read_rows(path) if path else ():
            fill(pool, row)
    return pool


def _sentiment(cfg: DataConfig) -> Pool:
    """Grouped by subject: a held-out prompt asks about something that training never named."""
    pool = Pool(Place(sentiment.SOURCE), "refuse", sentiment.subject_of)
    pool.prompts = sentiment.prompts()
    pool.demonstrations = sentiment.demonstrations()
    return pool


def _hh(cfg: DataConfig) -> Pool:
    return _dropping(Pool(Place(cfg.path), "drop", _root), cfg, fill_hh)


def _oasst(cfg: DataConfig) -> Pool:
    return _dropping(Pool(Place(cfg.path), "drop", _root), cfg, fill_oasst)


def _dropping(pool: Pool, cfg: DataConfig, fill: Fill) -> Pool:
    """A row that cannot be used is counted; a file that cannot be read is still an error."""
    if not cfg.path:
        raise DataError(Place("config"), "data.path is empty", f"data.source={cfg.source} needs it: the file to read")
    for row in read_rows(cfg.path):
        try:
            fill(pool, row)
        except DataError as error:
            pool.drops.add(error)
    return pool


def _root(prompt: PromptRow) -> str:
    """The conversation that a prompt belongs to, by its first message: two that begin alike are one group."""
    return prompt_id(prompt.messages[:1])


def fill_prompts(pool: Pool, row: RawRow) -> None:
    pool.prompts.append(parse_prompt(row))


def fill_demonstrations(pool: Pool, row: RawRow) -> None:
    pool.demonstrations.append(parse_demonstration(row))


def fill_comparisons(pool: Pool, row: RawRow) -> None:
    pool.comparisons.append(parse_comparison(row))


def fill_heldout_comparisons(pool: Pool, row: RawRow) -> None:
    pool.heldout_comparisons.append(parse_comparison(row))


def fill_hh(pool: Pool, row: RawRow) -> None:
    pair = parse_hh(row)
    pool.comparisons.append(pair)
    pool.prompts.append(pair.prompt)
    pool.demonstrations.append(DemonstrationRow(pair.prompt, pair.responses[0]))


def fill_oasst(pool: Pool, row: RawRow) -> None:
    tree = parse_oasst(row, pool.drops.add)
    pool.prompts.extend(tree.prompts)
    pool.demonstrations.extend(tree.demonstrations)
    pool.comparisons.extend(tree.comparisons)


SOURCES: dict[str, Callable[[DataConfig], Pool]] = {
    "files": _files,
    "sentiment": _sentiment,
    "hh": _hh,
    "oasst": _oasst,
}
