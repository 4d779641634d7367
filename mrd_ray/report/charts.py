"""Charts as SVG that the page's style sheet colours, each with a sentence that says what it shows.

All marks carry classes and no colours of their own, so that one drawing serves light, dark and paper.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import LogLocator, MaxNLocator

from mrd_ray.scoring import summary

_WIDTH, _HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 12, 12, 46
_MANY = 1500  # points; more are shown as the density that they have
_BARS = 250  # samples with error bars; more cannot be told apart
_TRACES = 60  # samples whose ranks are drawn


@dataclass(frozen=True)
class Chart:
    """legend: (class, label) of each series. says: the chart in words, with its numbers."""

    title: str
    says: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Line:
    """A series over steps. Where a value is null, the line goes straight from the one before to the one after."""

    label: str
    steps: Sequence[int]
    values: Sequence[float | None]


def number(value: float | None, digits: int = 4) -> str:
    """A number as people read it: 1,234, 0.00514, 1e-5; a dash for none."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e-4 <= abs(value) < 1e6:
        rounded = f"{value:.{digits}g}"
        return f"{float(rounded):,.0f}" if "e" in rounded else rounded
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def count(n: int, noun: str) -> str:
    """1 sample, 1,234 samples."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def correlation(spearman: float) -> str:
    """That of two scores of the same samples in words."""
    if math.isnan(spearman):
        return "no rank correlation, since in one of them all scores are the same"
    return f"a Spearman rank correlation of {spearman:.2f}"


class _Axis:
    """Values -> pixels, linear or logarithmic."""

    def __init__(
        self, values: Iterable[float], pixels: tuple[float, float], *, log: bool = False, whole: bool = False
    ) -> None:
        found = [float(value) for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(found), max(found)
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
        first, last = (low, high) if whole else (self.low, self.high)  # no rank 0 beside the first
        self.ticks = [float(tick) for tick in ticks if first <= tick <= last and not (whole and tick % 1)]

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return round(self.pixels[0] + share * (self.pixels[1] - self.pixels[0]), 1)


def _x(values: Iterable[float], *, log: bool = False, whole: bool = False) -> _Axis:
    return _Axis(values, (_LEFT, _WIDTH - _RIGHT), log=log, whole=whole)


def _y(values: Iterable[float], *, log: bool = False, whole: bool = False, down: bool = False) -> _Axis:
    ends = (_TOP, _HEIGHT - _BOTTOM) if down else (_HEIGHT - _BOTTOM, _TOP)
    return _Axis(values, ends, log=log, whole=whole)


def _draw(title: str, x: _Axis, y: _Axis, x_label: str, y_label: str, marks: Iterable[Markup]) -> Markup:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="Chart: {}">').format(
            _WIDTH, _HEIGHT, title
        )
    ]
    for tick in y.ticks:
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, right, *[y(tick)] * 2)
        )
        parts.append(_text(_LEFT - 6, y(tick) + 4, number(tick), "end"))
    for tick in x.ticks:
        parts.append(
            Markup('<line class="tick" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(x(tick), bottom, bottom + 4)
        )
        parts.append(_text(x(tick), bottom + 17, number(tick), "middle"))
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, right, bottom, bottom))
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 8, x_label, "middle", "label"))
    middle = (_TOP + bottom) / 2
    parts.append(
        Markup('<text class="label" text-anchor="middle" transform="translate(12 {}) rotate(-90)">{}</text>').format(
            middle, y_label
        )
    )
    return Markup("").join([*parts, *marks, Markup("</svg>")])


def _text(x: float, y: float, text: str, anchor: str, kind: str = "number") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def _dot(x: float, y: float, kind: str = "c0", radius: float = 2.5) -> Markup:
    return Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}"/>').format(kind, x, y, radius)


def _bar(x: float, low: float, high: float, kind: str = "c0") -> Markup:
    return Markup('<line class="error {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(kind, x, x, low, high)


def _path(points: Iterable[tuple[float, float]], kind: str) -> Markup:
    return Markup('<polyline class="line {}" points="{}"/>').format(kind, " ".join(f"{x},{y}" for x, y in points))


def _points(x: _Axis, y: _Axis, xs: np.ndarray, ys: np.ndarray) -> list[Markup]:
    """Dots; of very many, cells that are the darker the more samples fall into them."""
    px, py = np.array([x(v) for v in xs.tolist()]), np.array([y(v) for v in ys.tolist()])
    if len(px) <= _MANY:
        return [_dot(*at) for at in zip(px.tolist(), py.tolist(), strict=True)]
    side = 6
    cells, counts = np.unique(np.stack([px // side, py // side], 1), axis=0, return_counts=True)
    shades = 0.15 + 0.85 * np.log1p(counts) / np.log1p(counts.max())
    cell = Markup('<rect class="cell c0" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}"/>')
    return [
        cell.format(int(i * side), int(j * side), side, side, f"{shade:.2f}")
        for (i, j), shade in zip(cells.tolist(), shades.tolist(), strict=True)
    ]


def _is_log(values: np.ndarray) -> bool:
    return bool(len(values) and values.min() > 0 and values.max() / values.min() > 30)


def distribution(mrd: np.ndarray, se: np.ndarray) -> Chart:
    """How many samples have which score. se: nan where not known."""
    edges = summary.histogram_edges(mrd)
    counts, _ = np.histogram(mrd, edges)
    x, y = _x(edges), _y([0, *counts.tolist()], whole=True)
    marks = [
        Markup('<rect class="bar c0" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            x(low), y(found), round(max(x(high) - x(low) - 1, 0.5), 1), round(y(0) - y(found), 1),
            f"{number(low)} to {number(high)}: {count(found, 'sample')}",
        )
        for (low, high), found in zip(itertools.pairwise(edges), counts.tolist(), strict=True)
        if found
    ]  # fmt: skip
    low, quarter, median, three, high = np.quantile(mrd, [0, 0.25, 0.5, 0.75, 1])
    if number(low) == number(high):
        says = f"The score of {count(len(mrd), 'sample')} is {number(median)}."
    else:
        says = (
            f"The scores of {len(mrd):,} samples run from {number(low)} to {number(high)}; half of them lie between "
            f"{number(quarter)} and {number(three)}, around a median of {number(median)}."
        )
    known = se[np.isfinite(se) & (mrd > 0)] / mrd[np.isfinite(se) & (mrd > 0)]
    if len(known) and known.max() > 0:
        says += f" The typical standard error is {np.median(known):.1%} of a score."
    elif len(known):
        says += " They have no sampling error."
    title = "Distribution of scores"
    return Chart(title, says, _draw(title, x, y, "MRD", "samples", marks))


def by_rank(mrd: np.ndarray, se: np.ndarray) -> Chart:
    """Scores from hardest to easiest, with standard errors. mrd: sorted; se: nan where not known."""
    n = len(mrd)
    shown = np.unique(np.linspace(0, n - 1, min(n, _BARS)).round().astype(int))
    low, high = mrd - np.nan_to_num(se), mrd + np.nan_to_num(se)
    x, y = _x([1, n], whole=True), _y([*low[shown].tolist(), *high[shown].tolist()])
    marks = [_bar(x(i + 1), y(low[i]), y(high[i])) for i in shown.tolist() if se[i] > 0]
    marks += [_dot(x(i + 1), y(mrd[i])) for i in shown.tolist()]
    part = "all samples" if len(shown) == n else f"{len(shown)} of {n:,} samples, evenly spaced by rank"
    says = f"{part[0].upper()}{part[1:]} from the hardest to unlearn (rank 1) to the easiest (rank {n:,})"
    if np.nanmax(se, initial=0) > 0:
        says += ", each with its standard error as a bar"
    says += f". The easiest scores {mrd[-1] / mrd[0]:.3g} times as much as the hardest." if mrd[0] > 0 else "."
    title = "Hardest to easiest"
    return Chart(title, says, _draw(title, x, y, "rank", "MRD", marks))


def against(name: str, other: np.ndarray, mrd: np.ndarray, spearman: float) -> Chart:
    """Score against another measure of the same samples."""
    x, y = _x(other.tolist(), log=_is_log(other)), _y(mrd.tolist(), log=_is_log(mrd))
    title = f"Score against {name}"
    says = f"Score and {name} of {len(mrd):,} samples: {_trend(spearman, name)}."
    return Chart(title, says, _draw(title, x, y, name, "MRD", _points(x, y, other, mrd)))


def _trend(spearman: float, name: str) -> str:
    if math.isnan(spearman):
        return f"no rank correlation, since the {name} or the score is the same for all"
    how = "hardly go together" if abs(spearman) < 0.2 else "go together" if spearman > 0 else "go against one another"
    strength = " loosely" if 0.2 <= abs(spearman) < 0.5 else " closely" if abs(spearman) >= 0.8 else ""
    return f"they {how}{strength}, with a Spearman rank correlation of {spearman:.2f}"


def two_runs(a: str, b: str, scores: np.ndarray, apart: np.ndarray | None, spearman: float, unlike: str = "") -> Chart:
    """Scores of the same samples in two runs.

    Args:
        scores: [n, 2].
        apart: which are over three standard errors apart.
        unlike: what tells the runs apart, in words.
    """
    log = _is_log(scores.reshape(-1))
    x, y = _x(scores[:, 0].tolist(), log=log), _y(scores[:, 1].tolist(), log=log)
    ends = max(x.low, y.low), min(x.high, y.high)
    marks = [_path([(x(end), y(end)) for end in ends], "guide")] if ends[0] < ends[1] else []
    marks += _points(x, y, scores[:, 0], scores[:, 1])
    says = f"The scores of {len(scores):,} samples in {a} and in {b} have {correlation(spearman)}"
    if apart is not None:
        says += f"; {apart.mean():.1%} are over three standard errors apart"
        if len(scores) <= _MANY:
            marks += [_dot(x(s), y(t), "c1", 3.5) for s, t in scores[apart].tolist()]
    says += f"; {unlike}" if unlike else ""
    legend = [("guide", "equal scores")] if ends[0] < ends[1] else []
    if apart is not None and apart.any() and len(scores) <= _MANY:
        legend.append(("dot c1", "over three standard errors apart"))
    title = f"{b} against {a}"
    return Chart(title, says + ".", _draw(title, x, y, f"MRD in {a}", f"MRD in {b}", marks), tuple(legend))


def over_steps(
    title: str, unit: str, lines: Sequence[Line], refreshes: Sequence[int], stop: int | None
) -> Chart | None:
    """Something logged as unlearning goes, with the steps of refreshes and of the stop; None where nothing is."""
    lines = [line for line in lines if any(value is not None for value in line.values)]
    if not lines:
        return None
    of_all = [value for line in lines for value in line.values if value is not None]
    steps = [step for line in lines for step in line.steps]
    x = _x([0, *steps, *([] if stop is None else [stop])], whole=True)
    log = _is_log(np.array(of_all, np.float64))
    y = _y(of_all, log=log)
    marks, legend, says = [], [], []
    for kind, at in [("refresh", refreshes), ("stop", [] if stop is None else [stop])]:
        mark = Markup('<line class="{0}" x1="{1}" x2="{1}" y1="{2}" y2="{3}"><title>{0} at step {4}</title></line>')
        marks += [mark.format(kind, x(step), _TOP, _HEIGHT - _BOTTOM, step) for step in at]
    for index, line in enumerate(lines):
        kind = f"c{index % 6}"
        known = [(s, v) for s, v in zip(line.steps, line.values, strict=True) if v is not None]
        marks.append(_path([(x(step), y(value)) for step, value in known], kind))
        if len(known) <= 60:
            marks += [_dot(x(step), y(value), kind) for step, value in known]
        legend.append((kind, line.label))
        (first, was), (last, now) = known[0], known[-1]
        low, high = (of(known, key=lambda at: at[1]) for of in (min, max))
        words = f"{line.label} goes from {number(was)} at step {first} to {number(now)} at step {last}"
        words = words if first != last else f"{line.label} is {number(was)} at step {first}"
        for extreme, (step, value) in {"lowest": low, "highest": high}.items():
            words += "" if value in (was, now) else f", {extreme} {number(value)} at step {step}"
        says.append(words)
    sentence = ". ".join(f"{words[0].upper()}{words[1:]}" for words in says) + "."
    if refreshes:
        legend.append(("refresh", "refresh of the scores"))
        some = ", ".join(map(str, refreshes[:8])) + (", ..." if len(refreshes) > 8 else "")
        sentence += f" Scores are refreshed at step{'s' if len(refreshes) > 1 else ''} {some}."
    if stop is not None:
        legend.append(("stop", "stop"))
        sentence += f" The run stops after step {stop}."
    return Chart(title, sentence, _draw(title, x, y, "step", unit, marks), tuple(legend))


def rank_history(steps: Sequence[int], ranks: np.ndarray, says: str) -> Chart:
    """How samples' ranks move from refresh to refresh. ranks: [refreshes, samples], 1 the hardest."""
    n = ranks.shape[1]
    by_first = np.argsort(ranks[0], kind="stable")
    shown = by_first[np.unique(np.linspace(0, n - 1, min(n, _TRACES)).round().astype(int))]
    x, y = _x(steps, whole=True), _y([1, n], whole=True, down=True)
    marks = [
        _path(
            [(x(step), y(rank)) for step, rank in zip(steps, ranks[:, i].tolist(), strict=True)],
            f"trace c{int(3 * (ranks[0, i] - 1) // n)}",
        )
        for i in shown.tolist()
    ]
    title = "How ranks move"
    thirds = ("hardest", "middle", "easiest")
    legend = tuple((f"trace c{i}", f"{third} third at the first refresh") for i, third in enumerate(thirds))
    if len(shown) < n:
        says += f" The chart shows {len(shown)} of {n:,} samples."
    return Chart(title, says, _draw(title, x, y, "step", "rank, 1 is hardest", marks), legend)


