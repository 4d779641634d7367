"""Moments of Delta, or its closed form -> scores with standard errors -> sampling weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mrd_ray.mrd.monte_carlo import Moments


@dataclass(frozen=True)
class Score:
    """Both statistics of one sample, each with its standard error; None where the estimator cannot know it.

    mean_abs = E|Delta| (Algorithm 1), first order in sigma. abs_mean = |E Delta| (Definition 3.1), second order in
    sigma: with plain draws its standard error is usually larger than itself, which `abs_mean_se` shows.

    delta_mean, delta_std: mu and s, mean and standard deviation of Delta. From antithetic pairs they come from the even
    and the odd part, each free of the other. nonlinearity: |mu| / s, zero in the small-sigma limit; plain draws would
    show little but their own 1 / sqrt(K).
    """

    mean_abs: float
    mean_abs_se: float | None
    abs_mean: float | None
    abs_mean_se: float | None
    delta_mean: float | None
    delta_std: float | None
    nonlinearity: float | None


_FITTED = 16  # draws from which on the control variate's coefficient is fitted; of fewer it is 1


def monte_carlo_score(moments: Moments, antithetic: bool = False, first_std: float | None = None) -> Score:
    """Score of one sample. Standard errors are those of a mean of independent draws, s / sqrt(K); None for one draw.

    With first_std, sigma |g|, the standard deviation of L, L is the control variate: E|L| = sigma |g| sqrt(2 / pi) and
    E L = 0 are known, so that

        E|Delta| = mean |Delta| - b (mean |L| - E|L|),    E Delta = mean Delta - b mean L

    for any b. b = 1 takes out all that is first order; from 16 draws on it is cov / var of these draws, which is better
    where sigma is large. Antithetic pairs have no first order in their even part, so that E Delta needs no L.
    """
    k = moments.num_draws
    if first_std is None:
        mean_abs, mean_abs_se = _mean(moments.sum_abs, moments.sum_abs_squares, k)
    else:
        of_first = (moments.sum_first_abs, moments.sum_first_squares, moments.sum_abs_products)
        known = first_std * math.sqrt(2 / math.pi)
        mean_abs, mean_abs_se = _controlled(moments.sum_abs, moments.sum_abs_squares, *of_first, known, k)
    if first_std is None or antithetic:
        mean, mean_se = _mean(moments.sum, moments.sum_squares, k)
    else:
        of_first = (moments.sum_first, moments.sum_first_squares, moments.sum_products)
        mean, mean_se = _controlled(moments.sum, moments.sum_squares, *of_first, 0.0, k)
    if first_std is not None and not antithetic:
        # E Delta^2 = E L^2 + mean(Delta^2 - L^2)
        square = first_std**2 + (math.fsum(moments.sum_squares) - math.fsum(moments.sum_first_squares)) / k - mean**2
        s: float | None = math.sqrt(max(square, 0.0))
        nonlinearity = abs(mean) / s if s else None
    elif antithetic:
        s = math.sqrt(math.fsum(moments.sum_odd_squares) / k)
        nonlinearity = abs(mean) / s if s else None
    else:
        s, nonlinearity = None if mean_se is None else mean_se * math.sqrt(k), None
    return Score(mean_abs, mean_abs_se, abs(mean), mean_se, mean, s, nonlinearity)


def closed_form_score(sigma: float, gradient_norm: float, probes: Sequence[float]) -> Score:
    """Score of one sample from |g|, and from probes of mu / sigma^2 if there are any (see `curvature`).

    The folded normal's mean carries the standard error of mu: dE|Delta| / dmu = erf(mu / s sqrt(2)).
    """
    s = sigma * gradient_norm
    if not probes:
        return Score(folded_normal_mean(0.0, s), 0.0, None, None, None, s, None)
    mean, mean_se = _mean([*probes], [probe * probe for probe in probes], len(probes))
    mu, mu_se = sigma**2 * mean, None if mean_se is None else sigma**2 * mean_se
    slope = abs(math.erf(mu / (s * math.sqrt(2)))) if s else 1.0
    mean_abs_se = None if mu_se is None else slope * mu_se
    return Score(folded_normal_mean(mu, s), mean_abs_se, abs(mu), mu_se, mu, s, abs(mu) / s if s else None)


def folded_normal_mean(mu: float, s: float) -> float:
    """E|X| for X ~ Normal(mu, s^2):  s sqrt(2 / pi) exp(-mu^2 / 2s^2) + mu erf(mu / s sqrt(2))."""
    if s == 0:
        return abs(mu)
    return s * math.sqrt(2 / math.pi) * math.exp(-((mu / s) ** 2) / 2) + mu * math.erf(mu / (s * math.sqrt(2)))


def _mean(values: Sequence[float], squares: Sequence[float], k: int) -> tuple[float, float | None]:
    """Mean of k values given parts of their sum and of their sum of squares, and its standard error."""
    mean = math.fsum(values) / k
    if k < 2:
        return mean, None
    variance = math.fsum(squares) / k - mean * mean
    return mean, math.sqrt((0.0 if variance < 0 else variance) / (k - 1))  # a max with 0 would make 0 of nan


def _controlled(
    values: Sequence[float],
    squares: Sequence[float],
    first: Sequence[float],
    first_squares: Sequence[float],
    products: Sequence[float],
    known: float,
    k: int,
) -> tuple[float, float | None]:
    """Mean of k values by a control variate whose mean is known, and its standard error, from parts of their sums."""
    mean, of_first = math.fsum(values) / k, math.fsum(first) / k
    if k < 2:
        return mean - (of_first - known), None
    variance = math.fsum(squares) / k - mean**2
    of_both = math.fsum(products) / k - mean * of_first
    variance_of_first = math.fsum(first_squares) / k - of_first**2
    fitted = k >= _FITTED and variance_of_first > 0
    b = of_both / variance_of_first if fitted else 1.0
    rest = variance - 2 * b * of_both + b * b * variance_of_first
    return mean - b * (of_first - known), math.sqrt((0.0 if rest < 0 else rest) / (k - 1 - fitted))


def sampling_weights(mrd: np.ndarray) -> np.ndarray:
    """Probability of each sample in Algorithm 2, proportional to its MRD: float64 [n], summing to 1.

    Samples without a score (nan) get nan, and so do all if every score is zero: there is nothing to weigh by.
    """
    total = math.fsum(mrd[np.isfinite(mrd)])
    return mrd / total if total else np.full_like(mrd, np.nan)
