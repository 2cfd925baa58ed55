"""How well a reward model's probabilities hold: predicted against observed preference, for the report.

Takes the differences of scores between the preferred and the other response of held-out pairs, gives bins; reads and
writes `rm_calibration.json`. Knows nothing of how the scores were made.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_cluster.telemetry.comparison import ReportError

FILE = "rm_calibration.json"


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs whose favourite the model gives a probability near `predicted`; `observed`: how often it is right."""

    predicted: float
    observed: float
    pairs: int


def calibration(margins: Sequence[float], bins: int = 5) -> list[CalibrationBin]:
    """Bins of equal width over [0.5, 1] of the probability that the model gives its own favourite; empty ones left out.

    `margins`, one per pair: score of the response that the labeler preferred minus score of the other. The probability
    is sigmoid(|margin|) (Bradley-Terry, as in InstructGPT eq. 1); the model is right where margin > 0, and half right
    at 0, where it has no favourite. Raises ReportError on a margin that is not finite.
    """
    grouped: dict[int, list[tuple[float, float]]] = {}
    for margin in margins:
        if not math.isfinite(margin):
            raise ReportError(f"a margin of the reward model is {margin}; all must be finite")
        probability = 1.0 / (1.0 + math.exp(-abs(margin)))
        right = 0.5 if margin == 0 else float(margin > 0)
        grouped.setdefault(min(int((probability - 0.5) * 2 * bins), bins - 1), []).append((probability, right))
    return [_bin(grouped[index]) for index in sorted(grouped)]


def _bin(pairs: list[tuple[float, float]]) -> CalibrationBin:
    n = len(pairs)
    return CalibrationBin(sum(p for p, _ in pairs) / n, sum(right for _, right in pairs) / n, n)


def write_calibration(run_dir: Path, bins: Sequence[CalibrationBin]) -> None:
    text = json.dumps([dataclasses.asdict(one) for one in bins], indent=2, allow_nan=False)
    (run_dir / FILE).write_text(text + "\n", encoding="utf-8")


def read_calibration(run_dir: Path) -> list[CalibrationBin]:
    """Raises ReportError when the file is not a list of bins."""
    path = run_dir / FILE
    try:
        return [CalibrationBin(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (json.JSONDecodeError, TypeError) as error:
        raise ReportError(f"{path} is not a list of calibration bins: {error}") from error
