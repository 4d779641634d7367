"""The result of a unit, and the check that a result read from a file is valid."""

from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mrd_ray.config import ScoringSettings
from mrd_ray.mrd.monte_carlo import EIGHTHS, Moments
from mrd_ray.scoring.units import Unit

_SUM = pa.list_(pa.float64())  # see monte_carlo.exact_sum
_BY_EIGHTH = pa.list_(_SUM)
RESULT = pa.struct(
    [
        ("sample_id", pa.string()),
        ("log_prob", pa.float64()),
        ("error", pa.string()),
        ("num_draws", pa.int64()),
        # monte_carlo.Moments
        ("sum_abs", _SUM),
        ("sum_abs_squares", _SUM),
        ("sum", _SUM),
        ("sum_squares", _SUM),
        ("sum_odd_squares", _SUM),
        ("sum_first_squares", _SUM),
        ("sum_first_abs", _SUM),
        ("sum_abs_products", _SUM),
        ("sum_smooth", _SUM),
        ("sum_smooth_squares", _SUM),
        ("abs_by_eighth", _BY_EIGHTH),
        ("mean_by_eighth", _BY_EIGHTH),
        # closed_form, and monte_carlo with a control variate
        ("gradient_norm", pa.float64()),
        ("flip_squares", pa.float64()),  # only monte_carlo
        # closed_form
        ("probes", pa.list_(pa.float64())),
        ("doubt", pa.string()),
        # scoring.measures
        (
            "measures",
            pa.struct(
                [
                    ("entropy", pa.float64()),
                    ("memorization_accuracy", pa.float64()),
                    ("log_prob_gradient_norm", pa.float64()),
                ]
            ),
        ),
    ]
)


class Result(TypedDict, total=False):
    """What an estimator knows of a sample: the fields of RESULT, of which it leaves out those that are not its own."""

    sample_id: str
    log_prob: float | None
    error: str | None
    num_draws: int
    sum_abs: list[float]
    sum_abs_squares: list[float]
    sum: list[float]
    sum_squares: list[float]
    sum_odd_squares: list[float]
    sum_first_squares: list[float]
    sum_first_abs: list[float]
    sum_abs_products: list[float]
    sum_smooth: list[float]
    sum_smooth_squares: list[float]
    abs_by_eighth: list[list[float]]
    mean_by_eighth: list[list[float]]
    gradient_norm: float
    flip_squares: float | None
    probes: list[float]
    doubt: str | None
    measures: dict[str, float]


_PRECISION = pa.struct(
    [
        ("share_moved", pa.float64()),
        ("cosine", pa.float64()),
        ("noise_floor", pa.float64()),
        ("sufficient", pa.bool_()),
        ("knows_mean", pa.bool_()),
    ]
)
_CHECKED = pa.struct(  # verification.Checked
    [
        ("samples", pa.int64()),
        ("draws", pa.int64()),
        ("worst", pa.float64()),
        ("choices", pa.bool_()),
        ("every_sample", pa.bool_()),
        ("unchecked", pa.string()),
    ]
)
RESULT_SCHEMA = pa.schema(
    [
        ("unit_id", pa.string()),
        ("worker", pa.string()),
        ("seconds", pa.float64()),
        ("fatal", pa.string()),
        ("precision", _PRECISION),  # only monte_carlo
        ("says", pa.string()),  # only monte_carlo: why it has no control variate although one was due, or a slow one
        ("checked", _CHECKED),  # only closed_form
        ("samples", pa.list_(RESULT)),
    ]
)


_ROUNDING, _TINY = 1 + 1e-9, 1e-290  # below _TINY, squares lose digits


def flaw(result: pa.Table, unit: Unit, scoring: ScoringSettings) -> str | None:
    """Why a one-row table of RESULT_SCHEMA cannot be this unit's result; None if it can.

    Finds values that are missing, not finite or of other draws, and moments that no draws can have. It cannot tell the
    right moments from other possible ones.
    """
    samples = result["samples"].combine_chunks().flatten()
    if samples.null_count:
        return "a sample is null"
    scored = samples.filter(pc.is_null(pc.struct_field(samples, "error")))
    draws = unit.stop_draw - unit.first_draw if scoring.estimator == "monte_carlo" else scoring.curvature_probes
    if pc.any(pc.not_equal(pc.fill_null(pc.struct_field(scored, "num_draws"), -1), draws)).as_py():
        return f"num_draws is not {draws} in every sample"
    measures = pc.struct_field(scored, "measures")
    if lacking := [name for name in scoring.measures if name != "mean_log_prob" and _lacks(measures, name)]:
        return f"{lacking[0]} is null"
    numbers = {"log_prob": pc.struct_field(scored, "log_prob")}
    if scoring.estimator == "closed_form":
        numbers["gradient_norm"] = pc.struct_field(scored, "gradient_norm")
    for name, values in numbers.items():
        if not _finite(values):
            return f"{name} is null or not finite"
    if measures.null_count:
        return "measures are null"
    if scoring.estimator == "closed_form":
        probes = pc.struct_field(scored, "probes")
        wrong = probes.null_count or not _finite(pc.list_flatten(probes))
        wrong |= pc.any(pc.not_equal(pc.list_value_length(probes), draws)).as_py() or False
        return "probes are not those of the settings" if wrong else None
    return _flaw_of_moments(scored, draws)


def _flaw_of_moments(scored: pa.StructArray, draws: int) -> str | None:
    first: dict[str, np.ndarray] = {}
    for name in ("abs_by_eighth", "mean_by_eighth"):
        eighths = pc.struct_field(scored, name)
        wrong = eighths.null_count or pc.any(pc.not_equal(pc.list_value_length(eighths), EIGHTHS)).as_py()
        if wrong or (of_draws := pc.list_flatten(eighths)).null_count or not _finite(pc.list_flatten(of_draws)):
            return f"{name} is null, not finite or not of {EIGHTHS} parts"
    for name in Moments.sums():
        sums = pc.struct_field(scored, name)
        if sums.null_count or not _finite(values := pc.list_flatten(sums)):
            return f"{name} is null or not finite"
        lengths = pc.list_value_length(sums).to_numpy().astype(np.int64)
        starts, padded = np.cumsum(lengths) - lengths, np.append(values.to_numpy(), 0.0)
        first[name] = np.where(lengths > 0, padded[np.where(lengths > 0, starts, -1)], 0.0)  # an empty sum is 0
    # the first part of an exact sum equals the sum up to rounding; for n draws, S^2 / n <= sum of squares <= S^2
    of_abs, of_squares = first["sum_abs"], first["sum_abs_squares"]
    with np.errstate(over="ignore"):
        square = of_abs**2
        possible = (of_abs >= 0) & (of_squares <= square * _ROUNDING + _TINY)
        possible &= square <= draws * of_squares * _ROUNDING + _TINY
        possible &= (np.abs(first["sum"]) <= of_abs * _ROUNDING) & (first["sum_squares"] <= of_squares * _ROUNDING)
    return None if possible.all() else "no draws have these moments"


def _lacks(measures: pa.StructArray, name: str) -> bool:
    return bool(pc.struct_field(measures, name).null_count)


def _finite(values: pa.Array) -> bool:
    return bool(values.null_count == 0 and np.isfinite(values.to_numpy(zero_copy_only=False)).all())
