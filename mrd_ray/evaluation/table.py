"""Records of rows -> one line per row and metric, and the figures of sets and of the model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, TypedDict, TypeVar

import pyarrow as pa

from mrd_ray.config import EvaluatedSet, EvaluationSettings
from mrd_ray.data import samples as samples_table
from mrd_ray.data.samples import PLACE
from mrd_ray.evaluation import aggregate, metrics
from mrd_ray.evaluation.aggregate import Figure
from mrd_ray.evaluation.measure import Record
from mrd_ray.evaluation.sets import ANSWER, CHOICE, PARAPHRASE, WINDOW, WRONG

SCHEMA = pa.schema(
    [
        pa.field("set", pa.string(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        *(samples_table.SCHEMA.field(name) for name in PLACE),
        pa.field("subject", pa.string()),
        pa.field("metric", pa.string()),
        pa.field("value", pa.float64(), metadata={"unit": "as the metric's definition says; null where undefined"}),
        pa.field("tokens", pa.int64(), metadata={"unit": "scored tokens of the response or text"}),
        pa.field("error", pa.string(), metadata={"unit": "null, or why the row could not be evaluated"}),
    ]
)


class Line(TypedDict):
    """A row of SCHEMA, beside PLACE."""

    set: str
    sample_id: str
    subject: str | None
    metric: str | None
    value: float | None
    tokens: int | None
    error: str | None


REQUIRED = set(SCHEMA.names) - set(PLACE)  # which tables of earlier versions lack
FIGURES = pa.schema(
    [
        pa.field("set", pa.string(), metadata={"unit": "null: of the model as a whole"}),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("se", pa.float64(), metadata={"unit": "standard error; null where none is known"}),
        pa.field("rows", pa.int64(), nullable=False, metadata={"unit": "rows that it is made of"}),
    ]
)

T = TypeVar("T")


def lines(
    name: str,
    evaluated: EvaluatedSet,
    evaluation: EvaluationSettings,
    rows: pa.Table,
    records: Mapping[str, Record],
) -> pa.Table:
    """A line of SCHEMA for each row and metric of a set; for a row with an error, one line without a metric.

    Args:
        rows: of sets.SCHEMA.
        records: by sample_id.
    """
    of_set = []
    of_row = ["sample_id", *PLACE, "subject"]
    for row in rows.select([*of_row, "response", "right", "error"]).to_pylist():
        line = {"set": name} | {column: row[column] for column in of_row}
        record = records.get(row["sample_id"])
        error = row["error"] or (record and record["error"])
        if record is not None and error is None and not all(math.isfinite(p) for ps in record["log_probs"] for p in ps):
            error = "its log-probability is not finite"
        if record is None or error is not None:
            of_set.append(line | {"error": error})
            continue
        log_probs = _of_row(record)
        line["tokens"] = len(log_probs.whole)
        for metric, value in _values(evaluated, evaluation, row, record, log_probs):
            of_set.append(line | {"metric": metric, "value": value})
    return pa.Table.from_pylist(of_set, SCHEMA)


# What arXiv 2504.06658 reports for the forget set: 1 - a metric's mean.
_FORGOTTEN = {"rouge_l": "RR", "accuracy": "UA", "embedding_accuracy": "UA_by_embedding"}


@dataclass(frozen=True)
class _LogProbs:
    """Log-probabilities of a row's sequences, by role; `whole`: of the response, or of all windows of a text."""

    whole: list[float]
    paraphrase: list[float]
    wrong: list[list[float]]
    choices: list[list[float]]


def _of_row(record: Record) -> _LogProbs:
    def of(role: str) -> list[list[float]]:
        by_role: Iterator[tuple[str, list[float]]] = zip(record["roles"], record["log_probs"], strict=True)
        return [log_probs for name, log_probs in by_role if name.split("-")[0] == role]

    whole = [p for log_probs in of(ANSWER) + of(WINDOW) for p in log_probs]
    paraphrase = of(PARAPHRASE)
    return _LogProbs(whole, paraphrase[0] if paraphrase else whole, of(WRONG), of(CHOICE))


