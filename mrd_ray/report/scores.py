"""The part of the page on score runs: each run, and how far they agree."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.stats

from mrd_ray.config import CompareConfig
from mrd_ray.errors import UserError
from mrd_ray.report import charts
from mrd_ray.report.charts import Chart
from mrd_ray.report.read import Scores
from mrd_ray.report.tables import Cell, Column, DataTable, Table, Text
from mrd_ray.runs.meter import WITHHELD
from mrd_ray.scoring import compare, summary

_SHOWN = 10
_MEASURES = {  # columns to compare scores with, and their names in charts
    "num_tokens": "number of tokens",
    "log_prob": "log-probability (nats)",
    "mean_log_prob": "mean log-probability (nats per token)",
    "entropy": "entropy (nats)",
    "memorization_accuracy": "memorization accuracy",
    "log_prob_gradient_norm": "gradient norm of the log-probability",
}


@dataclass(frozen=True)
class ScoreSection:
    """One score run."""

    name: str
    says: list[str]
    quantiles: Table | None
    charts: list[Chart]
    tables: list[Table]
    samples: DataTable


@dataclass(frozen=True)
class Agreement:
    """A comparison of score runs."""

    table: Table
    charts: list[Chart]
    apart: list[Table]


def section(run: Scores, number: int, include_text: bool) -> ScoreSection:
    """A run's scores: their distribution, the hardest and easiest samples, and all of them."""
    table = run.scores.append_column("text", pa.array([run.texts.get(i) for i in run.scores["sample_id"].to_pylist()]))
    scored = table.filter(pa.array(np.isfinite(summary.values(table, "mrd"))))
    scored = scored.sort_by([("mrd", "ascending"), ("sample_id", "ascending")])
    unscored = table.filter(pa.array(~np.isfinite(summary.values(table, "mrd"))))
    mrd, se = summary.values(scored, "mrd"), summary.values(scored, "mrd_se")
    drawn, quantiles, tables = [], None, []
    if len(scored):
        points = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
        head = ("quantile", "min", "5%", "25%", "median", "75%", "95%", "max")
        quantiles = Table("Quantiles of the scores", head, [["MRD", *np.quantile(mrd, points).tolist()]])
        drawn = [charts.distribution(mrd, se), charts.by_rank(mrd, se), *_against(scored, mrd)]
        hardest, easiest = summary.ends(range(len(scored)))
        tables = [
            _extremes(f"The {len(which)} {words}", scored.take(list(which)), include_text)
            for which, words in (
                (hardest, "hardest to unlearn (smallest MRD)"),
                (easiest, "easiest to unlearn (largest MRD)"),
            )
            if which
        ]
    if len(unscored):
        reasons = Counter(unscored["error"].to_pylist() if include_text else [WITHHELD] * len(unscored))
        rows: list[list[Cell]] = [[count, Text(reason)] for reason, count in reasons.most_common(_SHOWN)]
        more = f"; {len(reasons) - _SHOWN} more reasons are in the table below" if len(reasons) > _SHOWN else ""
        tables.append(Table(f"Samples without a score{more}", ("samples", "reason"), rows))
    samples = _samples(pa.concat_tables([scored, unscored]), len(scored), number, run.about.name, include_text)
    says = [
        f"{len(scored):,} of {len(table):,} samples have a score.",
        *(f"{one}." for one in summary.warnings_of(scored)),
    ]
    says += _checked(run.about.manifest.get("checked"))
    return ScoreSection(run.about.name, says, quantiles, drawn, tables, samples)


def _against(scored: pa.Table, mrd: np.ndarray) -> list[Chart]:
    drawn = []
    for column, name in _MEASURES.items():
        if column not in scored.column_names:
            continue
        other = summary.values(scored, column)
        both = np.isfinite(other)
        if both.sum() > 2:
            with np.errstate(all="ignore"):
                varied = np.ptp(other[both]) > 0 and np.ptp(mrd[both]) > 0
                spearman = float(scipy.stats.spearmanr(other[both], mrd[both]).statistic) if varied else float("nan")
            drawn.append(charts.against(name, other[both], mrd[both], spearman))
    return drawn


def _checked(checked: dict[str, Any] | None) -> list[str]:
    """How the closed form was checked with draws."""
    if checked is None:
        return []
    said = []
    if checked["worst"] is not None:
        said.append(
            f"The closed form was compared with {checked['draws']} draws of {checked['samples']} samples: they differ "
            f"from the gradient's prediction by at most {checked['worst']:.2g} of their standard deviation."
        )
    if checked["every_sample"]:
        said.append("Every sample was checked" + (", and choices inside the model." if checked["choices"] else "."))
    if checked["unchecked"]:
        said.append(f"What was not checked: {checked['unchecked']}.")
    return said


