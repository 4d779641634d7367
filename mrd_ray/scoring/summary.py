"""What people look at first: the distribution of scores, the hardest and easiest samples, errors, settings."""

import io
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import matplotlib.figure
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mrd_ray.config import ScoreConfig
from mrd_ray.runs.meter import WITHHELD, short

T = TypeVar("T", np.ndarray, range)

_SHOWN = 10
_POINTS = 10_000  # most points in a plot; if there are more samples, evenly spread over the ranks
NONLINEAR = 0.3  # at this value, mean_abs is 4% above its small-sigma limit
_STATISTIC = {"mean_abs": "E|Δ|", "abs_mean": "|E Δ|"}


def ranked(scores: pa.Table) -> np.ndarray:
    """Indices of the samples with a score, hardest to unlearn (smallest MRD) first: int64."""
    order: np.ndarray = pc.sort_indices(scores, sort_keys=[("mrd", "ascending"), ("sample_id", "ascending")]).to_numpy()
    return order[: scores["error"].null_count].astype(np.int64)  # samples without a score come last


def with_text(scores: pa.Table, samples: pa.Table, indices: np.ndarray) -> list[dict[str, Any]]:
    """Rows of scores with their texts; both tables are sorted by sample_id."""
    texts = samples["text"].take(indices).to_pylist()
    return [row | {"text": text} for row, text in zip(scores.take(indices).to_pylist(), texts, strict=True)]


def values(scores: pa.Table, column: str) -> np.ndarray:
    """Values of a column, nan for null: float64 [n]. All are nan if the table, of an earlier version, lacks it."""
    if column not in scores.column_names:
        return np.full(len(scores), np.nan)
    return np.asarray(scores[column].to_numpy(), float)


