"""Axes and marks as SVG.

Marks have classes but no colours, so that the same drawing suits light and dark screens and paper.
"""

import math
from collections.abc import Iterable

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import LogLocator, MaxNLocator

from mrd_ray.report.words import number

WIDTH, HEIGHT = 460, 280  # in pixels, like all lengths here
LEFT, RIGHT, TOP, BOTTOM = 68, 12, 12, 46
MANY = 1500  # points; more points are drawn as a density


class Axis:
    """Values -> pixels, linear or logarithmic."""

    def __init__(
        self, values: Iterable[float], pixels: tuple[float, float], *, log: bool = False, whole: bool = False
    ) -> None:
        finite = [float(value) for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
        self.log, self.pixels = log, pixels
        if log:
            margin = (high / low) ** 0.03
            self.low, self.high = low / margin, high * margin
            ticks = LogLocator(10, subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)).tick_values(low, high)
        else:
            margin = (high - low) * 0.03
            self.low, self.high = (low - margin, high + margin) if low != 0 else (0.0, high + margin)
            ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
        first, last = (low, high) if whole else (self.low, self.high)  # no tick for rank 0
        self.ticks = [float(tick) for tick in ticks if first <= tick <= last and not (whole and tick % 1)]

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return round(self.pixels[0] + share * (self.pixels[1] - self.pixels[0]), 1)


def x_axis(values: Iterable[float], *, log: bool = False, whole: bool = False) -> Axis:
    """An axis from the left of a drawing to its right."""
    return Axis(values, (LEFT, WIDTH - RIGHT), log=log, whole=whole)


def y_axis(values: Iterable[float], *, log: bool = False, whole: bool = False, down: bool = False) -> Axis:
    """An axis from the bottom of a drawing to its top, or down."""
    ends = (TOP, HEIGHT - BOTTOM) if down else (HEIGHT - BOTTOM, TOP)
    return Axis(values, ends, log=log, whole=whole)


def draw(title: str, x: Axis, y: Axis, x_label: str, y_label: str, marks: Iterable[Markup]) -> Markup:
    """Axes with ticks and labels, and the marks between them."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="Chart: {}">').format(WIDTH, HEIGHT, title)
    ]
    for tick in y.ticks:
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, right, *[y(tick)] * 2))
        parts.append(text(LEFT - 6, y(tick) + 4, number(tick), "end"))
    for tick in x.ticks:
        parts.append(
            Markup('<line class="tick" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(x(tick), bottom, bottom + 4)
        )
        parts.append(text(x(tick), bottom + 17, number(tick), "middle"))
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, right, bottom, bottom))
    parts.append(text((LEFT + right) / 2, HEIGHT - 8, x_label, "middle", "label"))
    middle = (TOP + bottom) / 2
    parts.append(
        Markup('<text class="label" text-anchor="middle" transform="translate(12 {}) rotate(-90)">{}</text>').format(
            middle, y_label
        )
    )
    return Markup("").join([*parts, *marks, Markup("</svg>")])


def text(x: float, y: float, text: str, anchor: str, kind: str = "number") -> Markup:
    """Text at a place; `anchor` says which part of the text is there."""
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def dot(x: float, y: float, kind: str = "c0", radius: float = 2.5) -> Markup:
    """A point."""
    return Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}"/>').format(kind, x, y, radius)


def bar(x: float, low: float, high: float, kind: str = "c0") -> Markup:
    """An error bar."""
    return Markup('<line class="error {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(kind, x, x, low, high)


def path(points: Iterable[tuple[float, float]], kind: str) -> Markup:
    """A line through points."""
    return Markup('<polyline class="line {}" points="{}"/>').format(kind, " ".join(f"{x},{y}" for x, y in points))


def points(x: Axis, y: Axis, xs: np.ndarray, ys: np.ndarray) -> list[Markup]:
    """Dots, or, if there are very many, cells that are darker if more points fall into them."""
    px, py = np.array([x(v) for v in xs.tolist()]), np.array([y(v) for v in ys.tolist()])
    if len(px) <= MANY:
        return [dot(*at) for at in zip(px.tolist(), py.tolist(), strict=True)]
    side = 6
    cells, counts = np.unique(np.stack([px // side, py // side], 1), axis=0, return_counts=True)
    shades = 0.15 + 0.85 * np.log1p(counts) / np.log1p(counts.max())
    cell = Markup('<rect class="cell c0" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}"/>')
    return [
        cell.format(int(i * side), int(j * side), side, side, f"{shade:.2f}")
        for (i, j), shade in zip(cells.tolist(), shades.tolist(), strict=True)
    ]


def is_log(values: np.ndarray) -> bool:
    """Whether all values are positive and span so much that a linear axis would hide most."""
    return bool(len(values) and values.min() > 0 and values.max() / values.min() > 30)
