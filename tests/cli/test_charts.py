"""Charts in a page, and text that stays text."""

from __future__ import annotations

import re
import statistics

import pytest

from minillama.cli.charts import Chart, downsample, text, ticks, with_equal_axes
from reported_runs import Page


def test_a_lone_surrogate_and_controls_can_be_written():
    assert text("a\ud800\x01\u2028<é>") == "a?\ufffd\u2028&lt;é&gt;"


def test_a_chart_places_its_points_between_its_ticks():
    drawn = Chart('"<c>', "step", [("one", [(0, 0.0), (50, 1.0), (100, 0.5)], "c0")]).svg()
    points = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]*)"', drawn)[1].split()]
    (x0, bottom), (x1, top), (x2, middle) = points
    assert x1 - x0 == pytest.approx(x2 - x1) and middle == pytest.approx((top + bottom) / 2)
    assert 'text-anchor="end">0.2<' in drawn and "one: 1.0000" in drawn
    assert Page(drawn).labels == {'"<c>'} and '""<c>' not in drawn


def test_a_chart_of_single_points_is_left_out_and_beside_a_curve_a_point_is_drawn():
    assert not Chart("c", "step", [("one", [(1, 0.5)], "c0"), ("two", [(1, 0.7)], "c1"), ("none", [], "c2")]).drawn()
    lines = [("one", [(1, 0.5)], "c0"), ("two", [(1, 0.7), (2, 0.5)], "c1")]
    assert Chart("c", "step", lines, dots=False).svg().count("<circle") == 1
    assert Chart("c", "step", lines).svg().count("<circle") == 3


def test_charts_beside_each_other_have_one_axis():
    low, high = (Chart("c", "step", [("one", [(0, y), (9, y + 0.1)], "c0")]) for y in (0.1, 0.8))
    alike = with_equal_axes([low, Chart("none", "step", []), high])
    labels = [re.findall(r'text-anchor="end">([^<]*)<', chart.svg()) for chart in alike]
    assert len(alike) == 2 and labels[0] == labels[1] and labels[0] != re.findall(r'"end">([^<]*)<', low.svg())


@pytest.mark.parametrize("low, high", [(0, 1), (0.41, 0.43), (1, 1), (0, 0), (-3, 5e7), (1e-9, 2e-9), (2.0, 2.0001)])
def test_ticks_are_few_even_and_hold_the_range(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 8 and found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 * abs(high)
    gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert max(gaps) == pytest.approx(min(gaps)) and min(gaps) > 0


def test_a_long_curve_keeps_its_mean():
    points = [(float(i), i**0.5) for i in range(1200)]
    few, size = downsample(points)
    assert (len(few), size) == (150, 8)
    assert statistics.fmean(y for _, y in few) == pytest.approx(statistics.fmean(y for _, y in points))
