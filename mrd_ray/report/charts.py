"""Charts, each with a sentence that says what it shows."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from mrd_ray.report import svg
from mrd_ray.report.words import correlation, count, number
from mrd_ray.scoring import summary

_BARS = 250  # samples with error bars; more cannot be told apart
_TRACES = 60  # samples whose ranks are drawn


@dataclass(frozen=True)
class Chart:
    """legend: (class, label) of each series. says: what the chart shows, in words, with its numbers."""

    title: str
    says: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Line:
    """A series over steps. If a value is null, a straight line joins the values before and after it."""

    label: str
    steps: Sequence[int]
    values: Sequence[float | None]


def distribution(mrd: np.ndarray, se: np.ndarray) -> Chart:
    """How many samples have which score. se: nan if unknown."""
    edges = summary.histogram_edges(mrd)
    counts, _ = np.histogram(mrd, edges)
    x, y = svg.x_axis(edges), svg.y_axis([0, *counts.tolist()], whole=True)
    marks = [
        Markup('<rect class="bar c0" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            x(low), y(many), round(max(x(high) - x(low) - 1, 0.5), 1), round(y(0) - y(many), 1),
            f"{number(low)} to {number(high)}: {count(many, 'sample')}",
        )
        for (low, high), many in zip(itertools.pairwise(edges), counts.tolist(), strict=True)
        if many
    ]  # fmt: skip
    low, quarter, median, three, high = np.quantile(mrd, [0, 0.25, 0.5, 0.75, 1])
    if number(low) == number(high):
        says = f"The score of {count(len(mrd), 'sample')} is {number(median)}."
    else:
        says = (
            f"The scores of {len(mrd):,} samples range from {number(low)} to {number(high)}; half of them lie between "
            f"{number(quarter)} and {number(three)}, around a median of {number(median)}."
        )
    known = se[np.isfinite(se) & (mrd > 0)] / mrd[np.isfinite(se) & (mrd > 0)]
    if len(known) and known.max() > 0:
        says += f" The typical standard error is {np.median(known):.1%} of a score."
    elif len(known):
        says += " They have no sampling error."
    title = "Distribution of scores"
    return Chart(title, says, svg.draw(title, x, y, "MRD", "samples", marks))


def by_rank(mrd: np.ndarray, se: np.ndarray) -> Chart:
    """Scores from hardest to easiest, with standard errors. mrd: sorted; se: nan if unknown."""
    n = len(mrd)
    shown = np.unique(np.linspace(0, n - 1, min(n, _BARS)).round().astype(int))
    low, high = mrd - np.nan_to_num(se), mrd + np.nan_to_num(se)
    x, y = svg.x_axis([1, n], whole=True), svg.y_axis([*low[shown].tolist(), *high[shown].tolist()])
    marks = [svg.bar(x(i + 1), y(low[i]), y(high[i])) for i in shown.tolist() if se[i] > 0]
    marks += [svg.dot(x(i + 1), y(mrd[i])) for i in shown.tolist()]
    part = "all samples" if len(shown) == n else f"{len(shown)} of {n:,} samples, evenly spaced by rank"
    says = f"{part[0].upper()}{part[1:]} from the hardest to unlearn (rank 1) to the easiest (rank {n:,})"
    if np.nanmax(se, initial=0) > 0:
        says += ", each with its standard error as a bar (a bar twice as long has the true value for 95% of scores)"
    says += f". The easiest sample's score is {mrd[-1] / mrd[0]:.3g} times the hardest's." if mrd[0] > 0 else "."
    title = "Hardest to easiest"
    return Chart(title, says, svg.draw(title, x, y, "rank", "MRD", marks))


def against(name: str, other: np.ndarray, mrd: np.ndarray, spearman: float) -> Chart:
    """Score against another measure of the same samples."""
    x, y = svg.x_axis(other.tolist(), log=svg.is_log(other)), svg.y_axis(mrd.tolist(), log=svg.is_log(mrd))
    title = f"Score against {name}"
    says = f"Score and {name} of {len(mrd):,} samples: {_trend(spearman, name)}."
    return Chart(title, says, svg.draw(title, x, y, name, "MRD", svg.points(x, y, other, mrd)))


def _trend(spearman: float, name: str) -> str:
    if math.isnan(spearman):
        return f"no rank correlation, since {name} or score is the same for all"
    how = "hardly go together" if abs(spearman) < 0.2 else "go together" if spearman > 0 else "go against one another"
    strength = " loosely" if 0.2 <= abs(spearman) < 0.5 else " closely" if abs(spearman) >= 0.8 else ""
    return f"they {how}{strength}, with a Spearman rank correlation of {spearman:.2f}"


def two_runs(a: str, b: str, scores: np.ndarray, apart: np.ndarray | None, spearman: float, unlike: str = "") -> Chart:
    """Scores of the same samples in two runs.

    Args:
        scores: [n, 2].
        apart: whether scores are over three standard errors apart, per sample.
        unlike: how the runs differ, in words.
    """
    log = svg.is_log(scores.reshape(-1))
    x, y = svg.x_axis(scores[:, 0].tolist(), log=log), svg.y_axis(scores[:, 1].tolist(), log=log)
    ends = max(x.low, y.low), min(x.high, y.high)
    marks = [svg.path([(x(end), y(end)) for end in ends], "guide")] if ends[0] < ends[1] else []
    marks += svg.points(x, y, scores[:, 0], scores[:, 1])
    says = f"The scores of {len(scores):,} samples in {a} and in {b} have {correlation(spearman)}"
    if apart is not None:
        says += f"; {apart.mean():.1%} are over three standard errors apart"
        if len(scores) <= svg.MANY:
            marks += [svg.dot(x(s), y(t), "c1", 3.5) for s, t in scores[apart].tolist()]
    says += f"; {unlike}" if unlike else ""
    legend = [("guide", "equal scores")] if ends[0] < ends[1] else []
    if apart is not None and apart.any() and len(scores) <= svg.MANY:
        legend.append(("dot c1", "over three standard errors apart"))
    title = f"{b} against {a}"
    return Chart(title, says + ".", svg.draw(title, x, y, f"MRD in {a}", f"MRD in {b}", marks), tuple(legend))


def over_steps(
    title: str, unit: str, lines: Sequence[Line], refreshes: Sequence[int], stop: int | None
) -> Chart | None:
    """Something that is logged during unlearning, with the steps of refreshes and of the stop; None if nothing is."""
    lines = [line for line in lines if any(value is not None for value in line.values)]
    if not lines:
        return None
    of_all = [value for line in lines for value in line.values if value is not None]
    steps = [step for line in lines for step in line.steps]
    x = svg.x_axis([0, *steps, *([] if stop is None else [stop])], whole=True)
    log = svg.is_log(np.array(of_all, np.float64))
    y = svg.y_axis(of_all, log=log)
    marks, legend, says = [], [], []
    for kind, at in [("refresh", refreshes), ("stop", [] if stop is None else [stop])]:
        mark = Markup('<line class="{0}" x1="{1}" x2="{1}" y1="{2}" y2="{3}"><title>{0} at step {4}</title></line>')
        marks += [mark.format(kind, x(step), svg.TOP, svg.HEIGHT - svg.BOTTOM, step) for step in at]
    for index, line in enumerate(lines):
        kind = f"c{index % 6}"
        known = [(s, v) for s, v in zip(line.steps, line.values, strict=True) if v is not None]
        marks.append(svg.path([(x(step), y(value)) for step, value in known], kind))
        if len(known) <= 60:
            marks += [svg.dot(x(step), y(value), kind) for step, value in known]
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
    return Chart(title, sentence, svg.draw(title, x, y, "step", unit, marks), tuple(legend))


def rank_history(steps: Sequence[int], ranks: np.ndarray, says: str) -> Chart:
    """How samples' ranks move from refresh to refresh. ranks: [refreshes, samples]; 1 is the hardest."""
    n = ranks.shape[1]
    by_first = np.argsort(ranks[0], kind="stable")
    shown = by_first[np.unique(np.linspace(0, n - 1, min(n, _TRACES)).round().astype(int))]
    x, y = svg.x_axis(steps, whole=True), svg.y_axis([1, n], whole=True, down=True)
    marks = [
        svg.path(
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
    return Chart(title, says, svg.draw(title, x, y, "step", "rank, 1 is hardest", marks), legend)


Row = tuple[str, bool, Sequence[tuple[float, float | None] | None]]


def dots(names: Sequence[str], rows: Sequence[Row]) -> Chart | None:
    """Figures in [0, 1] of several runs, a row each; None if there are none.

    rows: (label, whether runs can be compared by it, figure and standard error of each run).
    """
    if not rows:
        return None
    step, left, top = 26, 212, 8
    height = top + step * len(rows) + 34
    x = svg.Axis([0.0, 1.0], (left, svg.WIDTH - 16))
    title = "Figures from 0 to 1"
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="Chart: {}">').format(
            svg.WIDTH, height, title
        )
    ]
    for tick in x.ticks:
        at = (x(tick), x(tick), top, height - 30)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(*at))
        parts.append(svg.text(x(tick), height - 14, number(tick), "middle"))
    changes = []
    for index, (label, compared, values) in enumerate(rows):
        y = top + step * index + step / 2
        parts.append(svg.text(left - 10, y + 4, label if len(label) < 29 else label[:27] + "...", "end"))
        known = [(run, *value) for run, value in enumerate(values) if value is not None]
        if compared and len(known) > 1:
            (a, was, _), (b, now, _) = known[0], known[-1]
            parts.append(svg.path([(x(was), y), (x(now), y)], "link"))
            if number(was) != number(now):
                changes.append((abs(now - was), label, a, b, number(was), number(now)))
        for run, value, se in known:
            if se:
                ends = x(max(value - se, x.low)), x(min(value + se, x.high))
                parts.append(
                    Markup('<line class="error c{0}" x1="{1}" x2="{2}" y1="{3}" y2="{3}"/>').format(run % 6, *ends, y)
                )
            parts.append(svg.dot(x(value), y, f"c{run % 6}", 4.5))
    parts.append(Markup("</svg>"))
    says = f"{count(len(rows), 'figure')}, each a dot"
    says += " with its standard error." if any(v and v[1] for _, _, values in rows for v in values) else "."
    if changes:
        _, label, a, b, before, after = max(changes)
        says += f" From {names[a]} to {names[b]}, {label} changes most: {before} to {after}."
    return Chart(title, says, Markup("").join(parts), tuple((f"dot c{i % 6}", name) for i, name in enumerate(names)))
