"""From results of units to the scores table."""

import dataclasses
import math
import operator
from collections import defaultdict
from collections.abc import Iterable
from typing import TypedDict

import numpy as np
import pyarrow as pa

from mrd_ray.config import ScoringSettings
from mrd_ray.data import samples as samples_table
from mrd_ray.data.samples import PLACE
from mrd_ray.mrd import eighths
from mrd_ray.mrd.monte_carlo import Moments
from mrd_ray.mrd.scores import Score, closed_form_score, monte_carlo_score, sampling_weights, with_flips
from mrd_ray.scoring.result import Result


def _field(name: str, kind: pa.DataType, unit: str, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable, {"unit": unit})


_NO_UNIT = "dimensionless"
_STANDARD_ERROR = (
    "standard error of mrd: half of the half-width of its 95.45% interval, however few draws (Student's); 0 without "
    "any sampling error, null if unknown (one draw; in doubt; flips of choices that cannot be told)"
)
SCHEMA = pa.schema(
    [
        _field("sample_id", pa.string(), "identifier", nullable=False),
        *(samples_table.SCHEMA.field(name) for name in PLACE),
        _field("mrd", pa.float64(), f"{_NO_UNIT}; the statistic chosen with scoring.statistic"),
        _field("mrd_se", pa.float64(), f"{_NO_UNIT}; {_STANDARD_ERROR}"),
        _field("mean_abs", pa.float64(), f"{_NO_UNIT}; E|Delta|, Algorithm 1"),
        _field("abs_mean", pa.float64(), f"{_NO_UNIT}; |E Delta|, Definition 3.1"),
        _field(
            "delta_mean",
            pa.float64(),
            f"{_NO_UNIT}; mu = E Delta (pairs: of the even part; null if rounding swamps it)",
        ),
        _field(
            "delta_std",
            pa.float64(),
            f"{_NO_UNIT}; s, standard deviation of Delta (pairs: of the odd part alone)",
        ),
        _field(
            "nonlinearity",
            pa.float64(),
            f"{_NO_UNIT}; |mu| / s, near 0 where sigma is small enough; null from plain draws",
        ),
        _field("num_draws", pa.int64(), "draws; for closed_form, probes of the curvature", nullable=False),
        _field("sigma", pa.float64(), "standard deviation of the noise, in units of the weights", nullable=False),
        _field("estimator", pa.string(), "name", nullable=False),
        _field("low_precision", pa.bool_(), "whether the precision guard would have refused this score"),
        _field("num_tokens", pa.int64(), "scored tokens", nullable=False),
        _field("log_prob", pa.float64(), "nats; sum of log p over the scored tokens, under the model as it is"),
        _field("weight", pa.float64(), "probability of being sampled in Algorithm 2, proportional to mrd"),
        _field("doubt", pa.string(), "null, or why this score of the closed form may be wrong; mrd_se is then null"),
        _field("error", pa.string(), "null, or why there is no score"),
        _field(
            "mrd_eighths",
            pa.list_(pa.float64()),
            f"{_NO_UNIT}; mrd by the draws k with k mod 8 = 0 .. 7 alone, which two runs are compared by; else null",
        ),
    ]
)
REQUIRED = set(SCHEMA.names) - {*PLACE, "doubt", "mrd_eighths"}  # without columns that tables of earlier versions lack
# columns of scoring.measures
MEASURES = {
    "mean_log_prob": _field("mean_log_prob", pa.float64(), "nats per scored token"),
    "entropy": _field("entropy", pa.float64(), "nats; of the predicted distribution, mean over scored tokens"),
    "memorization_accuracy": _field(
        "memorization_accuracy", pa.float64(), "share of scored tokens that are the model's likeliest"
    ),
    "log_prob_gradient_norm": _field(
        "log_prob_gradient_norm", pa.float64(), "nats per unit of the weights; norm of the gradient of log_prob"
    ),
}


def scores_table(
    samples: pa.Table, order: np.ndarray, results: Iterable[tuple[int, pa.Table]], scoring: ScoringSettings
) -> pa.Table:
    """One row per sample, sorted by sample_id, with SCHEMA's columns and one for each of scoring.measures.

    Only samples that are not settled yet are held as Python objects, so that memory suffices for millions of samples.

    Args:
        samples: of data.samples.SCHEMA, sorted by sample_id.
        order: int64 [n], indices of all samples.
        results: `(first, table)` pairs for all units of the run, sorted by `first`, the unit's smallest index in
            `order`; the tables are of result.RESULT_SCHEMA. All samples before the next pair's `first` are settled.
    """
    schema = pa.schema([*SCHEMA, *(field for name, field in MEASURES.items() if name in scoring.measures)])
    parts: dict[str, list[_Part]] = defaultdict(list)
    batches: list[pa.RecordBatch] = []
    settled = 0

    def settle(stop: int) -> None:
        for start in range(settled, stop, _BATCH):
            rows = samples.select(_NEEDED).take(order[start : min(start + _BATCH, stop)]).to_pylist()
            made = [_row(sample, _in_turn(parts.pop(sample["sample_id"], [])), scoring) for sample in rows]
            batches.append(pa.RecordBatch.from_pylist(made, schema))

    for first, result in results:
        if first - settled >= _BATCH:
            settle(first)
            settled = first
        unit_id = result["unit_id"][0].as_py()
        precision = result["precision"][0].as_py()
        low = precision is not None and not precision["sufficient"]
        no_mean = precision is not None and not precision["knows_mean"]
        for part in result["samples"].combine_chunks().flatten().to_pylist():
            parts[part["sample_id"]].append(part | {"low_precision": low, "no_mean": no_mean, "unit_id": unit_id})
    settle(len(order))
    scores = pa.Table.from_batches(batches, schema).take(np.argsort(order))
    weights = pa.array(sampling_weights(scores["mrd"].to_numpy().astype(float)), from_pandas=True)
    return scores.set_column(schema.get_field_index("weight"), schema.field("weight"), weights)


