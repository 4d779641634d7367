"""A score estimated from each eighth of the draws separately; an eighth is the draws k with the same k mod 8.

Two runs with the same seed perturb the weights in the same way, so their errors are correlated. In the difference of
the two runs, eighth by eighth, the shared error cancels. The spread of the difference over the eighths shows how large
the remaining error is, whatever the runs share, and the draws themselves need not be kept.
"""

import math
from collections.abc import Sequence
from typing import Literal

from mrd_ray.mrd.monte_carlo import EIGHTHS, Moments
from mrd_ray.mrd.scores import Score
from mrd_ray.mrd.standard_errors import total

Statistic = Literal["mean_abs", "abs_mean"]


def of_moments(moments: Moments, score: Score, statistic: Statistic, first_std: float | None) -> list[float] | None:
    """Score from the draws of each eighth, 0 to 7, as far as there are draws; None for a single draw.

    Control variates have the coefficient 1 here. For abs_mean, each eighth's E Delta times the sign of the score's.
    """
    k = moments.num_draws
    if k < 2:
        return None
    sums = moments.abs_by_eighth if statistic == "mean_abs" else moments.mean_by_eighth
    means = [total(of) / len(range(j, k, EIGHTHS)) for j, of in enumerate(sums[:k])]
    if statistic == "mean_abs":
        known = (first_std or 0.0) * math.sqrt(2 / math.pi)
        return [known + mean for mean in means]
    return [math.copysign(1.0, score.delta_mean or 0.0) * mean for mean in means]


def of_probes(sigma: float, score: Score, statistic: Statistic, probes: Sequence[float]) -> list[float] | None:
    """The same from probes of the curvature, to first order in their deviations from the mean; None for a single probe.

    None also if the score has no delta_mean.
    """
    if len(probes) < 2 or score.delta_mean is None:
        return None
    mu, s = score.delta_mean, score.delta_std
    means = [sigma**2 * math.fsum(own) / len(own) for j in range(EIGHTHS) if (own := probes[j::EIGHTHS])]
    if statistic == "abs_mean":
        return [math.copysign(1.0, mu) * mean for mean in means]
    slope = math.erf(mu / (s * math.sqrt(2))) if s else math.copysign(1.0, mu)
    return [score.mean_abs + slope * (mean - mu) for mean in means]
