"""Charts as SVG, for the pages (templates/parts.html) and for files of their own (plots.py)."""

from __future__ import annotations

import html
import math
import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

Point = tuple[float, float]
Line = tuple[str, Sequence[Point], str]  # name, points, CSS class
WIDTH, HEIGHT = 400, 240  # of the drawing of a chart
MOST_POINTS = 150  # per curve; more points are averaged
COLOURS = 8


def text(value: object) -> str:
    """The text of a value, escaped for HTML. Characters that HTML forbids become U+FFFD."""
    plain = str(value).encode("utf-8", "replace").decode("utf-8")
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", plain))


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers, the first at most `low`, the last at least `high`."""
    span = (high - low) or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(max(span / 5, 1e-300)))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if span / (size * factor) <= 5)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [number * step for number in range(first, last + 1)]


def downsample(points: Sequence[Point]) -> tuple[list[Point], int]:
    """At most MOST_POINTS means of consecutive points, and the number of points in each mean."""
    size = max(1, math.ceil(len(points) / MOST_POINTS))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part)) for part in parts], size


class Chart(NamedTuple):
    """Curves over an axis `across`. dots: mark the points, if they are few; axis: the least and the largest value that
    the vertical axis has to show, so that charts beside each other can be compared.
    """

    caption: str
    across: str
    lines: Sequence[Line]
    dots: bool = True
    axis: tuple[float, float] | None = None

    def drawn(self) -> list[Line]:
        """The lines to draw: those with points, if one of them has two; else none."""
        lines = [line for line in self.lines if line[1]]
        return lines if any(len(points) > 1 for _, points, _ in lines) else []

    def svg(self) -> str:
        """The SVG element."""
        opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(self.caption)}">'
        return f"{opening}{curves(self)}</svg>"


class Matrix(NamedTuple):
    """A square matrix of counts: a row for each true class, a column for each predicted one."""

    caption: str
    names: Sequence[str]
    rows: Sequence[Sequence[int]]


def with_equal_axes(charts: Sequence[Chart]) -> list[Chart]:
    """The charts that have something to draw, with one vertical axis for all."""
    drawn = [chart for chart in charts if chart.drawn()]
    ys = [y for chart in drawn for _, points, _ in chart.drawn() for _, y in points]
    return [chart._replace(axis=(min(ys), max(ys))) for chart in drawn]


def curves(chart: Chart) -> str:
    """The SVG elements of axes and curves, in an area of WIDTH x HEIGHT. The chart has something to draw."""
    across, lines, dots = chart.across, chart.drawn(), chart.dots
    width, height, left, right, top, bottom = WIDTH, HEIGHT, 44, 12, 10, 38
    xs = [x for _, points, _ in lines for x, _ in points]
    ys = [*(y for _, points, _ in lines for _, y in points), *(chart.axis or ())]
    x_low, x_high = min(0.0, *xs), max(*xs, 1e-9)
    x_ticks, y_ticks = ticks(x_low, x_high), ticks(min(ys), max(ys))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(point: Point) -> tuple[str, str]:
        x = left + (point[0] - x_low) / (x_high - x_low) * (width - left - right)
        y = height - bottom - (point[1] - y_low) / (y_high - y_low) * (height - top - bottom)
        return f"{x:.1f}", f"{y:.1f}"

    parts = []
    for tick in y_ticks:
        _, y = place((x_low, tick))
        parts.append(f'<path class="grid" d="M{left} {y}H{width - right}"/>')
        parts.append(f'<text x="{left - 6}" y="{y}" dy="4" text-anchor="end">{shown(tick)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = place((tick, y_low))
            parts.append(f'<text x="{x}" y="{height - bottom + 16}" text-anchor="middle">{shown(tick)}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle:g}" y="{height - 5}" text-anchor="middle">{text(across)}</text>')
    for name, points, style in lines:
        placed = [place(point) for point in points]
        parts.append(f'<g class="{style}"><title>{text(name)}</title>')
        parts.append(f'<polyline points="{" ".join(",".join(xy) for xy in placed)}"/>')
        if len(placed) == 1 or (dots and len(placed) <= 40):
            parts += [
                f'<circle cx="{x}" cy="{y}" r="2.5"><title>{text(name)}: {value[1]:.4f}</title></circle>'
                for (x, y), value in zip(placed, points, strict=True)
            ]
        parts.append("</g>")
    return "".join(parts)


def shown(number: float) -> str:
    """The label of a tick."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{round(number, 6):g}"


def colour(number: int, dashed: bool = False) -> str:
    return f"c{number % COLOURS}" + " dashed" * dashed
