"""Estimates with 95% confidence intervals."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats

_LEVEL, _RESAMPLES = 0.95, 9999
_FEWEST = 10  # pairs; with fewer, a bootstrap's intervals are too narrow


@dataclass(frozen=True)
class Interval:
    """An estimate, and its 95% confidence interval; nan if the data are too few or all the same."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return "-" if math.isnan(self.value) else f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    @property
    def decided(self) -> bool:
        """Whether zero is outside the interval."""
        return self.low > 0 or self.high < 0


def mean(values: Sequence[float], comparisons: int = 1) -> Interval:
    """Mean, with Student's interval: 95% for all `comparisons` together (Bonferroni)."""
    if len(values) < 2 or np.ptp(values) == 0:
        return Interval(float(np.mean(values)), math.nan, math.nan)
    interval = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(1 - (1 - _LEVEL) / comparisons)
    return Interval(float(np.mean(values)), float(interval.low), float(interval.high))


def spearman(
    x: Sequence[float], y: Sequence[float], given: Sequence[float] | None = None, comparisons: int = 1
) -> Interval:
    """Spearman's rank correlation of paired values, with a percentile bootstrap over the pairs.

    Args:
        given: a third value for each pair, to hold fixed: the result is the partial correlation of ranks.
        comparisons: the interval is 95% for this many together (Bonferroni).
    """
    columns = (x, y) if given is None else (x, y, given)
    return _bootstrap(_rank_correlation, *columns, comparisons=comparisons)


def excess(x: Sequence[float], other: Sequence[float], y: Sequence[float]) -> Interval:
    """|Spearman(x, y)| - |Spearman(other, y)|, bootstrapped over the same pairs: how much better x ranks y."""

    def difference(x: Any, other: Any, y: Any, axis: int = -1) -> Any:
        return abs(_rank_correlation(x, y, axis=axis)) - abs(_rank_correlation(other, y, axis=axis))

    return _bootstrap(difference, x, other, y)


def variation(values: Sequence[float]) -> Interval:
    """Coefficient of variation, standard deviation over mean, with a percentile bootstrap."""
    return _bootstrap(lambda v, axis=-1: np.std(v, axis=axis, ddof=1) / np.mean(v, axis=axis), values)


def _bootstrap(statistic: Any, *columns: Sequence[float], comparisons: int = 1) -> Interval:
    data = tuple(np.asarray(column, float) for column in columns)
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)  # if a resample has nan, see below
        value = float(statistic(*data))
        if math.isnan(value) or len(data[0]) < _FEWEST:  # all the same, or too few
            return Interval(value, math.nan, math.nan)
        resampled = scipy.stats.bootstrap(
            data, statistic, paired=True, vectorized=True, n_resamples=_RESAMPLES, method="percentile",
            rng=np.random.default_rng(0), batch=500,
        )  # fmt: skip
        tail = (1 - _LEVEL) / comparisons / 2
        tails = [tail, 1 - tail]
        # nan: a resample of pairs that are all the same
        low, high = np.nanquantile(resampled.bootstrap_distribution, tails)
    return Interval(value, float(low), float(high))


def _rank_correlation(x: Any, y: Any, z: Any = None, axis: int = -1) -> Any:
    if z is None:
        return _correlation(scipy.stats.rankdata(x, axis=axis), scipy.stats.rankdata(y, axis=axis), axis)
    xy, xz, yz = (_rank_correlation(*pair, axis=axis) for pair in ((x, y), (x, z), (y, z)))
    return (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))


def _correlation(x: Any, y: Any, axis: int) -> Any:
    x, y = x - x.mean(axis, keepdims=True), y - y.mean(axis, keepdims=True)
    return (x * y).sum(axis) / np.sqrt((x**2).sum(axis) * (y**2).sum(axis))
