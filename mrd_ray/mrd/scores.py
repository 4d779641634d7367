"""Moments of Delta -> scores with standard errors -> sampling weights."""

import math
from dataclasses import dataclass

import numpy as np

from mrd_ray.mrd.monte_carlo import Moments


@dataclass(frozen=True)
class Score:
    """Both statistics of one sample from the same draws, each with its standard error.

    mean_abs = E|Delta| (Algorithm 1), first order in sigma. abs_mean = |E Delta| (Definition 3.1), second order in
    sigma: with plain draws its standard error is usually larger than itself, which `abs_mean_se` shows. A standard
    error is nan with a single draw.
    """

    mean_abs: float
    mean_abs_se: float
    abs_mean: float
    abs_mean_se: float


def score(moments: Moments) -> Score:
    """Score of one sample. The standard error is that of a mean of independent draws, s / sqrt(K)."""
    k = moments.num_draws
    mean_square = math.fsum(moments.sum_squares) / k
    mean_abs = math.fsum(moments.sum_abs) / k
    mean = math.fsum(moments.sum) / k
    return Score(mean_abs, _standard_error(mean_square, mean_abs, k), abs(mean), _standard_error(mean_square, mean, k))


def _standard_error(mean_square: float, mean: float, k: int) -> float:
    if k < 2:
        return math.nan
    return math.sqrt(max(0.0, mean_square - mean * mean) / (k - 1))


def sampling_weights(mrd: np.ndarray) -> np.ndarray:
    """Probability of each sample in Algorithm 2, proportional to its MRD: float64 [n], summing to 1.

    Samples without a score (nan) get nan, and so do all if every score is zero: there is nothing to weigh by.
    """
    total = math.fsum(mrd[np.isfinite(mrd)])
    return mrd / total if total else np.full_like(mrd, np.nan)
