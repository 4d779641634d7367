"""The summary after an evaluation: figures of sets and of the model, and rows that could not be evaluated."""

from collections import Counter
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mrd_ray.evaluation.aggregate import SUBJECT, Figure, title
from mrd_ray.evaluation.evaluate import EvaluateRun
from mrd_ray.runs.meter import WITHHELD, short

_SHOWN = 10


def show(console: Console, finished: EvaluateRun) -> None:
    """Print the summary."""
    config = finished.config
    console.print(f"[bold]{escape(config.model.path)}[/] ({config.model.dtype})", soft_wrap=True, highlight=False)
    table = Table("set", "metric", "value", "± s.e.", "rows")
    figures = _shown(finished)
    for name in dict.fromkeys(figure.set for figure in figures):
        own = [figure for figure in figures if figure.set == name]
        for i, figure in enumerate(own):
            of = "" if i else ("model" if name is None else name)
            table.add_row(of, *map(escape, _cells(figure)), end_section=i == len(own) - 1)
    console.print(table)
    empty = finished.answers["generated"].to_pylist().count("")
    if empty:
        console.print(f"[red]{empty} of {len(finished.answers)} generated answers are empty", highlight=False)
    reasons = Counter((line["set"], line["error"]) for line in finished.lines.to_pylist() if line["error"] is not None)
    if reasons:
        table = Table("set", "rows", "reason", title="Not evaluated", title_justify="left")
        if not config.output.texts:
            reasons = Counter((name, WITHHELD) for name, _ in reasons.elements())
        for (name, reason), count in reasons.most_common(_SHOWN):
            table.add_row(name, str(count), escape(reason))
        console.print(table)
        if len(reasons) > _SHOWN:
            console.print(f"... and {len(reasons) - _SHOWN} more reasons, in the error column of evaluation.parquet")


def show_beside(console: Console, runs: Mapping[str, EvaluateRun], examples: int = 3) -> None:
    """Print the figures of several models side by side, and a few answers of each set. runs: by model name."""
    of_runs = [{(figure.set, figure.metric): figure for figure in _shown(run)} for run in runs.values()]
    table = Table("set", "metric", *runs)
    for name, metric in of_runs[0]:
        values = [figures.get((name, metric)) for figures in of_runs]
        cells = ["-" if figure is None else f"{figure.value:.4g}" for figure in values]
        table.add_row(name or "model", escape(title(metric)), *cells)
    console.print(table)
    if not next(iter(runs.values())).config.output.texts:
        return
    answers = [
        {(row["set"], row["sample_id"]): row["generated"] for row in run.answers.to_pylist()} for run in runs.values()
    ]
    rows = next(iter(runs.values())).answers.to_pylist()
    for name in dict.fromkeys(row["set"] for row in rows):
        table = Table("asked", *(f"answer {of}" for of in runs), title=f"Some of {name}", title_justify="left")
        for row in [row for row in rows if row["set"] == name][:examples]:
            said = [of_run.get((name, row["sample_id"]), "") for of_run in answers]
            table.add_row(*(escape(short(text, 200)) for text in (row["prompt"], *said)))
        console.print(table)


def _shown(finished: EvaluateRun) -> list[Figure]:
    """All figures, or only those whose names contain no text from the data."""
    texts = finished.config.output.texts
    return [figure for figure in finished.figures if texts or not figure.metric.startswith(SUBJECT)]


def _cells(figure: Figure) -> tuple[str, str, str, str]:
    se = "-" if figure.se is None else f"{figure.se:.2g}"
    return title(figure.metric), f"{figure.value:.4g}", se, f"{figure.rows:,}"
