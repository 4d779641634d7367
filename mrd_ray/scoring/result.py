"""The result of a unit."""

from typing import Required, TypedDict

import pyarrow as pa

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
    """A row of RESULT. Fields that the estimator does not know are absent."""

    sample_id: Required[str]
    log_prob: float
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
