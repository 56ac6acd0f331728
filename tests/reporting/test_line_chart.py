"""Curves as SVG: where the points are, and what the axes say."""

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dmd_jax.reporting.line_chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_chart


class Chart:
    def __init__(self, *arguments):
        figure = ElementTree.fromstring(line_chart(*arguments))
        self.caption = "".join(figure.find("figcaption").itertext())
        svg = figure.find("svg")
        self.lines = {
            line.get("class"): np.array(
                [point.split(",") for point in line.get("points").split()], float
            )
            for line in svg.iter("polyline")
        }
        texts = [(text.text, text.get("text-anchor"), text) for text in svg.iter("text")]
        self.y_ticks = {
            text: float(node.get("y")) - 4 for text, anchor, node in texts if anchor == "end"
        }
        self.x_ticks = {
            text: float(node.get("x"))
            for text, anchor, node in texts
            if anchor == "middle" and text != "step"
        }
        self.words = [text for text, _, _ in texts]


def test_points_and_ticks_are_in_their_places():
    chart = Chart("loss", [0, 100, 200], [0.0, 1.0, 4.0])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    middle = (LEFT + right) / 2
    expected = [[LEFT, bottom], [middle, bottom - (bottom - TOP) / 4], [right, TOP]]
    np.testing.assert_allclose(chart.lines["line"], expected, atol=0.06)
    assert chart.caption == "loss"
    assert "step" in chart.words
    assert list(chart.y_ticks) == ["0", "1", "2", "3", "4"]
    np.testing.assert_allclose(chart.y_ticks["1"], bottom - (bottom - TOP) / 4, atol=0.06)
    assert list(chart.x_ticks) == ["0", "50", "100", "150", "200"]
    np.testing.assert_allclose(chart.x_ticks["100"], middle, atol=0.06)


def test_wide_ranges_get_a_logarithmic_axis():
    chart = Chart("loss", [0, 1, 2], [100.0, 1.0, 0.01])
    assert chart.caption == "loss log scale"
    assert list(chart.y_ticks) == ["0.01", "0.1", "1", "10", "100"]
    heights = chart.lines["line"][:, 1]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.11)


def test_a_logarithmic_axis_of_less_than_two_decades_has_ticks_between():
    assert list(Chart("a", [0, 1], [0.13, 4.5]).y_ticks) == ["0.2", "0.5", "1", "2"]


def test_zero_or_negative_values_keep_the_axis_linear():
    chart = Chart("a", [0, 1, 2], [-1e-3, 0.0, 100.0])
    assert chart.caption == "a"
    assert "0" in chart.y_ticks


def test_values_that_are_not_finite_are_left_out_and_counted():
    chart = Chart("a", [0, 1, 2, 3], [1.0, math.nan, math.inf, 2.0])
    assert chart.caption == "a 2 not finite, left out"
    assert len(chart.lines["line"]) == 2


def test_many_points_are_averaged_and_smoothed():
    steps = np.arange(4000)
    values = np.where(steps % 2, 1.0, -1.0)
    chart = Chart("a", steps, values + np.linspace(0, 0.001, 4000))
    assert set(chart.lines) == {"line thin", "line"}
    assert len(chart.lines["line"]) == len(chart.lines["line thin"]) == 400
    noisy = Chart("b", np.arange(100), np.where(np.arange(100) % 2, 1.0, -1.0))
    assert np.ptp(noisy.lines["line"][:, 1]) < 0.5 * np.ptp(noisy.lines["line thin"][:, 1])


@pytest.mark.parametrize(
    ("steps", "values"),
    [([5], [2.0]), ([0, 1], [0.0, 0.0]), ([0, 1], [-3.0, -3.0]), ([7, 7], [1e-9, 1e9])],
)
def test_degenerate_curves_stay_within_the_frame(steps, values):
    points = Chart("a", steps, values).lines["line"]
    assert len(points) == 2
    assert (points >= [LEFT, TOP]).all() and (points <= [WIDTH, HEIGHT - BOTTOM]).all()


def test_a_curve_without_points_says_so():
    assert "no points" in Chart("a", [], []).words
    assert "no points" in Chart("a", [0], [math.nan]).words


def test_large_and_small_numbers_are_short():
    chart = Chart("a", [0, 2_000_000], [-2e-6, 2e-6])
    assert list(chart.y_ticks) == ["−2e−6", "−1e−6", "0", "1e−6", "2e−6"]
    assert list(chart.x_ticks) == ["0", "500,000", "1e6", "1.5e6", "2e6"]