def ends(ranked: T) -> tuple[T, T]:
    """The hardest and the easiest samples: at most ten of each, and none in both."""
    return ranked[: min(_SHOWN, (len(ranked) + 1) // 2)], ranked[: -min(_SHOWN, len(ranked) // 2) - 1 : -1]


def histogram_edges(mrd: np.ndarray) -> list[float]:
    """Edges of at most 100 bins; a single bin if the scores are equal up to rounding."""
    first = float(mrd[0])
    if np.ptp(mrd) <= 1e-9 * np.abs(mrd).max():
        return [first - 0.1 * abs(first), first + 0.1 * abs(first)] if first else [0.0, 1.0]
    edges = np.histogram_bin_edges(mrd, "auto" if len(mrd) < 100_000 else 100)
    return (edges if len(edges) <= 101 else np.histogram_bin_edges(mrd, 100)).tolist()


def errors(scores: pa.Table) -> Counter[str]:
    """How many samples have no score, by reason. scores: the scores table, or the samples table before scoring."""
    return Counter(
        {entry["values"]: entry["counts"] for entry in pc.value_counts(scores["error"].drop_null()).to_pylist()}
    )


def warnings_of(scored: pa.Table) -> list[str]:
    """What must not be overlooked in these scores, in sentences without a full stop. scored: rows with a score."""
    found = []
    if loud := np.count_nonzero(values(scored, "mean_abs") > values(scored, "num_tokens")):
        found.append(f"{loud:,} sample(s) have log-probabilities that change by more than 100%: sigma is too large")
    if unclear := np.count_nonzero(values(scored, "mrd") < 2 * values(scored, "mrd_se")):
        found.append(f"{unclear:,} score(s) are less than twice their standard error: their 95% interval contains zero")
    if bent := np.count_nonzero(values(scored, "nonlinearity") > NONLINEAR):
        found.append(f"{bent:,} sample(s) have a nonlinearity over {NONLINEAR:g}: sigma is not small for these")
    if doubted := doubts(scored):
        found.append(doubted)
    if np.any(values(scored, "low_precision") == 1):
        found.append("These scores are marked low_precision: rounding is not small compared with the signal")
    return found


def doubts(scores: pa.Table) -> str:
    """A sentence about the scores in doubt; empty if there are none."""
    doubted = scores["doubt"].drop_null().to_pylist() if "doubt" in scores.column_names else []
    if not doubted:
        return ""
    (first, _), *_ = Counter(doubted).most_common(1)
    return (
        f"{len(doubted)} score(s) are in doubt and have no standard error. Most frequent reason: {first}. "
        "Score these with monte_carlo and scoring.control_variate"
    )


def settings(config: ScoreConfig) -> str:
    """The settings that a score depends on, in one line."""
    scoring = config.scoring
    if scoring.estimator == "closed_form":
        estimator = f"closed form, {scoring.curvature_probes} curvature probes"
    else:
        estimator = f"K = {scoring.num_draws}{' antithetic' if scoring.antithetic else ''}, seed {scoring.seed}"
        estimator += ", control variate" if scoring.controlled else ""
        if scoring.target_relative_se is not None:
            estimator += f", up to {scoring.max_draws} for a relative s.e. of {scoring.target_relative_se:g}"
    theta = "" if scoring.parameters == "all" else f"parameters {scoring.parameters}, "
    return (
        f"model {config.model.path} ({config.model.dtype}), data {config.data.path} (score_on {config.data.score_on}), "
        f"{theta}statistic {scoring.statistic} = {_STATISTIC[scoring.statistic]}, sigma {scoring.sigma:g}, {estimator}"
    )


def show(console: Console, scores: pa.Table, samples: pa.Table, config: ScoreConfig) -> None:
    """Print the summary. scores, samples: both sorted by sample_id."""
    order = ranked(scores)
    console.print(f"[bold]{len(order)} of {len(scores)} samples scored[/] · {escape(settings(config))}", soft_wrap=True)
    if len(order):
        quantiles = np.quantile(values(scores, "mrd")[order], [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
        table = Table("min", "5%", "25%", "median", "75%", "95%", "max", title="MRD", title_justify="left")
        table.add_row(*(f"{value:.3g}" for value in quantiles))
        console.print(table)
        hardest, easiest = (with_text(scores, samples, end) for end in ends(order))
        console.print(_samples(f"The {len(hardest)} hardest to unlearn (smallest MRD)", hardest, config.output.texts))
        if easiest:
            console.print(
                _samples(f"The {len(easiest)} easiest to unlearn (largest MRD)", easiest, config.output.texts)
            )
    for warning in warnings_of(scores.take(order)):
        console.print(f"[red]{warning}")
    show_errors(console, errors(scores), config.output.texts)


def show_errors(console: Console, reasons: Counter[str], texts: bool) -> None:
    """Print why samples have no score, if any has none. texts: whether reasons may quote the samples' texts."""
    if not reasons:
        return
    reasons = reasons if texts else Counter({WITHHELD: reasons.total()})
    table = Table("samples", "reason", title="Without a score", title_justify="left")
    for reason, count in reasons.most_common(_SHOWN):
        table.add_row(str(count), escape(reason))
    console.print(table)
    if len(reasons) > _SHOWN:
        console.print(f"... and {len(reasons) - _SHOWN} more reasons, in the error column of a run's scores.parquet")


def _samples(title: str, rows: Sequence[dict[str, Any]], texts: bool) -> Table:
    head = ("MRD", "± s.e.", "tokens", "log p", "sample", *(["text"] if texts else []))
    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        error = "-" if row["mrd_se"] is None else f"{row['mrd_se']:.1g}"
        table.add_row(
            f"{row['mrd']:.3g}", error, str(row["num_tokens"]), f"{row['log_prob']:.3g}",
            escape(short(row["sample_id"], 60)), *([escape(short(row["text"], 150))] if texts else []),
        )  # fmt: skip
    return table


def figure(scores: pa.Table, samples: pa.Table, config: ScoreConfig) -> bytes:
    """The summary as a PNG. scores, samples: both sorted by sample_id."""
    order = ranked(scores)
    page = matplotlib.figure.Figure(figsize=(13, 9.5), layout="constrained")
    grid = page.add_gridspec(2, 2, height_ratios=[1, 1.15])
    histogram, sorted_scores = page.add_subplot(grid[0, 0]), page.add_subplot(grid[0, 1])
    name = f"MRD, {_STATISTIC[config.scoring.statistic]}"
    if len(order):
        mrd, se = (np.nan_to_num(values(scores, name)[order]) for name in ("mrd", "mrd_se"))
        histogram.hist(mrd, bins=histogram_edges(mrd), color="#4878a8", edgecolor="white", linewidth=0.5)
        at = np.unique(np.linspace(0, len(mrd) - 1, _POINTS).astype(int))
        sorted_scores.errorbar(at + 1, mrd[at], yerr=se[at], fmt=".", markersize=3, color="#4878a8", ecolor="#b8c8dc")
    histogram.set(title="Distribution of scores", xlabel=name, ylabel="samples")
    sorted_scores.set(title="Hardest to easiest, ± standard error (95%: twice that)", xlabel="rank", ylabel=name)
    titles, shown = ("Hardest to unlearn", "Easiest to unlearn"), "text" if config.output.texts else "sample_id"
    for column, (title, part) in enumerate(zip(titles, ends(order), strict=True)):
        axis = page.add_subplot(grid[1, column])
        axis.axis("off")
        axis.set_title(title, loc="left")
        lines = [f"{row['mrd']:<9.3g} {textwrap.fill(short(row[shown], 150), 78, subsequent_indent=' ' * 10)}"
                 for row in with_text(scores, samples, part)]  # fmt: skip
        axis.text(0, 1, "\n".join(lines).replace("$", r"\$"), va="top", family="monospace", fontsize=8)
    without = sum(errors(scores).values())
    note = f"{len(order)} samples scored, {without} without a score"
    for reason, count in errors(scores).most_common(3 if config.output.texts else 0):
        note += f"\n{count} x {short(reason, 150)}"
    page.suptitle(textwrap.fill(settings(config), 150), fontsize=9)
    page.supxlabel(note.replace("$", r"\$"), fontsize=8, x=0.01, ha="left")
    return png(page)


def png(page: matplotlib.figure.Figure) -> bytes:
    """A figure as PNG."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # characters missing from the font appear as boxes
        page.savefig(content, format="png", dpi=110)
    return content.getvalue()
