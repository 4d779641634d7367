"""Algorithm 1 of arXiv 2504.06658: Delta_k = sum_t r_t over draws delta_k = sigma z_k, and its moments."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mrd_ray.mrd.first_order import FirstOrder
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.perturb import Replica


def draw_seed(seed: int, k: int) -> int:
    """The noise seed of draw k: runs with different `seed` (both under 2^32) share no draw."""
    return seed << 32 | k


def exact_sum(values: Iterable[float]) -> list[float]:
    """The sum without rounding, as floats of falling magnitude whose exact sum it is (Shewchuk, 1997).

    Adding such sums up is exact too. So moments of a sample come out with the same bits however its draws were
    cut into units and in whatever order those finished. Non-finite input, or a sum beyond all floats, gives [nan].
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


@dataclass(frozen=True)
class Moments:
    """Partial moments of Delta for one sample over `num_draws` draws; the sums are `exact_sum`s.

    A plain draw gives Delta. An antithetic one gives Delta at theta + delta_k and at theta - delta_k: their half sum is
    the even part, their half difference the odd one. A plain draw counts as even, and has no odd part.

    sum_abs, sum_abs_squares: of |Delta|, or of the mean |Delta| of the pair. sum, sum_squares: of the even part.
    sum_odd_squares: of the odd part. The others are of L, what Delta is to first order (see `first_order`), and of its
    products with |Delta| and the even part; empty if there is no L.
    """

    num_draws: int
    sum_abs: list[float]
    sum_abs_squares: list[float]
    sum: list[float]
    sum_squares: list[float]
    sum_odd_squares: list[float]
    sum_first: list[float]
    sum_first_squares: list[float]
    sum_first_abs: list[float]
    sum_abs_products: list[float]
    sum_products: list[float]

    @classmethod
    def of(cls, draws: Sequence[Sequence[float]], first: Sequence[float] | None = None) -> "Moments":
        """Moments of one sample, whose draws are [Delta] each, or [Delta at +delta_k, Delta at -delta_k].

        first: L of each draw, if it is known.
        """
        absolute = [math.fsum(map(abs, deltas)) / len(deltas) for deltas in draws]
        even = [math.fsum(deltas) / len(deltas) for deltas in draws]
        odd = [(deltas[0] - deltas[1]) / 2 for deltas in draws if len(deltas) == 2]
        known = first or ()
        return cls(
            len(draws),
            exact_sum(absolute),
            exact_sum(value * value for value in absolute),
            exact_sum(even),
            exact_sum(value * value for value in even),
            exact_sum(value * value for value in odd),
            exact_sum(known),
            exact_sum(value * value for value in known),
            exact_sum(map(abs, known)),
            exact_sum(a * abs(b) for a, b in zip(absolute, known, strict=False)),
            exact_sum(a * b for a, b in zip(even, known, strict=False)),
        )

    @classmethod
    def merge(cls, parts: Sequence["Moments"]) -> "Moments":
        """Moments of all the draws of `parts` together."""
        sums = [field.name for field in dataclasses.fields(cls)[1:]]
        return cls(
            sum(part.num_draws for part in parts),
            *(exact_sum(value for part in parts for value in getattr(part, name)) for name in sums),
        )


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
    first_order: FirstOrder | None = None,
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
