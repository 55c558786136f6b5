"""HTML of a self-contained page with text, tables and SVG charts, for screens and for print.

The same drawings as files are in plots.py.
"""

from __future__ import annotations

import html
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

Point = tuple[float, float]
Line = tuple[str, Sequence[Point], str]  # name, points, CSS class
WIDTH, HEIGHT = 400, 240  # of the drawing of a chart
MOST_POINTS = 150  # per curve; more points are averaged
COLOURS = 8
STYLE = Path(__file__).parent.parent / "templates" / "style.css"


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
    """Curves over an axis `across`. dots: mark the points, if they are few."""

    caption: str
    across: str
    lines: Sequence[Line]
    dots: bool = True

    def drawn(self) -> list[Line]:
        """The lines to draw: those with points, if one of them has two; else none."""
        lines = [line for line in self.lines if line[1]]
        return lines if any(len(points) > 1 for _, points, _ in lines) else []


class Matrix(NamedTuple):
    """A square matrix of counts: a row for each true class, a column for each predicted one."""

    caption: str
    names: Sequence[str]
    rows: Sequence[Sequence[int]]


def chart(caption: str, across: str, lines: Sequence[Line], dots: bool = True) -> str:
    """A figure of curves with a legend. Returns "" if no line has two points."""
    if not (lines := Chart(caption, across, lines).drawn()):
        return ""
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(caption)}">'
    legend = "".join(f'<li><i class="{style}"></i> {text(name)}</li>' for name, _, style in lines)
    drawn = f'{opening}{curves(across, lines, dots)}</svg><ul class="legend">{legend}</ul>'
    return f"<figure><figcaption>{text(caption)}</figcaption>{drawn}</figure>"


def curves(across: str, lines: Sequence[Line], dots: bool) -> str:
    """The SVG elements of axes and curves, in an area of WIDTH x HEIGHT. Each line has a point, and one has two."""
    width, height, left, right, top, bottom = WIDTH, HEIGHT, 44, 12, 10, 38
    xs = [x for _, points, _ in lines for x, _ in points]
    ys = [y for _, points, _ in lines for _, y in points]
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


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """A table with text headers and HTML cells. words: indices of the text columns; the others hold numbers."""
    kinds = ["" if i in words else ' class="n"' for i in range(len(head))]
    heads = "".join(f"<th{kind}>{text(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    lines = ("".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def matrix_figure(caption: str, names: Sequence[str], rows: Sequence[Sequence[int]]) -> str:
    """A square matrix of counts as a figure. Each cell is shaded by its share of the row."""
    head = "".join(f"<th>{text(name)}</th>" for name in names)
    body = []
    for name, row in zip(names, rows, strict=True):
        cells = (f'<td style="--share:{n / max(1, sum(row)):.3f}">{n}</td>' for n in row)
        body.append(f'<tr><th scope="row">{text(name)}</th>{"".join(cells)}</tr>')
    return (
        f"<figure><figcaption>{text(caption)}</figcaption>"
        f'<div class="scroll"><table class="matrix"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></figure>"
    )


def document(title: str, body: Iterable[str]) -> str:
    """A complete HTML page. Its content security policy blocks scripts and external files."""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
        f"<title>{text(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body>{''.join(body)}</body></html>\n"
    )
