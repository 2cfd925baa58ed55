"""What a run claims at its end: the comparison before/after on held-out prompts, and samples to look at beside it.

Takes scores by prompt and sample, gives means with standard errors; reads and writes `comparison.json` and
`samples.jsonl`. Knows nothing of who made the responses or the scores. Responses are untrusted text: whoever shows
them passes them through `printable`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rlhf_cluster.storage.durable import replace_text

VADER_NOTE = (
    "The 'gold' labeler is a sentiment lexicon (VADER), a stand-in for a human labeler. It counts words of praise and "
    "complaint and does not judge whether a response is true or helpful. PPO never sees its scores."
)
REWARD_NOTE = (
    "This score is the reward's own, what PPO was trained to raise: that it rose shows that the optimisation works. "
    "How much better the responses became, it shows as far as the reward can be trusted."
)


class ReportError(ValueError):
    """Numbers or a file that no report can be made from; the message names them."""


@dataclass(frozen=True)
class Gold:
    """Who scores a comparison, and what a reader must know of them wherever it is shown."""

    name: str
    about: str


def gold_of(labeler: str, rewards: Collection[str]) -> Gold:
    """`labeler`: its name, empty where the reward itself is the judge; `rewards`: the kinds that the score is made
    of."""
    if not labeler:
        return Gold("the reward itself", REWARD_NOTE)
    if set(rewards) == {labeler}:
        return Gold(f"{labeler}, the reward itself", REWARD_NOTE)
    if labeler in rewards:
        return Gold(
            f"{labeler}, a part of the reward", f"'{labeler}' is one of the parts that PPO was trained to raise."
        )
    return Gold(labeler, VADER_NOTE if labeler == "vader" else f"PPO never sees the scores of '{labeler}'.")


@dataclass(frozen=True)
class Comparison:
    """The gold score before and after on the same held-out prompts. Standard errors are over prompts."""

    gold: str
    about_gold: str
    prompts: int
    samples_per_prompt: int
    before_mean: float
    before_se: float
    after_mean: float
    after_se: float
    difference: float
    difference_se: float
    kl_mean: float | None  # None: the run had no reference to measure it from
    kl_se: float | None

    @property
    def standard_errors(self) -> float:
        """The paired difference in its own standard errors; infinite where every prompt moved by the same amount."""
        if self.difference_se == 0.0:
            return math.copysign(math.inf, self.difference) if self.difference else 0.0
        return self.difference / self.difference_se

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ReportError when the text is not JSON or not exactly these fields."""
        return cls(**_fields(cls, text, "comparison"))


@dataclass(frozen=True)
class Sample:
    """One held-out prompt with a response of the policy before and after PPO, and the gold score of each."""

    prompt: str
    before: str
    after: str
    before_score: float
    after_score: float


def compare(
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    kl: Sequence[Sequence[float]] | None,
    gold: Gold,
) -> Comparison:
    """Paired comparison of `before` and `after`, both [prompts][samples]; `kl`, in nats per response, likewise (None
    without a reference).

    A prompt counts as one observation: its mean over samples. Standard error: sample deviation (ddof = 1) of these
    means / sqrt(prompts). Row i of all three speaks of the same prompt. Raises ReportError on fewer than two prompts,
    on rows that do not match, and on values that are not finite.
    """
    samples = _samples_per_prompt(before=before, after=after, **({} if kl is None else {"kl": kl}))
    before_means, after_means = _prompt_means(before), _prompt_means(after)
    differences = [a - b for a, b in zip(after_means, before_means, strict=True)]
    columns = (before_means, after_means, differences)
    (before_mean, before_se), (after_mean, after_se), (difference, difference_se) = map(_mean_and_se, columns)
    kl_mean, kl_se = (None, None) if kl is None else _mean_and_se(_prompt_means(kl))
    return Comparison(
        gold=gold.name,
        about_gold=gold.about,
        prompts=len(before_means),
        samples_per_prompt=samples,
        before_mean=before_mean,
        before_se=before_se,
        after_mean=after_mean,
        after_se=after_se,
        difference=difference,
        difference_se=difference_se,
        kl_mean=kl_mean,
        kl_se=kl_se,
    )


def _samples_per_prompt(**tables: Sequence[Sequence[float]]) -> int:
    shapes = {name: (len(table), {len(row) for row in table}) for name, table in tables.items()}
    prompts, lengths = shapes["before"]
    if prompts < 2:
        raise ReportError(f"a comparison needs at least 2 prompts for a standard error; it has {prompts}")
    if len(lengths) != 1 or lengths == {0} or len({(n, tuple(sizes)) for n, sizes in shapes.values()}) != 1:
        seen = ", ".join(f"{name}: {n} prompts with {sorted(sizes)} samples" for name, (n, sizes) in shapes.items())
        raise ReportError(f"a comparison needs the same prompts and samples per prompt throughout; it has {seen}")
    for name, table in tables.items():
        for index, row in enumerate(table):
            if not all(math.isfinite(value) for value in row):
                raise ReportError(f"{name} of prompt {index} is {list(row)}; all values must be finite")
    return lengths.pop()


def _prompt_means(scores: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(row) for row in scores]


def _mean_and_se(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Writes `samples` one JSON object per line, whole or not at all."""
    lines = (json.dumps(dataclasses.asdict(sample)) + "\n" for sample in samples)
    replace_text(path, "".join(lines), "the samples")


def read_samples(path: Path) -> list[Sample]:
    """Raises ReportError naming the file and the line that is not a sample."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [Sample(**_fields(Sample, line, f"{path}, line {i}")) for i, line in enumerate(lines, 1) if line.strip()]


def _fields(cls: type[Any], text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ReportError(f"{where} is not JSON: {error}") from error
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(found, dict) or set(found) != names:
        seen = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ReportError(f"{where} must have exactly the fields {sorted(names)}; it has {seen}")
    return found


def printable(text: str) -> str:
    """`text` without what could steer a terminal or reorder a page: control, format and surrogate characters."""
    return "".join(
        c if c in "\n\t" or not unicodedata.category(c).startswith("C") else "\N{REPLACEMENT CHARACTER}" for c in text
    )
