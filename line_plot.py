"""A picture of a few curves as SVG, which browsers and papers take, without a plotting package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

# Okabe and Ito's colours, which the colour-blind can tell apart; and where these are used up, dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "7 3", "2 3")
LEFT, TOP, WIDTH, HEIGHT, LEGEND = 70, 44, 470, 300, 230  # of the frame, in pixels; the legend is right of it


def line_plot(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    levels: Mapping[str, float],
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> str:
    """An SVG document with a line through the points (x, y) of each curve, a horizontal line for each of `levels`,
    axes, and a legend with all their names.
    """
    points = [point for curve in curves.values() for point in curve]
    xs = ticks(*bounds([x for x, _ in points]))
    low, high = bounds([y for _, y in points] + list(levels.values()))
    ys = ticks(low - 0.03 * (high - low), high + 0.03 * (high - low))  # no line lies on the frame

    def across(x: float) -> float:
        return LEFT + WIDTH * (x - xs[0]) / (xs[-1] - xs[0])

    def up(y: float) -> float:
        return TOP + HEIGHT * (1 - (y - ys[0]) / (ys[-1] - ys[0]))

    right, bottom = LEFT + WIDTH, TOP + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + LEGEND} {bottom + 56}" '
        f'width="{right + LEGEND}" height="{bottom + 56}" font-family="Helvetica, Arial, sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        text(LEFT + WIDTH / 2, TOP - 18, title, 'text-anchor="middle" font-size="15"'),
        text(LEFT + WIDTH / 2, bottom + 42, x_label, 'text-anchor="middle"'),
        text(0, 0, y_label, f'text-anchor="middle" transform="translate(18 {TOP + HEIGHT / 2}) rotate(-90)"'),
    ]
    for x in xs:
        parts.append(line(across(x), bottom, across(x), bottom + 5, "#333"))
        parts.append(text(across(x), bottom + 20, f"{x:g}", 'text-anchor="middle"'))
    for y in ys:
        parts.append(line(LEFT - 5, up(y), right, up(y), "#ddd"))
        parts.append(text(LEFT - 9, up(y) + 4, f"{y:g}", 'text-anchor="end"'))
    parts.append(f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#333"/>')
    entries: list[tuple[str, str]] = []  # (name, style) of the legend
    for i, (name, curve) in enumerate(curves.items()):
        style = f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-dasharray="{DASHES[i // len(COLOURS) % len(DASHES)]}"'
        where = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curve)
        parts.append(f'<polyline points="{where}" fill="none" {style} stroke-width="2"/>')
        parts += [
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.2" fill="{COLOURS[i % len(COLOURS)]}"/>'
            for x, y in curve
        ]
        entries.append((name, f'{style} stroke-width="2"'))
    for i, (name, y) in enumerate(levels.items()):
        style = f'stroke="#555" stroke-dasharray="{("4 4", "1 4", "9 4")[i % 3]}"'
        parts.append(f'<line x1="{LEFT}" y1="{up(y):.1f}" x2="{right}" y2="{up(y):.1f}" {style} stroke-width="1.5"/>')
        entries.append((f"{name} ({y:.3g})", style))
    for i, (name, style) in enumerate(entries):
        y = TOP + 12 + 20 * i
        parts.append(f'<line x1="{right + 14}" y1="{y}" x2="{right + 40}" y2="{y}" {style}/>')
        parts.append(text(right + 47, y + 4, name if len(name) <= 26 else f"{name[:25]}…"))
    return "\n".join([*parts, "</svg>", ""])


def text(x: float, y: float, content: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest, a little apart where they are one."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.05, high + 0.05)


def ticks(low: float, high: float) -> list[float]:
    """Five to eleven round numbers, evenly spaced, from at most `low` to at least `high`."""
    rough = (high - low) / 10
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 10) for i in range(first, last + 1)]
