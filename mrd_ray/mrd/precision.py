"""Whether a precision is enough for a sigma: rounding can erase the noise in the weights, or the scores' signal."""

import math
from dataclasses import dataclass

import torch

from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import draw_deltas, noise_key
from mrd_ray.mrd.noise import add_noise, standard_normal_like
from mrd_ray.mrd.perturb import Replica

# Rounding at 0.3 of the signal's level adds 4% to a score (it adds in quadrature): as much as the error of 200 draws.
_MAX_NOISE = 0.3
MIN_COSINE = 0.99  # between sigma z and the actual change of the weights
_LOOKED_AT = 1 << 16  # elements examined per weight, to see what rounding leaves of sigma z: few enough to copy cheaply
_SMALLER = 64.0  # the noise floor is measured at sigma divided by this, where the signal is this much smaller


@dataclass(frozen=True)
class Precision:
    """What rounding does to noise of a given sigma.

    share_moved: share of the weights that differ from the base after theta + sigma z is rounded (of large weights, only
    the middle is examined). cosine: between sigma z and the actual change of the weights. noise_floor: root mean square
    of what rounding in the forward adds to Delta (antithetic: to its even part), divided by the root mean square of
    Delta itself, for the worst sample. Infinite if the noise changes nothing, or if Delta is infinite.
    """

    share_moved: float
    cosine: float
    noise_floor: float

    @property
    def sufficient(self) -> bool:
        """Whether scores would be more than rounding noise."""
        return self.cosine >= MIN_COSINE and self.noise_floor <= _MAX_NOISE


def examine(
    replica: Replica,
    likelihood: Likelihood,
    batch: MicroBatch,
    sigma: float,
    seed: int,
    antithetic: bool = False,
    draws: int = 4,
) -> Precision:
    """Try sigma on a few samples; the replica is restored afterwards.

    A few draws are made at sigma, and again with the same z at a 64th of sigma. In exact arithmetic, and to first
    order, each second Delta is a 64th of the first. The difference is rounding, which does not shrink with sigma. For
    antithetic draws, the even part must exceed rounding, and it is second order in sigma: the rounding of the single
    forward at theta is in all of them, and no number of draws averages it out.
    """
    replica.restore()
    theta = [likelihood.log_neg_log_probs(batch)]

    def parts(step: float) -> torch.Tensor:
        (deltas,) = draw_deltas(replica, likelihood, [batch], theta, step, seed, range(draws), antithetic)
        return deltas.mean(2)

    signal, smaller = parts(sigma), parts(sigma / _SMALLER)
    replica.restore()
    moved, cosine = realised(replica, sigma, noise_key(seed, 0))
    rounding = smaller - signal / _SMALLER ** (2 if antithetic else 1)
    worst = float((rounding.square().mean(1) / signal.square().mean(1)).sqrt().max())  # nan if any value is nan
    return Precision(moved, cosine, worst if math.isfinite(worst) else math.inf)


def realised(replica: Replica, sigma: float, key: int) -> tuple[float, float]:
    """Share of the weights that sigma z moves, and cosine between sigma z and their actual change.

    Measured on the parts that this process holds, and only in the middle of large weights.
    """
    sums = torch.zeros(5, dtype=torch.float64)  # number of weights, number moved, step z, z z, step step
    for name, base in replica.base.items():
        first = max(0, base.numel() - _LOOKED_AT) // 2
        part, start = base.view(-1)[first : first + _LOOKED_AT], replica.starts[name] + first
        moved = torch.empty_like(part)
        add_noise(moved, part, sigma, key, name, start)
        step, z = moved.double() - part.double(), standard_normal_like(part, key, name, start).double()
        of_part = torch.stack([torch.ones_like(z), (step != 0).double(), step * z, z * z, step * step]).sum(1).cpu()
        sums += of_part * (base.numel() / max(1, len(z)))
    count, changed, product, intended, realised = sums.tolist()
    if not count:  # with few weights, a process may hold no part of them; other processes check those
        return 1.0, 1.0
    return changed / count, product / math.sqrt(intended * realised) if realised else 0.0
