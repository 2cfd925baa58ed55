from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from rlhf_cluster.telemetry.calibration import CalibrationBin, calibration, read_calibration, write_calibration
from rlhf_cluster.telemetry.comparison import ReportError


def test_worked_by_hand() -> None:
    even, sure = 0.0, math.log(9)  # probabilities 0.5 and 0.9, in the first and the fifth of five bins
    first, last = calibration([even, sure, sure, -sure, sure])
    assert first == CalibrationBin(0.5, 0.5, 1)
    assert last.predicted == pytest.approx(0.9)
    assert (last.observed, last.pairs) == (0.75, 4)


def test_bins_are_a_tenth_wide() -> None:
    # sigmoid(0.4) = 0.599, sigmoid(0.42) = 0.603, sigmoid(0.84) = 0.698, sigmoid(0.86) = 0.703
    bins = calibration([0.4, 0.42, 0.84, 0.86])
    assert [one.pairs for one in bins] == [1, 2, 1]


def test_labels_drawn_from_the_model_lie_on_the_diagonal() -> None:
    rng = random.Random(1)
    gaps = [abs(rng.gauss(0, 2)) for _ in range(40_000)]
    margins = [gap if rng.random() < 1 / (1 + math.exp(-gap)) else -gap for gap in gaps]
    for one in calibration(margins, bins=4):
        assert one.observed == pytest.approx(one.predicted, abs=0.015)


def test_every_pair_is_in_one_bin_and_huge_margins_too() -> None:
    assert sum(one.pairs for one in calibration([0.0, 1e4, -1e4, 0.3])) == 4


def test_file_round_trip_and_refusals(tmp_path: Path) -> None:
    bins = calibration([0.2, -0.4, 3.0])
    write_calibration(tmp_path, bins)
    assert read_calibration(tmp_path) == bins
    (tmp_path / "rm_calibration.json").write_text('[{"predicted": 1}]')
    with pytest.raises(ReportError, match="not a list of calibration bins"):
        read_calibration(tmp_path)
    with pytest.raises(ReportError, match="nan"):
        calibration([math.nan])