def _extremes(caption: str, rows: pa.Table, include_text: bool) -> Table:
    head = ("MRD", "± s.e.", *(["text"] if include_text else []), "tokens", "log p", "draws", "sample")
    cells: list[list[Cell]] = []
    for row in rows.to_pylist():
        text = [Text(row["text"])] if include_text else []
        of_sample = (row["num_tokens"], row["log_prob"], row["num_draws"], Text(row["sample_id"]))
        cells.append([row["mrd"], row["mrd_se"], *text, *of_sample])
    return Table(caption, head, cells)


def _samples(rows: pa.Table, scored: int, number: int, name: str, include_text: bool) -> DataTable:
    def column(label: str, of: str) -> Column:
        return Column(label, rows[of].to_pylist())

    ranks = [*range(1, scored + 1), *[None] * (len(rows) - scored)]
    columns = [Column("rank", ranks), column("MRD", "mrd"), column("± s.e.", "mrd_se")]
    if include_text:
        columns.append(Column("text", rows["text"].to_pylist(), "text"))
    columns += [column("draws", "num_draws"), column("tokens", "num_tokens"), column("log p", "log_prob")]
    columns += [
        column(label, of)
        for of, label in {
            "mean_log_prob": "log p per token",
            "entropy": "entropy",
            "memorization_accuracy": "MA",
            "log_prob_gradient_norm": "gradient norm",
            "nonlinearity": "nonlinearity",
            "weight": "weight",
        }.items()
        if of in rows.column_names and rows[of].null_count < len(rows)
    ]
    columns.append(Column("sample", rows["sample_id"].to_pylist(), "name"))
    if "index" in rows.column_names:
        columns.append(column("index", "index"))
    if scored < len(rows):
        errors = [None if error is None else error if include_text else WITHHELD for error in rows["error"].to_pylist()]
        columns.append(Column("error", errors, "text"))
    return DataTable(f"samples-{number}", f"All {len(rows):,} samples of {name}", columns)


def agreement(runs: Sequence[Scores], include_text: bool) -> Agreement | None:
    """How well the runs agree; None with fewer than two runs."""
    if len(runs) < 2:
        return None
    rows: list[list[Cell]] = []
    drawn, apart = [], []
    for a, b in itertools.combinations(runs, 2):
        names = f"{b.about.name} against {a.about.name}"
        try:
            comparison = compare.compare(CompareConfig(run_a=a.about.uri, run_b=b.about.uri))
        except UserError as problem:
            rows.append([names, None, None, None, None, None, f"not compared: {problem}"])
            continue
        far = comparison.share_apart if comparison.apart is None else f"{comparison.apart:.1%} over 3 s.e. apart"
        if 0 < comparison.judged < comparison.compared:
            far += f", of {comparison.judged:,} that have standard errors"
        unlike = _unlike(a, b)
        difference = "; ".join(filter(None, (far, unlike)))
        figures = (comparison.compared, comparison.spearman, comparison.kendall, comparison.median_ratio)
        rows.append([names, *figures, comparison.draws, difference])
        if a is runs[0]:
            drawn.append(_scatter(a, b, comparison, unlike))
            apart.append(_apart(a, b, comparison, include_text))
    head = ("runs", "samples", "Spearman", "Kendall", "median ratio", "errors of differences", "difference")
    return Agreement(Table("Agreement of each pair of runs", head, rows), drawn, apart)


def _unlike(a: Scores, b: Scores) -> str:
    """Why the scores differ beyond their sampling error; "" if nothing is known to make them differ."""
    words = {"model": "another model", "scoring.sigma": "another sigma: compare ranks only"}
    of_a, of_b = (run.about.manifest["identity"] for run in (a, b))
    return "; ".join(said for key, said in words.items() if of_a.get(key) != of_b.get(key))


def _scatter(a: Scores, b: Scores, comparison: compare.Comparison, unlike: str) -> Chart:
    scores = np.array([(row["a"], row["b"]) for row in comparison.rows])
    far = None if comparison.apart is None else np.array([abs(row["z"]) > 3 for row in comparison.rows])
    return charts.two_runs(a.about.name, b.about.name, scores, far, comparison.spearman, unlike)


def _apart(a: Scores, b: Scores, comparison: compare.Comparison, include_text: bool) -> Table:
    head = ["sample", *(["text"] if include_text else []), a.about.name, b.about.name, "apart"]
    rows: list[list[Cell]] = []
    for row in comparison.rows[: _SHOWN // 2]:
        text = [Text(row["text"])] if include_text else []
        rows.append([Text(row["sample_id"]), *text, row["a"], row["b"], comparison.how_far(row)])
    return Table(f"Where {b.about.name} and {a.about.name} disagree most", head, rows)
