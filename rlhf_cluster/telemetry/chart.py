"""Charts as inline SVG: lines over steps, and bars stacked by part.

Own code rather than matplotlib: two kinds of chart, whose colours must follow the reader's light or dark theme through
CSS variables (an SVG of matplotlib has them burnt in), are not worth 30 MB of packages in every worker's image.
Takes numbers, gives escaped SVG text; colours `--c0` .. `--c7` come from the page. Knows nothing of metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 74, 12, 12, 40
COLOURS = 8
MAX_BARS = 120


@dataclass(frozen=True)
class Series:
    """A named line: `ys[i]` at step `xs[i]`; None leaves a gap."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]


@dataclass(frozen=True)
class Frame:
    """Maps values to the drawing area."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def line_chart(series: Sequence[Series], x_label: str, y_label: str, unit_square: bool = False) -> str:
    """Lines over steps. `unit_square` draws both axes from 0 to 1 and the diagonal (calibration)."""
    if unit_square:
        frame = Frame(0.0, 1.0, 0.0, 1.0)
        diagonal = _path([(frame.x(0), frame.y(0)), (frame.x(1), frame.y(1))], "diagonal")
        return _svg(frame, x_label, y_label, diagonal + "".join(_line(s, i, frame) for i, s in enumerate(series)))
    xs = [x for s in series for x in s.xs]
    ys = [y for s in series for y in s.ys if y is not None]
    frame = Frame(*_range(xs, pad=0.0), *_range(ys, pad=0.06))
    return _svg(frame, x_label, y_label, "".join(_line(s, i, frame) for i, s in enumerate(series)))


def stacked_chart(parts: Sequence[Series], x_label: str, y_label: str) -> str:
    """One bar per step, `parts` stacked in order from 0. Beyond MAX_BARS steps a bar is the mean of neighbours."""
    steps = sorted({x for part in parts for x in part.xs})
    by_part = [dict(zip(part.xs, part.ys, strict=True)) for part in parts]
    groups = _groups(steps)
    heights = [[sum(values.get(x) or 0.0 for x in group) / len(group) for values in by_part] for group in groups]
    step = (steps[-1] - steps[0]) / max(1, len(steps) - 1) or 1.0
    frame = Frame(steps[0] - step / 2, steps[-1] + step / 2, 0.0, (max(map(sum, heights)) or 1.0) * 1.06)
    bars = "".join(_bar(parts, group, height, step, frame) for group, height in zip(groups, heights, strict=True))
    return _svg(frame, x_label, y_label, bars)


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _range(values: Sequence[float], pad: float) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # one value only, or none that can be told apart
        return low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    return low - pad * (high - low), high + pad * (high - low)


def _groups(steps: Sequence[float]) -> list[Sequence[float]]:
    size = math.ceil(len(steps) / MAX_BARS)
    return [steps[i : i + size] for i in range(0, len(steps), size)]


def _line(series: Series, index: int, frame: Frame) -> str:
    points = [(x, y) for x, y in zip(series.xs, series.ys, strict=True)]
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((frame.x(x), frame.y(y)))
    lines = "".join(_path(run, f"line c{index % COLOURS}") for run in runs if len(run) > 1)
    if len(points) > MAX_BARS:
        return lines
    dots = "".join(
        f'<circle class="c{index % COLOURS}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5">'
        f"<title>{escape(series.name)}: {y:.5g} at {x:g}</title></circle>"
        for x, y in points
        if y is not None
    )
    return lines + dots


def _path(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _bar(parts: Sequence[Series], group: Sequence[float], heights: Sequence[float], step: float, frame: Frame) -> str:
    left, right = frame.x(group[0] - 0.4 * step), frame.x(group[-1] + 0.4 * step)
    drawn, base = [], 0.0
    for index, (part, height) in enumerate(zip(parts, heights, strict=True)):
        top, bottom = frame.y(base + height), frame.y(base)
        base += height
        drawn.append(
            f'<rect class="c{index % COLOURS}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{bottom - top:.2f}"><title>{escape(part.name)}: {height:.3g} s at {group[0]:g}</title></rect>'
        )
    return "".join(drawn)


def _svg(frame: Frame, x_label: str, y_label: str, content: str) -> str:
    foot = HEIGHT - BOTTOM
    xs, ys = ticks(frame.x_low, frame.x_high), ticks(frame.y_low, frame.y_high)
    grid = "".join(f'<path class="rule" d="M{LEFT} {frame.y(y):.1f}H{WIDTH - RIGHT}"/>' for y in ys)
    labels = "".join(f'<text x="{LEFT - 7}" y="{frame.y(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>' for y in ys)
    labels += "".join(
        f'<text x="{frame.x(x):.1f}" y="{foot + 16}" text-anchor="middle">{_number(x)}</text>' for x in xs
    )
    middle, centre = (TOP + foot) / 2, (LEFT + WIDTH - RIGHT) / 2
    label = '<text class="label" text-anchor="middle"'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">'
        f'{grid}<path class="axis" d="M{LEFT} {foot}H{WIDTH - RIGHT}"/>{content}{labels}'
        f'{label} x="{centre}" y="{HEIGHT - 6}">{escape(x_label)}</text>'
        f'{label} transform="translate(13 {middle}) rotate(-90)">{escape(y_label)}</text>'
        "</svg>"
    )


def _number(value: float) -> str:
    return f"{value:.6g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"
