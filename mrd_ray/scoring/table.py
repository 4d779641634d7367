"""Results of units -> the scores table."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from mrd_ray.config import ScoringConfig
from mrd_ray.mrd.monte_carlo import Moments
from mrd_ray.mrd.scores import sampling_weights, score


def _field(name: str, kind: pa.DataType, unit: str) -> pa.Field:
    return pa.field(name, kind, metadata={"unit": unit})


_NO_UNIT = "dimensionless"
SCHEMA = pa.schema(
    [
        _field("sample_id", pa.string(), "identifier"),
        _field("mrd", pa.float64(), f"{_NO_UNIT}; the statistic chosen with scoring.statistic"),
        _field("mrd_se", pa.float64(), f"{_NO_UNIT}; standard error of mrd, null with one draw"),
        _field("mean_abs", pa.float64(), f"{_NO_UNIT}; E|Delta|, Algorithm 1"),
        _field("abs_mean", pa.float64(), f"{_NO_UNIT}; |E Delta|, Definition 3.1"),
        _field("num_draws", pa.int64(), "draws"),
        _field("sigma", pa.float64(), "standard deviation of the noise, in units of the weights"),
        _field("estimator", pa.string(), "name"),
        _field("num_tokens", pa.int64(), "scored tokens"),
        _field("log_prob", pa.float64(), "nats; sum of log p over the scored tokens, under the model as it is"),
        _field("weight", pa.float64(), "probability of being sampled in Algorithm 2, proportional to mrd"),
        _field("error", pa.string(), "null, or why there is no score"),
    ]
)


def scores_table(samples: pa.Table, results: Iterable[pa.Table], scoring: ScoringConfig) -> pa.Table:
    """One row per sample, sorted by sample_id, of SCHEMA.

    Args:
        samples: of data.samples.SCHEMA, sorted by sample_id.
        results: of actor.RESULT_SCHEMA, all units of the run in any order.
    """
    parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        for part in result["samples"].combine_chunks().flatten().to_pylist():
            parts[part["sample_id"]].append(part)
    rows = [_row(sample, parts[sample["sample_id"]], scoring) for sample in samples.select(_NEEDED).to_pylist()]
    mrd = np.array([np.nan if row.get("mrd") is None else row["mrd"] for row in rows])
    for row, weight in zip(rows, sampling_weights(mrd).tolist(), strict=True):
        row["weight"] = None if np.isnan(weight) else weight
    return pa.Table.from_pylist(rows, SCHEMA)


_NEEDED = ["sample_id", "scored", "error"]


def _row(sample: dict[str, Any], parts: list[dict[str, Any]], scoring: ScoringConfig) -> dict[str, Any]:
    row: dict[str, Any] = {
        "sample_id": sample["sample_id"],
        "sigma": scoring.sigma,
        "estimator": "monte_carlo",
        "num_tokens": sum(sample["scored"] or []),
        "num_draws": 0,
        "error": sample["error"] or next((part["error"] for part in parts if part["error"]), None),
    }
    if row["error"] is not None:
        return row
    moments = Moments.merge(
        [Moments(part["num_draws"], part["sum_abs"], part["sum"], part["sum_squares"]) for part in parts]
    )
    found = asdict(score(moments))
    row |= {
        "mrd": found[scoring.statistic],
        "mrd_se": found[f"{scoring.statistic}_se"],
        "mean_abs": found["mean_abs"],
        "abs_mean": found["abs_mean"],
        "num_draws": moments.num_draws,
        "log_prob": parts[0]["log_prob"],
    }
    if moments.num_draws < 2:
        row["mrd_se"] = None
    return row
