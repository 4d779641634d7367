"""Algorithm 1 of arXiv 2504.06658: Delta_k = sum_t r_t over draws delta_k = sigma z_k, and its moments."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mrd_ray.mrd.first_order import FirstOrders
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.perturb import Replica


def noise_key(seed: int, k: int) -> int:
    """The key of draw k's noise. Runs with different seeds share no key; seed and k must be under 2^32."""
    return seed << 32 | k


def exact_sum(values: Iterable[float]) -> list[float]:
    """The sum without rounding, as a list of floats of decreasing magnitude that add up to it exactly (Shewchuk, 1997).

    Adding such sums is exact too. So a sample's moments have the same bits however its draws were cut into units, and
    in whatever order the units finished. Returns [nan] for non-finite input, or if the sum is too large for a float.

    >>> exact_sum([1e16, 1.0, -1e16])  # adding from the left would return 0.0
    [1.0]
    >>> exact_sum([1.0, 1e-20])
    [1.0, 1e-20]
    """
    rest = list(values)
    parts: list[float] = []
    if not all(map(math.isfinite, rest)):
        return [math.nan]
    try:
        while remainder := math.fsum(rest):
            parts.append(remainder)
            rest.append(-remainder)
    except OverflowError:
        return [math.nan]
    return parts


EIGHTHS = 8  # an eighth: the draws k with the same k mod 8. Runs with the same draws are compared eighth by eighth


@dataclass(frozen=True)
class Moments:
    """Partial moments of Delta for one sample over `num_draws` draws; the sums are `exact_sum`s.

    A plain draw yields Delta. An antithetic draw yields Delta at theta + delta_k and at theta - delta_k: half their sum
    is the even part, half their difference the odd part. A plain draw counts as even, and has no odd part.

    sum_abs, sum_abs_squares: of |Delta|, or of the mean |Delta| of the pair. sum, sum_squares: of the even part.
    sum_odd_squares: of the odd part. The other sums need antithetic draws with L, Delta to first order (see
    `first_order`): of |L|, of its products with |Delta|, and of `smoothed` pairs. They are empty without L.

    abs_by_eighth, mean_by_eighth: for each eighth of the draws, sums that estimate E|Delta| and E Delta: of |Delta|
    minus the control variate |L| (coefficient 1), and of the even part. Eight exact sums each.
    """

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

    @classmethod
    def of(
        cls,
        draws: Sequence[Sequence[float]],
        first: Sequence[float] | None = None,
        first_std: float | None = None,
        first_draw: int = 0,
    ) -> "Moments":
        """Moments of one sample; each draw is [Delta], or [Delta at +delta_k, Delta at -delta_k].

        first: L of each draw, if known; draws must then be pairs. first_std: sigma |g|, the standard deviation of L.
        first_draw: k of the first draw.
        """
        absolute = [math.fsum(map(abs, deltas)) / len(deltas) for deltas in draws]
        even = [math.fsum(deltas) / len(deltas) for deltas in draws]
        odd = [(deltas[0] - deltas[1]) / 2 for deltas in draws if len(deltas) == 2]
        known = first or ()
        smooth: list[float] = []
        of_abs = [a - abs(b) for a, b in zip(absolute, known, strict=True)] if known else absolute
        if first_std:
            of_abs = smooth = [smoothed(*values, first_std) for values in zip(even, odd, known, strict=True)]
        by_eighth = [
            [exact_sum(values[(j - first_draw) % EIGHTHS :: EIGHTHS]) for j in range(EIGHTHS)]
            for values in (of_abs, even)
        ]
        return cls(
            len(draws),
            exact_sum(absolute),
            exact_sum(value * value for value in absolute),
            exact_sum(even),
            exact_sum(value * value for value in even),
            exact_sum(value * value for value in odd),
            exact_sum(value * value for value in known),
            exact_sum(map(abs, known)),
            exact_sum(a * abs(b) for a, b in zip(absolute, known, strict=False)),
            exact_sum(smooth),
            exact_sum(value * value for value in smooth),
            *by_eighth,
        )

    @classmethod
    def merge(cls, parts: Sequence["Moments"]) -> "Moments":
        """Moments of all draws in `parts` together."""

        def by_eighth(name: str) -> list[list[float]]:
            return [
                exact_sum(itertools.chain(*of)) for of in zip(*(getattr(part, name) for part in parts), strict=True)
            ]

        found: dict[str, Any] = {
            name: exact_sum(value for part in parts for value in getattr(part, name)) for name in cls.sums()
        }
        found |= {name: by_eighth(name) for name in ("abs_by_eighth", "mean_by_eighth")}
        return cls(sum(part.num_draws for part in parts), **found)

    @classmethod
    def sums(cls) -> list[str]:
        """Names of the fields that are a single exact sum."""
        return [field.name for field in dataclasses.fields(cls)[1:-2]]


