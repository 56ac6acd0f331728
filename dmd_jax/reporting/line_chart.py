"""A curve as an HTML figure with inline SVG; the page styles its classes grid, line and thin."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 8, 40  # margins around the plotting area
LOG_FROM = 30.0  # largest over smallest value from which a logarithmic axis shows more
SMOOTH_FROM = 60  # points from which a running mean is drawn over them
MOST_POINTS = 400  # drawn; more are averaged in groups


def line_chart(name: str, steps: Sequence[float], values: Sequence[float]) -> str:
    """A <figure> of values over steps; its caption names the values.

    Positive values that span more than LOG_FROM get a logarithmic axis. Points that are not finite
    are left out, and the caption says how many.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    left_out = finite.size - np.count_nonzero(finite)
    x, y = x[finite], y[finite]
    logarithmic = bool(y.size and y.min() > 0 and y.max() / y.min() > LOG_FROM)
    remarks = ["log scale"] if logarithmic else []
    if left_out:
        remarks.append(f"{left_out} not finite, left out")
    remark = f" <small>{', '.join(remarks)}</small>" if remarks else ""
    parts = [
        f"<figure><figcaption>{escape(name)}{remark}</figcaption>",
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(name)} over steps'>",
    ]
    if y.size:
        parts += _plot(x, y, logarithmic)
    else:
        parts.append(f"<text x='{LEFT}' y='{HEIGHT // 2}'>no points</text>")
    return "\n".join([*parts, "</svg></figure>"])


def _plot(x: np.ndarray, y: np.ndarray, logarithmic: bool) -> list[str]:
    y_ticks = _log_ticks(y.min(), y.max()) if logarithmic else _linear_ticks(y.min(), y.max(), 4)
    x_ticks = [tick for tick in _linear_ticks(x.min(), x.max(), 4) if x.min() <= tick <= x.max()]
    across = _scale(x.min(), x.max(), LEFT, WIDTH - RIGHT)
    warp = math.log10 if logarithmic else float
    low, high = warp(min(y.min(), y_ticks[0])), warp(max(y.max(), y_ticks[-1]))
    bottom = HEIGHT - BOTTOM
    up = _scale(low, high, bottom, TOP)
    parts = [f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{bottom}' y2='{bottom}'/>"]
    for tick in y_ticks:
        height = up(warp(tick))
        parts.append(
            f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{height:.1f}' "
            f"y2='{height:.1f}'/><text x='{LEFT - 6}' y='{height + 4:.1f}' "
            f"text-anchor='end'>{_number(tick)}</text>"
        )
    for tick in x_ticks:
        parts.append(
            f"<text x='{across(tick):.1f}' y='{bottom + 16}' "
            f"text-anchor='middle'>{_number(tick)}</text>"
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f"<text x='{middle:.0f}' y='{HEIGHT - 6}' text-anchor='middle'>step</text>")
    x, y = _thinned(x), _thinned(y)
    if y.size == 1:
        x, y = x.repeat(2), y.repeat(2)  # a line of one point would not be drawn
    lines = [("line", y)] if y.size < SMOOTH_FROM else [("line thin", y), ("line", _smooth(y))]
    for style, heights in lines:
        points = " ".join(
            f"{across(step):.1f},{up(warp(value)):.1f}"
            for step, value in zip(x, heights, strict=True)
        )
        parts.append(f"<polyline class='{style}' points='{points}'/>")
    return parts


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, the first at or below `low`, the last at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / count))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= span / count)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between both ends: 1, 2 and 5 of each power of ten, or some of the powers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = math.ceil((last - first) / 6)
    mantissas = (1, 2, 5) if high / low < 150 else (1,)
    candidates = [
        mantissa * 10.0**power for power in range(first, last + 1, stride) for mantissa in mantissas
    ]
    return [tick for tick in candidates if low <= tick <= high]


def _thinned(values: np.ndarray) -> np.ndarray:
    groups = min(values.size, MOST_POINTS)
    return np.array([group.mean() for group in np.array_split(values, groups)])


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a twentieth of the points, centred, over fewer at the ends."""
    half = max(values.size // 40, 1)
    return np.array([values[max(i - half, 0) : i + half + 1].mean() for i in range(values.size)])


def _number(value: float) -> str:
    return f"{value:,.6g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