class _Part(Result):
    """A sample's result in one unit, and what the unit's precision says of it."""

    low_precision: bool
    no_mean: bool
    unit_id: str


class _Sample(TypedDict):
    """Columns of the samples table, beside PLACE."""

    sample_id: str
    scored: list[bool] | None
    error: str | None


def _in_turn(parts: list[_Part]) -> list[_Part]:
    """Sorted by round, then draws, however units were cut, so that the first one is always from the same forward."""
    return sorted(parts, key=operator.itemgetter("unit_id"))


_NEEDED = ["sample_id", *PLACE, "scored", "error"]
_BATCH = 4096  # rows


def _row(sample: _Sample, parts: list[_Part], scoring: ScoringSettings) -> dict[str, object]:
    num_tokens = sum(sample["scored"] or [])
    error = sample["error"] or next((part["error"] for part in parts if part["error"]), None)
    row: dict[str, object] = {name: value for name, value in sample.items() if name != "scored"} | {
        "sigma": scoring.sigma,
        "estimator": scoring.estimator,
        "num_tokens": num_tokens,
        "num_draws": 0,
        "error": error,
    }
    if error is not None:
        return row
    score, by_eighth = _score(parts, scoring)
    if (doubt := parts[0]["doubt"]) is not None:
        score = dataclasses.replace(score, mean_abs_se=None, abs_mean_se=None)
    if any(part["no_mean"] for part in parts):
        score = dataclasses.replace(score, abs_mean=None, abs_mean_se=None, delta_mean=None, nonlinearity=None)
    if not all(value is None or math.isfinite(value) for value in dataclasses.astuple(score)):
        return row | {"error": "its moments, or what follows from them, are beyond all floats: sigma too large?"}
    if scoring.statistic == "mean_abs":
        row |= {"mrd": score.mean_abs, "mrd_se": score.mean_abs_se}
    else:
        row |= {"mrd": score.abs_mean, "mrd_se": score.abs_mean_se}
    log_prob = parts[0]["log_prob"]
    return (
        row
        | dataclasses.asdict(score)
        | parts[0]["measures"]
        | {
            "doubt": doubt,
            "num_draws": sum(part["num_draws"] for part in parts),
            "low_precision": any(part["low_precision"] for part in parts),
            "mrd_eighths": by_eighth,
            "log_prob": log_prob,
            "mean_log_prob": log_prob / num_tokens,
        }
    )


def _score(parts: list[_Part], scoring: ScoringSettings) -> tuple[Score, list[float] | None]:
    """The score, and the score from each eighth of its draws."""
    if scoring.estimator == "closed_form":
        (part,) = parts
        score = closed_form_score(scoring.sigma, part["gradient_norm"], part["probes"])
        return score, eighths.of_probes(scoring.sigma, score, scoring.statistic, part["probes"])
    of_part = operator.itemgetter(*(field.name for field in dataclasses.fields(Moments)))
    moments = Moments.merge([Moments(*of_part(part)) for part in parts])
    norms = [part["gradient_norm"] for part in parts]
    first_std = None if None in norms else scoring.sigma * norms[0]
    paired = scoring.antithetic or first_std is not None
    score = with_flips(monte_carlo_score(moments, paired, first_std), parts[0]["flip_squares"], moments.num_draws)
    return score, eighths.of_moments(moments, score, scoring.statistic, first_std)


def unsettled(scores: pa.Table, scoring: ScoringSettings) -> np.ndarray:
    """Which samples need more draws in adaptive scoring: bool [n]. No sample without a target, or after max_draws."""
    if scoring.target_relative_se is None:
        return np.zeros(len(scores), bool)
    draws, mrd = scores["num_draws"].to_numpy(), scores["mrd"].to_numpy()
    se = scores["mrd_se"].to_numpy().astype(float)  # null becomes nan, which meets no target
    scored = ~np.isnan(mrd.astype(float))
    found: np.ndarray = scored & ~(se <= scoring.target_relative_se * mrd) & (draws < scoring.max_draws)
    return found
