"""line_plot.py: a document that XML readers take, points where the axes say, every name in it."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from line_plot import line_plot, ticks

SVG = "{http://www.w3.org/2000/svg}"


def drawn(curves, levels=()):
    return ET.fromstring(line_plot(curves, dict(levels), title="a < b & c", x_label="alpha", y_label="accuracy"))


def axis(root, anchor, coordinate):
    """Pixels of the ticks by their numbers."""
    found = {}
    for one in root.iter(f"{SVG}text"):
        if one.get("text-anchor") == anchor:
            try:
                found[float(one.text)] = float(one.get(coordinate))
            except ValueError:
                continue
    return found


def test_points_lie_where_the_axes_say():
    curve = [(0.0, 0.2), (0.5, 0.47), (1.0, 0.6)]
    root = drawn({"dev": curve})
    xs, ys = axis(root, "middle", "x"), axis(root, "end", "y")
    assert min(xs) == 0 and max(xs) == 1 and min(ys) < 0.2 and max(ys) > 0.6
    assert xs[min(xs)] < xs[max(xs)] and ys[min(ys)] > ys[max(ys)]  # more is right, and up
    (line,) = root.iter(f"{SVG}polyline")
    places = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    per_x = (xs[max(xs)] - xs[min(xs)]) / (max(xs) - min(xs))
    per_y = (ys[max(ys)] - ys[min(ys)]) / (max(ys) - min(ys))
    for (x, y), (across, down) in zip(curve, places, strict=True):
        assert across == pytest.approx(xs[min(xs)] + per_x * (x - min(xs)), abs=0.2)
        assert down == pytest.approx(ys[min(ys)] - 4 + per_y * (y - min(ys)), abs=0.2)


def test_curves_and_levels_have_their_names_and_no_two_the_same_line():
    curves = {f"set <{i}>": [(0, 0.1 * i), (1, 0.5)] for i in range(12)}
    root = drawn(curves, {"chance": 0.25})
    words = [one.text for one in root.iter(f"{SVG}text")]
    assert {"alpha", "accuracy", "a < b & c", "chance (0.25)", *curves} <= set(words)
    styles = [(one.get("stroke"), one.get("stroke-dasharray")) for one in root.iter(f"{SVG}polyline")]
    assert len(set(styles)) == 12


@pytest.mark.parametrize("curve", [[(1.0, 0.5)], [(0.0, 0.4), (1.0, 0.4)]])
def test_a_single_point_and_a_level_line_have_a_picture(curve):
    assert len(list(drawn({"dev": curve}).iter(f"{SVG}circle"))) == len(curve)


@pytest.mark.parametrize("low, high", [(0, 1), (0.18, 0.53), (0.4499, 0.4501), (0, 7), (0.95, 1.05)])
def test_ticks_are_few_and_reach_over_the_ends(low, high):
    found = ticks(low, high)
    assert 5 <= len(found) <= 13 and found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
    gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))
