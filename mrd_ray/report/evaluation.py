"""The part of the page on evaluations: figures of all runs in columns, and their answers side by side."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from mrd_ray.evaluation import aggregate
from mrd_ray.evaluation.aggregate import Figure
from mrd_ray.evaluation.evaluate import Answer
from mrd_ray.report import charts
from mrd_ray.report.charts import Chart, Line
from mrd_ray.report.read import Evaluation
from mrd_ray.report.tables import Cell, Column, DataTable, Table, Text
from mrd_ray.report.words import number
from mrd_ray.runs.meter import WITHHELD

_EXAMPLES = 3  # per set: answers that changed most, and as many others
_REASONS = 10
# not from 0 to 1, or 1 minus another metric; all others lie between 0 and 1
_NOT_DRAWN = {"perplexity", "truth_ratio", "UA", "UA_by_embedding", "RR"}

_SHORT = {"rouge_l": "ROUGE-L", "memorization_accuracy": "MA", "extraction_likelihood": "EL"}


@dataclass(frozen=True)
class EvaluationSection:
    """All evaluations, in the order given."""

    warning: str | None
    figures: list[Table]
    charts: list[Chart]
    errors: Table | None
    examples: list[Table]
    answers: DataTable | None


def section(runs: Sequence[Evaluation], include_text: bool) -> EvaluationSection | None:
    """The section on all evaluate runs; None if there are none."""
    if not runs:
        return None
    other = _asked_otherwise(runs)
    answers = {key: of for key, of in _answers(runs).items() if key[0] not in other} if include_text else {}
    sets = list(dict.fromkeys(name for name, _ in answers))
    chart = _dots(runs, other)
    figures = (_figures(runs, kind, other, include_text) for kind in _CAPTIONS)
    return EvaluationSection(
        warning=f"Not the same in all runs (other rows, tokens or metrics): {', '.join(other)}. "
        "Figures of such a set are not compared, and its answers are not shown."
        if other
        else None,
        figures=[table for table in figures if table is not None],
        charts=[] if chart is None else [chart],
        errors=_errors(runs, include_text),
        examples=[_examples(runs, answers, name) for name in sets],
        answers=_all_answers(runs, answers) if answers else None,
    )


def _asked_otherwise(runs: Sequence[Evaluation]) -> list[str]:
    """Names of sets that are not the same in all runs, by their digests."""
    digests: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for key, digest in run.about.manifest["identity"].items():
            if key.startswith("evaluation.sets."):
                digests[key.removeprefix("evaluation.sets.")].add(digest)
    return [name for name, of_runs in digests.items() if len(of_runs) > 1]


def _compared(name: str | None, other: Sequence[str]) -> bool:
    """Whether runs can be compared by a figure; figures of the model (None) come from all sets together."""
    return name not in other if name is not None else not other


def over_steps(evaluations: Mapping[int, pa.Table], refreshes: Sequence[int], stop: int | None) -> list[Chart]:
    """Results of evaluations during unlearning: a chart for each set, and one for perplexities."""
    steps = sorted(evaluations)
    means: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for step in steps:
        values: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
        for line in evaluations[step].to_pylist():
            if line["value"] is not None and not line["metric"].startswith("min_"):
                values[line["set"], line["metric"]].append((line["value"], line["tokens"]))
        for (name, metric), of_rows in values.items():
            if metric == "perplexity":
                log_probs = [-tokens * math.log(value) for value, tokens in of_rows]
                mean = aggregate.perplexity(name, log_probs, [tokens for _, tokens in of_rows])
            else:
                mean = aggregate.mean(name, metric, [value for value, _ in of_rows])
            means[name, metric][step] = mean.value
    lines: dict[str, list[Line]] = defaultdict(list)
    for (name, metric), by_step in means.items():
        title = f"Evaluation of the set {name}" if metric != "perplexity" else "Perplexity of evaluated sets"
        label = aggregate.title(metric).split(":")[0] if metric != "perplexity" else name
        lines[title].append(Line(label, steps, [by_step.get(step) for step in steps]))
    drawn = [charts.over_steps(title, "mean", of_chart, refreshes, stop) for title, of_chart in lines.items()]
    return [chart for chart in drawn if chart is not None]


_CAPTIONS = {
    "forget": "Completeness: what the model still knows of the forget set",
    "kept": "Utility: what the model knows of everything else",
    "all": "What the model knows of each set",
    "model": "The model as a whole",
}


def _kind(name: str | None, runs: Sequence[Evaluation]) -> str:
    if name is None:
        return "model"
    forget = {run.about.setting("evaluation.forget") for run in runs} - {None}
    return "all" if not forget else "forget" if name in forget else "kept"


def _by_metric(run: Evaluation) -> dict[tuple[str | None, str], Figure]:
    return {
        (figure.set, figure.metric): figure if math.isfinite(figure.se or 0.0) else replace(figure, se=None)
        for figure in run.figures
    }


def _keys(runs: Sequence[Evaluation]) -> list[tuple[str | None, str]]:
    """(set, metric) of every figure of any run, in the order of the first run that has it."""
    return list(dict.fromkeys(key for run in runs for key in _by_metric(run)))


def _figures(runs: Sequence[Evaluation], kind: str, other: Sequence[str], include_text: bool) -> Table | None:
    rows: list[list[Cell]] = []
    for name, metric in _keys(runs):
        if _kind(name, runs) != kind or (metric.startswith(aggregate.SUBJECT) and not include_text):
            continue
        of_runs = [_by_metric(run).get((name, metric)) for run in runs]
        row: list[Cell] = [aggregate.title(metric), *([] if name is None else [name]), *map(_figure, of_runs)]
        if len(runs) > 1:
            row.append(_change(of_runs[0], of_runs[-1]) if _compared(name, other) else None)
        rows.append(row)
    if not rows:
        return None
    head = ["figure", *([] if kind == "model" else ["set"]), *(run.about.name for run in runs)]
    return Table(_CAPTIONS[kind], [*head, *(["change"] if len(runs) > 1 else [])], rows)


def _figure(figure: Figure | None) -> str | None:
    if figure is None:
        return None
    se = "" if figure.se is None else f"\u00a0±\u00a0{number(figure.se, 2)}"
    return f"{number(figure.value)}{se} ({figure.rows:,}\u00a0row{'' if figure.rows == 1 else 's'})"


def _change(first: Figure | None, last: Figure | None) -> str | None:
    change = math.nan if first is None or last is None else last.value - first.value
    return f"{change:+.3g}" if math.isfinite(change) else None


def _dots(runs: Sequence[Evaluation], other: Sequence[str]) -> Chart | None:
    rows: list[charts.Row] = []
    for name, metric in _keys(runs):
        found = [_by_metric(run).get((name, metric)) for run in runs]
        bounded = all(figure is None or 0 <= figure.value <= 1 for figure in found)
        if bounded and metric not in _NOT_DRAWN and not metric.startswith(aggregate.SUBJECT):
            label = f"{name or ''} {_SHORT.get(metric, metric.replace('_', ' '))}".strip()
            figures = [None if figure is None else (figure.value, figure.se) for figure in found]
            rows.append((label, _compared(name, other), figures))
    return charts.dots([run.about.name for run in runs], rows)


def _errors(runs: Sequence[Evaluation], include_text: bool) -> Table | None:
    reasons = Counter(
        (run.about.name, line["set"], line["error"] if include_text else WITHHELD)
        for run in runs
        for line in run.lines
        if line["error"] is not None
    )
    rows: list[list[Cell]] = [[run, of, n, Text(reason)] for (run, of, reason), n in reasons.most_common(_REASONS)]
    more = f"; the {_REASONS} most frequent reasons of {len(reasons)}" if len(reasons) > _REASONS else ""
    return Table(f"Rows that could not be evaluated{more}", ("run", "set", "rows", "reason"), rows) if rows else None


Answers = dict[tuple[str, str], list[Answer | None]]


def _answers(runs: Sequence[Evaluation]) -> Answers:
    """Rows of answers.parquet of each run, by (set, sample_id)."""
    answers: Answers = {}
    for index, run in enumerate(runs):
        for answer in run.answers:
            answers.setdefault((answer["set"], answer["sample_id"]), [None] * len(runs))[index] = answer
    return answers


def _asked(answers: list[Answer | None]) -> Answer:
    return next(answer for answer in answers if answer is not None)


def _generated(answers: list[Answer | None]) -> list[str | None]:
    return [None if answer is None else answer["generated"] for answer in answers]


def _examples(runs: Sequence[Evaluation], answers: Answers, name: str) -> Table:
    ids = sorted(sample_id for of, sample_id in answers if of == name)
    rouge = [
        {line["sample_id"]: line["value"] for line in run.lines if (line["set"], line["metric"]) == (name, "rouge_l")}
        for run in (runs[0], runs[-1])
    ]

    def change(sample_id: str) -> float:
        before, after = (of.get(sample_id) for of in rouge)
        return 0.0 if before is None or after is None else abs(after - before)

    most = sorted(ids, key=lambda i: (-change(i), i))[:_EXAMPLES] if len(runs) > 1 else []
    others = [sample_id for sample_id in ids if sample_id not in most]
    step = max(1, math.ceil(len(others) / _EXAMPLES))
    chosen = [*most, *others[::step][:_EXAMPLES]]
    head = ("question", "true answer", *(run.about.name for run in runs))
    rows: list[list[Cell]] = []
    for sample_id in chosen:
        of_runs = answers[name, sample_id]
        asked = _asked(of_runs)
        rows.append([Text(asked["prompt"]), Text(asked["answer"]), *map(Text, _generated(of_runs))])
    which = f"{len(chosen)} of {len(ids):,}"
    if any(map(change, most)):
        which += f"; first the {len(most)} whose ROUGE-L recall changed most, then some evenly spaced"
    return Table(f"Answers on the set {name} ({which})", head, rows, even=True)


def _all_answers(runs: Sequence[Evaluation], answers: Answers) -> DataTable:
    asked = [_asked(of_runs) for of_runs in answers.values()]
    columns = [
        Column("set", [of for of, _ in answers], "name"),
        Column("question", [row["prompt"] for row in asked], "text"),
        Column("true answer", [row["answer"] for row in asked], "text"),
    ]
    for index, run in enumerate(runs):
        columns.append(Column(run.about.name, [_generated(of)[index] for of in answers.values()], "text"))
    columns.append(Column("sample", [sample_id for _, sample_id in answers], "name"))
    return DataTable("answers", f"All {len(answers):,} answers", columns)
