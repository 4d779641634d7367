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


def draw_seed(seed: int, k: int) -> int:
    """The noise seed of draw k: runs with different `seed` (both under 2^32) share no draw."""
    return seed << 32 | k


def exact_sum(values: Iterable[float]) -> list[float]:
    """The sum without rounding, as floats of falling magnitude whose exact sum it is (Shewchuk, 1997).

    Adding such sums up is exact too. So moments of a sample come out with the same bits however its draws were
    cut into units and in whatever order those finished. Non-finite input, or a sum beyond all floats, gives [nan].

    >>> exact_sum([1e16, 1.0, -1e16])  # 0.0 if added up from the left
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


EIGHTHS = 8  # the draws k with the same k mod 8: two runs' draws are paired by them where these are the same draws


@dataclass(frozen=True)
class Moments:
    """Partial moments of Delta for one sample over `num_draws` draws; the sums are `exact_sum`s.

    A plain draw gives Delta. An antithetic one gives Delta at theta + delta_k and at theta - delta_k: their half sum is
    the even part, their half difference the odd one. A plain draw counts as even, and has no odd part.

    sum_abs, sum_abs_squares: of |Delta|, or of the mean |Delta| of the pair. sum, sum_squares: of the even part.
    sum_odd_squares: of the odd part. The others are of antithetic draws with L, what Delta is to first order (see
    `first_order`): of |L|, of its products with |Delta|, and of `smoothed` pairs; empty if there is no L.

    abs_by_eighth, mean_by_eighth: sums of what the draws of each eighth tell of E|Delta|, and of E Delta: what is left
    of |Delta| by the control variate |L|, times 1, and the even part. Eight exact sums each.
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
        """Moments of one sample, whose draws are [Delta] each, or [Delta at +delta_k, Delta at -delta_k].

        first: L of each draw, which must be a pair, if it is known. first_std: sigma |g|, its standard deviation.
        first_draw: k of the first.
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
        """Moments of all the draws of `parts` together."""

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
        """Names of the fields that are one exact sum."""
        return [field.name for field in dataclasses.fields(cls)[1:-2]]


def smoothed(even: float, odd: float, first: float, first_std: float) -> float:
    """What a pair tells of E|Delta| - E|L|, freed of what is large in rare draws alone.

    The mean |Delta| of a pair is max(|O|, |Q|) for its odd and even part: |O|, but for the draws with |L| < |Q|. These
    add E (|Q| - |O|)+ = E[Q^2 | L = 0] / s sqrt(2 pi) + ..., s = sigma |g|, from a share |Q| / s of all draws: a few
    draws have none of them, and look far more certain than they are. Q^2 of each draw has that mean if it is weighed by
    w(x) = 1 - He_2(x) / 2 + He_4(x) / 8, x = L / s, for which E w(x) p(x) = p(0) for polynomials p of degree 4, as
    E[Q^2 | L] is for small sigma. So this is |O| - |L| + w Q^2 / s sqrt(2 pi); where |Q| is over s, the pair's own.
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

    With `first_order` there is one number more in the last dimension: L of the draw.

    The loops are turned inside out against Algorithm 1, which perturbs anew for each sample: one perturbation
    serves all batches. Since z depends on (seed, k) alone, the numbers are the same.

    Args:
        likelihood: of the replica's model.
        theta: per batch, `likelihood.log_neg_log_probs` of the restored replica.
        antithetic: whether to evaluate theta - delta_k too, the last dimension's second element.
        first_order: of the replica's model and theta.
    """
    signed = (sigma, -sigma) if antithetic else (sigma,)
    # in place from the beginning: small results kept among a forward's buffers would take the heap apart
    width = len(signed) + (first_order is not None)
    found = [torch.empty(len(batch.scored), len(draws), width, dtype=torch.float64) for batch in batches]
    for column, k in enumerate(draws):
        for sign, step in enumerate(signed):
            replica.perturb(step, draw_seed(seed, k))
            for deltas, batch, at_theta in zip(found, batches, theta, strict=True):
                deltas[:, column, sign] = delta(at_theta, likelihood.log_neg_log_probs(batch), batch.scored)
            if first_order is not None and sign == 0:
                moved_by = replica.step()
                for deltas, batch in zip(found, batches, strict=True):
                    deltas[:, column, -1] = first_order(batch, replica.base, moved_by)
    return found
