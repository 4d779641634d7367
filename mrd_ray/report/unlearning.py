"""The part of the page about unlearn runs: what each did to the model, step by step, and how scores moved."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from mrd_ray.report import charts, evaluation, words
from mrd_ray.report.charts import Chart, Line
from mrd_ray.report.read import Unlearning
from mrd_ray.report.tables import Cell, Table, Text
from mrd_ray.report.words import count
from mrd_ray.unlearning import log
from mrd_ray.unlearning.log import EvaluationLine
from mrd_ray.unlearning.stopping import TITLES, Measure

_MOVED = 10


@dataclass(frozen=True)
class UnlearnSection:
    """One unlearn run."""

    name: str
    says: list[str]
    charts: list[Chart]
    tables: list[Table]


@dataclass(frozen=True)
class UnlearnSections:
    """All unlearn runs: before and after side by side, several runs in one chart, then each run."""

    table: Table | None
    charts: list[Chart]
    runs: list[UnlearnSection]


def sections(runs: Sequence[Unlearning], texts: Mapping[str, Mapping[str, str | None]]) -> UnlearnSections | None:
    """The sections on all unlearn runs. texts: known texts by sample_id, by the digest of their set."""
    if not runs:
        return None
    head = ["measure", *(f"{run.about.name}: {when}" for run in runs for when in ("before", "after"))]
    rows: list[list[Cell]] = [
        [title, *(_measure(name, line) for run in runs for line in (run.before, run.after))]
        for name, title in TITLES.items()
    ]
    rows = [row for row in rows if any(cell is not None for cell in row[1:])]
    overlays = [] if len(runs) < 2 else [_overlay(runs, *chart) for chart in _EVALUATED]
    return UnlearnSections(
        Table("What the model knew before and knows after", head, rows) if rows else None,
        [chart for chart in overlays if chart is not None],
        [_section(run, texts.get(str(run.about.manifest["identity"].get("samples")), {})) for run in runs],
    )


_EVALUATED: tuple[tuple[str, str, tuple[Measure, ...]], ...] = (  # title, unit, names of what is logged at evaluations
    ("Memorisation of the forget set", "share", ("forget_memorization_accuracy", "forget_extraction_likelihood")),
    ("Retain perplexity", "perplexity", ("retain_perplexity",)),
    ("Log-likelihood of the forget set", "nats per sample", ("forget_log_prob",)),
)


def _measure(name: Measure, line: EvaluationLine | None) -> float | None:
    return None if line is None else line.get(name)


def _label(name: Measure) -> str:
    return TITLES[name].split(":")[0].split(",")[0]


def _overlay(runs: Sequence[Unlearning], title: str, unit: str, names: Sequence[Measure]) -> Chart | None:
    name = names[0]
    lines = []
    for run in runs:
        evaluations = log.evaluations(run.log)
        values = [_measure(name, line) for line in evaluations]
        lines.append(Line(f"{_label(name)} of {run.about.name}", [line["step"] for line in evaluations], values))
    return charts.over_steps(f"{title}, by run", unit, lines, [], None)


def _section(run: Unlearning, texts: Mapping[str, str | None]) -> UnlearnSection:
    refreshes = sorted({line["step"] for line in run.log if line["event"] == "refresh"})
    stops = [line for line in run.log if line["event"] == "stop"]
    stop = stops[-1]["step"] if stops and run.outcome is not None else None
    steps = [line for line in run.log if line["event"] == "step"]
    at = [line["step"] for line in steps]
    losses = [
        Line("forget loss", at, [line.get("forget_loss") for line in steps]),
        Line("retain loss", at, [line.get("retain_loss") for line in steps]),
    ]
    drawn = [charts.over_steps("Losses in training", "loss", losses, refreshes, stop)]
    evaluations = log.evaluations(run.log)
    for title, unit, names in _EVALUATED:
        at = [line["step"] for line in evaluations]
        lines = [Line(_label(name), at, [_measure(name, line) for line in evaluations]) for name in names]
        drawn.append(charts.over_steps(title, unit, lines, refreshes, stop))
    drawn += evaluation.over_steps(run.evaluations, refreshes, stop)
    tables: list[Table] = []
    if len(run.refreshes) > 1 and (history := _history(run, texts)) is not None:
        chart, tables = history
        drawn.append(chart)
    return UnlearnSection(run.about.name, _outcome(run), [chart for chart in drawn if chart is not None], tables)


def _outcome(run: Unlearning) -> list[str]:
    if not run.log:
        return ["Not finished: no step so far. Run the same command again to start it."]
    taken = run.log[-1]["step"]  # a step that diverged counts too, but has no line of its own
    if run.outcome is None:
        last = run.log[-1]["of"]
        return [f"Not finished: {taken:,} of {last:,} steps so far. The same command resumes from its last checkpoint."]
    says = [f"Stopped after {count(taken, 'step')}: {run.outcome['reason']}."]
    step = run.outcome["step"]
    if step == 0:
        says.append("The result is the initial model: nothing has been unlearned.")
    elif step != taken:
        says.append(f"The result is the model of step {step:,}.")
    return says


def _history(run: Unlearning, texts: Mapping[str, str | None]) -> tuple[Chart, list[Table]] | None:
    """How the ranks of samples that all refreshes score move; None with fewer than three such samples."""
    steps = sorted(run.refreshes)
    by_step = [
        {i: mrd for i, mrd in zip(table["sample_id"].to_pylist(), table["mrd"].to_pylist(), strict=True) if _known(mrd)}
        for table in (run.refreshes[step] for step in steps)
    ]
    ids = sorted(set.intersection(*(set(scores) for scores in by_step)))
    if len(ids) < 3:
        return None
    mrd = np.array([[scores[i] for i in ids] for scores in by_step])
    ranks = np.array([scipy.stats.rankdata(row) for row in mrd])  # equal scores have equal ranks
    to_first = [_spearman(mrd[0], row) for row in mrd]
    third = max(1, len(ids) // 3)
    moves = np.abs(ranks[-1] - ranks[0])
    says = (
        f"From step {steps[0]} to step {steps[-1]}, the orders of the {len(ids):,} samples have "
        f"{words.correlation(to_first[-1])}"
    )
    if half := float(np.median(moves)):
        says += f"; half of them move by {words.number(half)} rank{'' if half == 1 else 's'} or more"
    else:
        says += f"; {int((moves > 0).sum()):,} of them move"
    if not math.isnan(to_first[-1]):
        stayed = int(((ranks[0] <= third) & (ranks[-1] <= third)).sum())
        says += f". Of the {third:,} that were hardest, {stayed:,} still are"
    chart = charts.rank_history(steps, ranks, f"{says}.")
    to_previous = [None, *(_spearman(a, b) for a, b in itertools.pairwise(mrd))]
    rows: list[list[Cell]] = [
        [step, float(np.median(row)), first, previous]
        for step, row, first, previous in zip(steps, mrd, to_first, to_previous, strict=True)
    ]
    head = ("step", "median MRD", "rank correlation with the first", "with the one before")
    tables = [Table("Refreshes of the scores", head, rows)]
    most = [i for i in np.argsort(-moves, kind="stable")[:_MOVED].tolist() if moves[i]]
    columns = ("sample", *(["text"] if texts else []), "rank before", "rank after", "MRD before", "MRD after")
    moved: list[list[Cell]] = []
    for i in most:
        text = [Text(texts.get(ids[i]))] if texts else []
        moved.append([Text(ids[i]), *text, ranks[0, i], ranks[-1, i], mrd[0, i], mrd[-1, i]])
    if moved:
        tables.append(Table("The samples that moved most, from the first refresh to the last", columns, moved))
    return chart, tables


def _known(mrd: float | None) -> bool:
    return mrd is not None and math.isfinite(mrd)


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(scipy.stats.spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else math.nan