def smoothed(even: float, odd: float, first: float, first_std: float) -> float:
    """One pair's estimate of E|Delta| - E|L|, without the part that is large only in rare draws.

    The mean |Delta| of a pair is max(|O|, |Q|), where O is its odd and Q its even part: it is |O|, except for the draws
    with |L| < |Q|. These add E (|Q| - |O|)+ = E[Q^2 | L = 0] / s sqrt(2 pi) + ..., with s = sigma |g|, from a share
    |Q| / s of all draws. A few draws contain none of them, and look far more certain than they are. Instead, Q^2 of
    every draw has that mean if it is weighted by w(x) = 1 - He_2(x) / 2 + He_4(x) / 8 with x = L / s. For this weight,
    E w(x) p(x) = p(0) for polynomials p of degree 4, and E[Q^2 | L] is such a polynomial for small sigma. So this
    returns |O| - |L| + w Q^2 / s sqrt(2 pi), or, where |Q| is larger than s, the pair's own max(|O|, |Q|) - |L|.
    """
    if abs(even) > first_std:
        return max(abs(odd), abs(even)) - abs(first)
    square = (first / first_std) ** 2
    weight = 1 - (square - 1) / 2 + (square * square - 6 * square + 3) / 8
    return abs(odd) - abs(first) + weight * even * even / (first_std * math.sqrt(2 * math.pi))


def delta(theta: torch.Tensor, perturbed: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Delta of each sample: float64 [B], from log(-P_t) at theta and at theta + delta_k, both float64 [B, T - 1].

    r_t = (P_t(theta) - P_t(theta + delta_k)) / P_t(theta) = -expm1(log(-P_t(theta + delta_k)) - log(-P_t(theta)))
    """
    return torch.where(scored, -torch.expm1(perturbed - theta), 0.0).sum(1)


def draw_deltas(
    replica: Replica,
    likelihood: Likelihood,
    batches: Sequence[MicroBatch],
    theta: Sequence[torch.Tensor],
    sigma: float,
    seed: int,
    draws: range,
    antithetic: bool = False,
    first_order: FirstOrders | None = None,
) -> list[torch.Tensor]:
    """Delta of every sample for every k in `draws`: per batch, float64 [B, len(draws), 1 or 2] on the CPU.

    With `first_order`, the last dimension has one more number: L of the draw.

    Algorithm 1 perturbs the weights again for each sample. Here the loops are swapped: one perturbation serves all
    batches. z depends only on (seed, k), so the numbers are the same.

    Args:
        likelihood: of the replica's model.
        theta: per batch, `likelihood.log_neg_log_probs` of the restored replica.
        antithetic: whether to evaluate theta - delta_k too, as the last dimension's second element.
        first_order: of the replica's model and theta.
    """
    signed = (sigma, -sigma) if antithetic else (sigma,)
    # allocated once at the start: small results kept between a forward's buffers would fragment the heap
    width = len(signed) + (first_order is not None)
    found = [torch.empty(len(batch.scored), len(draws), width, dtype=torch.float64) for batch in batches]
    for column, k in enumerate(draws):
        for sign, step in enumerate(signed):
            replica.perturb(step, noise_key(seed, k))
            for deltas, batch, at_theta in zip(found, batches, theta, strict=True):
                deltas[:, column, sign] = delta(at_theta, likelihood.log_neg_log_probs(batch), batch.scored)
            if first_order is not None and sign == 0:
                moved_by = replica.step()
                for deltas, batch in zip(found, batches, strict=True):
                    deltas[:, column, -1] = first_order(batch, replica.base, moved_by)
    return found
