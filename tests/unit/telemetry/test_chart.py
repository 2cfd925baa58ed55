from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from rlhf_cluster.telemetry.chart import HEIGHT, MAX_BARS, WIDTH, Frame, Series, line_chart, stacked_chart, ticks


def numbers(svg: str, tag: str, attribute: str) -> list[float]:
    return [float(element.get(attribute, "nan")) for element in ElementTree.fromstring(svg).iter(tag)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (1, 40, [10, 20, 30, 40]), (-3, 3, [-3, -2, -1, 0, 1, 2, 3])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_frame_puts_the_corners_where_the_axes_are() -> None:
    frame = Frame(0.0, 10.0, -1.0, 1.0)
    assert (frame.x(0.0), frame.x(10.0)) == (74, WIDTH - 12)
    assert (frame.y(-1.0), frame.y(1.0)) == (HEIGHT - 40, 12)


def test_a_missing_value_is_a_gap_and_points_stay_inside() -> None:
    svg = line_chart([Series("kl", [1, 2, 3, 4, 5], [0.0, 1.0, None, 4.0, 2.0])], "step", "nats")
    assert svg.count("<polyline") == 2
    ys = numbers(svg, "circle", "cy")
    assert len(ys) == 4
    assert all(12 <= y <= HEIGHT - 40 for y in ys)
    assert ys[2] < ys[3] < ys[1] < ys[0]  # 4 > 2 > 1 > 0, and SVG counts down


@pytest.mark.parametrize("ys", [[], [None, None], [0.0, 0.0], [7.0, 7.0], [1e-30, 1e-30], [-5e8, -5e8]])
def test_flat_and_empty_lines_are_drawn(ys: list[float | None]) -> None:
    svg = line_chart([Series("x", list(range(len(ys))), ys)], "step", "y")
    assert "nan" not in svg
    assert "inf" not in svg.replace("infinite", "")
    ElementTree.fromstring(svg)


def test_a_stack_is_as_high_as_its_sum() -> None:
    parts = [Series("gen", [1, 2], [3.0, 1.0]), Series("update", [2, 1], [2.0, 1.0]), Series("late", [2], [None])]
    svg = stacked_chart(parts, "step", "seconds")
    heights, tops = numbers(svg, "rect", "height"), numbers(svg, "rect", "y")
    unit = (HEIGHT - 12 - 40) / (4.0 * 1.06)  # pixels per second: the highest stack is 3 + 1
    assert heights == pytest.approx([3 * unit, 1 * unit, 0.0, 1 * unit, 2 * unit, 0.0], abs=0.01)
    foot = HEIGHT - 40
    assert tops == pytest.approx([foot - n * unit for n in (3, 4, 4, 1, 3, 3)], abs=0.06)


def test_many_steps_are_averaged_into_few_bars() -> None:
    steps = list(range(1, 1001))
    svg = stacked_chart([Series("gen", steps, [2.0] * 1000)], "step", "seconds")
    heights = numbers(svg, "rect", "height")
    assert len(heights) <= MAX_BARS
    assert max(heights) - min(heights) < 0.02


def test_names_are_escaped() -> None:
    svg = line_chart([Series("<script>", [1], [1.0])], "<b>", 'y"')
    assert not re.search(r"<(script|b)\b", svg)
    ElementTree.fromstring(svg)
