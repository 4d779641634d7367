"""From moments of Delta, or its closed form, to scores with standard errors, to sampling weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mrd_ray.mrd.monte_carlo import Moments
from mrd_ray.mrd.standard_errors import COVERAGE, minus, of_half_normal, of_mean, regression, student, total


@dataclass(frozen=True)
class Score:
    """Both statistics of one sample, each with its standard error; None where the estimator cannot know a value.

    95% of scores are within two standard errors of the truth, however few the draws (see `standard_errors`).

    mean_abs = E|Delta| (Algorithm 1), first order in sigma. abs_mean = |E Delta| (Definition 3.1), second order in
    sigma: with plain draws, its standard error `abs_mean_se` is usually larger than the value itself.

    delta_mean, delta_std: mu and s, the mean and standard deviation of Delta. With antithetic pairs, they come from the
    even and the odd part, so that neither affects the other. nonlinearity: |mu| / s, zero in the small-sigma limit;
    None for plain draws, which would show little except their own 1 / sqrt(K).
    """

    mean_abs: float
    mean_abs_se: float | None
    abs_mean: float | None
    abs_mean_se: float | None
    delta_mean: float | None
    delta_std: float | None
    nonlinearity: float | None


_FITTED = 16  # with this many draws or more, the control variate's coefficient is fitted; with fewer it is 1
_SMOOTH = 0.1  # antithetic pairs are `smoothed` while the even part is at most this share of the first order


def monte_carlo_score(moments: Moments, antithetic: bool = False, first_std: float | None = None) -> Score:
    """Score of one sample. Standard errors are calibrated (see `standard_errors`), and None for one draw.

    With first_std = sigma |g|, the standard deviation of L, draws are antithetic pairs with L as control variate.
    E|L| = sigma |g| sqrt(2 / pi) is known, so that

        E|Delta| = E|L| + E(|Delta| - |L|)

    which is unbiased for every sigma. Where the even part is small compared with L, pairs are `smoothed`. Elsewhere,
    with 16 draws or more, the coefficient of |L| is fitted by least squares. E Delta needs no L: the even part has no
    first order.
    """
    k = moments.num_draws
    if first_std:
        mean_abs, mean_abs_se = _controlled(moments, first_std)
    else:
        mean_abs = total(moments.sum_abs) / k
        mean_abs_se = of_half_normal(total(moments.sum_abs), total(moments.sum_abs_squares), k)
    mean, mean_se = _mean(total(moments.sum), total(moments.sum_squares), k)
    if antithetic:
        s: float | None = math.sqrt(total(moments.sum_odd_squares) / k)
        nonlinearity = abs(mean) / s if s else None
    else:
        s, nonlinearity = None if mean_se is None else mean_se / student(k - 1) * math.sqrt(k), None
    return Score(mean_abs, mean_abs_se, abs(mean), mean_se, mean, s, nonlinearity)


def with_flips(score: Score, flip_squares: float | None, k: int) -> Score:
    """The score, with standard errors that also allow for choices that sigma may flip, which k draws may have missed.

    flip_squares: what flips add to E Delta^2 (see `choices`); divided by k, it is their part of a mean's variance.
    Infinite if unknown, and then the standard errors are None.
    """
    if not flip_squares:
        return score
    if not math.isfinite(flip_squares):
        return replace(score, mean_abs_se=None, abs_mean_se=None)
    least = math.sqrt(flip_squares / k)

    def at_least(se: float | None) -> float | None:
        return None if se is None else max(se, least)

    return replace(score, mean_abs_se=at_least(score.mean_abs_se), abs_mean_se=at_least(score.abs_mean_se))


def _controlled(moments: Moments, first_std: float) -> tuple[float, float | None]:
    """E|Delta| from the control variate, and its standard error."""
    k, known = moments.num_draws, first_std * math.sqrt(2 / math.pi)
    if moments.sum_smooth_squares and total(moments.sum_squares) <= k * (_SMOOTH * first_std) ** 2:
        mean, se = _mean(total(moments.sum_smooth), total(moments.sum_smooth_squares), k)
        return known + mean, se
    rest = total(moments.sum_abs, minus(moments.sum_first_abs))
    if k >= _FITTED:
        first_abs, first_squares = total(moments.sum_first_abs), total(moments.sum_first_squares)
        products = [rest, total(moments.sum_abs_products, minus(moments.sum_first_squares))]
        gram = [[k, first_abs], [first_abs, first_squares]]
        if found := regression(gram, products, _squares_of_rest(moments), [1.0, known], k):
            return known + found[0], found[1]
    mean, se = _mean(rest, _squares_of_rest(moments), k)
    return known + mean, se


def _squares_of_rest(moments: Moments) -> float:
    """Sum of (|Delta| - |L|)^2."""
    return total(moments.sum_abs_squares, minus(moments.sum_abs_products, 2.0), moments.sum_first_squares)


def _mean(values: float, squares: float, k: int) -> tuple[float, float | None]:
    return values / k, of_mean(values, squares, k)


def closed_form_score(sigma: float, gradient_norm: float, probes: Sequence[float]) -> Score:
    """Score of one sample from |g|, and from probes of mu / sigma^2 if there are any (see `curvature`).

    Without probes, mean_abs has no sampling error: its standard error is 0, which says nothing about higher orders.
    """
    s = sigma * gradient_norm
    if not probes:
        return Score(folded_normal_mean(0.0, s), 0.0, None, None, None, s, None)
    k, total_of = len(probes), math.fsum(probes)
    squares = math.fsum(probe * probe for probe in probes)
    mu = sigma**2 * total_of / k
    mu_se = of_mean(sigma**2 * total_of, sigma**4 * squares, k)
    mean_abs_se = None if mu_se is None else _folded_se(mu, mu_se, s, sigma**2 * math.sqrt(squares / k), k)
    return Score(folded_normal_mean(mu, s), mean_abs_se, abs(mu), mu_se, mu, s, abs(mu) / s if s else None)


def _folded_se(mu: float, mu_se: float, s: float, even: float, k: int) -> float:
    """Standard error of the folded normal's mean, from mu and mu_se of k probes: sampling error and neglected terms.

    The mean increases with |mu|, so the end of mu's interval bounds its error. Where that interval contains zero, only
    the upper end does, and a one-sided quantile is used. The neglected terms, the third derivative and the spread of
    the even part, are of the same order sigma^3 as mu^2 / s. They are about as large as what the even part adds: 0.8 of
    that was the root mean square measured on small models. The factor (1 + 4 / k) is there because a few probes may all
    be small.

    Args:
        even: root mean square of the even part of Delta, estimated from the probes.
    """
    reach = 2 * mu_se
    if abs(mu) < reach:
        reach *= student(k - 1, 2 * COVERAGE - 1) / student(k - 1)
    sampling = (folded_normal_mean(abs(mu) + reach, s) - folded_normal_mean(mu, s)) / 2
    left_out = 0.8 * (1 + 4 / k) * (folded_normal_mean(even, s) - folded_normal_mean(0.0, s))
    return math.hypot(sampling, left_out)


def folded_normal_mean(mu: float, s: float) -> float:
    """E|X| for X ~ Normal(mu, s^2):  s sqrt(2 / pi) exp(-mu^2 / 2s^2) + mu erf(mu / s sqrt(2)).

    >>> folded_normal_mean(-3.0, 0.0)
    3.0
    >>> round(folded_normal_mean(0.0, 1.0), 6)  # sqrt(2 / pi)
    0.797885
    """
    if s == 0:
        return abs(mu)
    return s * math.sqrt(2 / math.pi) * math.exp(-((mu / s) ** 2) / 2) + mu * math.erf(mu / (s * math.sqrt(2)))


def sampling_weights(mrd: np.ndarray) -> np.ndarray:
    """Probability of each sample in Algorithm 2, proportional to its MRD: float64 [n], summing to 1.

    Samples without a score (nan) get nan. If every score is zero, all samples get nan: there is nothing to weight by.
    """
    total = math.fsum(mrd[np.isfinite(mrd)])
    return mrd / total if total else np.full_like(mrd, np.nan)