def _values(
    evaluated: EvaluatedSet,
    evaluation: EvaluationSettings,
    row: dict[str, Any],
    record: Record,
    log_probs: _LogProbs,
) -> Iterator[tuple[str, float | None]]:
    """Each metric of the set, in its order."""
    for metric in evaluated.metrics:
        match metric:
            case "probability":
                yield metric, metrics.probability(log_probs.whole)
            case "normalized_probability":
                yield metric, metrics.normalized_probability(log_probs.whole, log_probs.wrong)
            case "truth_ratio":
                yield metric, metrics.truth_ratio(log_probs.paraphrase, log_probs.wrong)
            case "accuracy":
                yield metric, metrics.accuracy(log_probs.paraphrase, log_probs.wrong)
            case "embedding_accuracy":
                yield metric, metrics.embedding_accuracy(_known(record["similarities"]))
            case "toxicity":
                yield metric, record["toxicity"]
            case "rouge_l":
                yield metric, metrics.rouge_l(_known(record["generated"]), row["response"])
            case "memorization_accuracy":
                correct = zip(record["roles"], record["correct"], strict=True)
                own = [c for role, cs in correct if role.split("-")[0] in (ANSWER, WINDOW) for c in cs]
                yield metric, metrics.memorization_accuracy(own)
            case "extraction_likelihood":
                value = _known(record["extraction_likelihood"])
                yield metric, None if math.isnan(value) else value
            case "min_k":
                for percent in evaluation.min_k_percent:
                    yield f"min_{percent:g}", metrics.min_k(log_probs.whole, percent)
            case "perplexity":
                yield metric, math.exp(min(-fmean(log_probs.whole), 700.0))
            case "multiple_choice":
                yield metric, metrics.multiple_choice(log_probs.choices, row["right"])


def _known(value: T | None) -> T:
    """What is measured of every row whose set asks for its metric."""
    assert value is not None
    return value


class _Valued(TypedDict):
    """A Line with a value."""

    value: float
    tokens: int
    subject: str | None


class Lines:
    """Lines of all sets, to look up by set and metric."""

    def __init__(self, table: pa.Table) -> None:
        self._by: dict[tuple[str, str], list[_Valued]] = {}
        for line in table.to_pylist():
            if line["value"] is not None:
                self._by.setdefault((line["set"], line["metric"]), []).append(line)

    def of(self, name: str, metric: str) -> list[_Valued]:
        """The lines of a set that have a value of this metric."""
        return self._by.get((name, metric), [])

    def values(self, name: str, metric: str) -> list[float]:
        """Their values."""
        return [line["value"] for line in self.of(name, metric)]


def figures(table: pa.Table, evaluation: EvaluationSettings, reference: pa.Table | None) -> list[Figure]:
    """The figures that follow from the lines of all sets.

    reference: lines of the same sets, of a model that never saw the forget set.
    """
    by = Lines(table)
    of_all: list[Figure] = []
    for name, evaluated in evaluation.sets.items():
        for metric in evaluated.metrics:
            own = _of_set(by, name, metric)
            if own and name == evaluation.forget and metric in _FORGOTTEN:
                own.append(replace(own[0], metric=_FORGOTTEN[metric], value=1 - own[0].value))
            of_all += own
    if evaluation.membership is not None:
        for percent in evaluation.min_k_percent:
            min_k, sets = f"min_{percent:g}", evaluation.membership
            members, others = by.values(sets.members, min_k), by.values(sets.non_members, min_k)
            if members and others:
                of_all.append(aggregate.membership_auc(f"{min_k}_auc", members, others))
    if reference is not None and evaluation.forget is not None:
        ratios = [Lines(lines).values(evaluation.forget, "truth_ratio") for lines in (table, reference)]
        if all(ratios):
            of_all.append(aggregate.forget_quality(*ratios))
    if evaluation.utility:
        parts = [part for name in evaluation.utility for part in _utility(by, name, evaluation.sets[name])]
        rows = sum(len(by.of(name, "truth_ratio")) for name in evaluation.utility)
        if not any(map(math.isnan, parts)):
            of_all.append(Figure(None, "model_utility", aggregate.model_utility(parts), None, rows))
    return of_all


def _of_set(by: Lines, name: str, metric: str) -> list[Figure]:
    rows = by.of(name, metric)
    if metric == "min_k" or not rows:
        return []
    if metric == "perplexity":
        weighted = [-line["tokens"] * math.log(line["value"]) for line in rows]
        return [aggregate.perplexity(name, weighted, [line["tokens"] for line in rows])]
    of_set = [aggregate.mean(name, metric, by.values(name, metric))]
    if metric == "multiple_choice":
        for subject in sorted({line["subject"] for line in rows if line["subject"] is not None}):
            values = [line["value"] for line in rows if line["subject"] == subject]
            of_set.append(aggregate.mean(name, f"multiple_choice: {subject}", values))
    return of_set


def _utility(by: Lines, name: str, evaluated: EvaluatedSet) -> Sequence[float]:
    """The three values of a set that go into the model utility; nan if no row has one."""
    probability = "normalized_probability" if "normalized_probability" in evaluated.metrics else "probability"
    kept = [max(0.0, 1.0 - ratio) for ratio in by.values(name, "truth_ratio")]
    parts = (by.values(name, probability), by.values(name, "rouge_l"), kept)
    return [fmean(values) if values else math.nan for values in parts]