Row = tuple[str, bool, Sequence[tuple[float, float | None] | None]]


def dots(names: Sequence[str], rows: Sequence[Row]) -> Chart | None:
    """Figures in [0, 1] of several runs, a row each; None where there are none.

    rows: (label, whether the runs compare, figure and standard error of each run).
    """
    if not rows:
        return None
    step, left, top = 26, 212, 8
    height = top + step * len(rows) + 34
    x = _Axis([0.0, 1.0], (left, _WIDTH - 16))
    title = "Figures from 0 to 1"
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="Chart: {}">').format(
            _WIDTH, height, title
        )
    ]
    for tick in x.ticks:
        at = (x(tick), x(tick), top, height - 30)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(*at))
        parts.append(_text(x(tick), height - 14, number(tick), "middle"))
    changes = []
    for index, (label, compared, values) in enumerate(rows):
        y = top + step * index + step / 2
        parts.append(_text(left - 10, y + 4, label if len(label) < 29 else label[:27] + "...", "end"))
        known = [(run, *value) for run, value in enumerate(values) if value is not None]
        if compared and len(known) > 1:
            (a, was, _), (b, now, _) = known[0], known[-1]
            parts.append(_path([(x(was), y), (x(now), y)], "link"))
            if number(was) != number(now):
                changes.append((abs(now - was), label, a, b, number(was), number(now)))
        for run, value, se in known:
            if se:
                ends = x(max(value - se, x.low)), x(min(value + se, x.high))
                parts.append(
                    Markup('<line class="error c{0}" x1="{1}" x2="{2}" y1="{3}" y2="{3}"/>').format(run % 6, *ends, y)
                )
            parts.append(_dot(x(value), y, f"c{run % 6}", 4.5))
    parts.append(Markup("</svg>"))
    says = f"{count(len(rows), 'figure')}, each a dot"
    says += " with its standard error." if any(v and v[1] for _, _, values in rows for v in values) else "."
    if changes:
        _, label, a, b, before, after = max(changes)
        says += f" From {names[a]} to {names[b]}, {label} changes most: {before} to {after}."
    return Chart(title, says, Markup("").join(parts), tuple((f"dot c{i % 6}", name) for i, name in enumerate(names)))
