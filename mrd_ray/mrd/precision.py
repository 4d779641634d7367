"""Whether a precision can carry a sigma: rounding can swallow the noise on its way into the weights, or the signal."""

import math
from dataclasses import dataclass

import torch

from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import draw_deltas, draw_seed
from mrd_ray.mrd.noise import add_noise, standard_normal_like
from mrd_ray.mrd.perturb import Replica

# Rounding at 0.3 of the signal's level adds 4% to a score, for it adds in quadrature: as much as 200 draws leave.
_MAX_NOISE = 0.3
MIN_COSINE = 0.99  # between sigma z and what it moves weights by
_LOOKED_AT = 1 << 16  # elements of a weight, to see what rounding leaves of sigma z: a float64 copy costs little
_SMALLER = 64.0  # the noise floor is looked for at sigma over this, where the signal is so much smaller


@dataclass(frozen=True)
class Precision:
    """What becomes of noise of a given sigma.

    share_moved: of the weights (of large ones by the middle), those that differ from the base after theta + sigma z is
    rounded. cosine: between sigma z and what the weights really moved by. noise_floor: root mean square of what
    rounding in the forward adds to Delta (antithetic: to its even part), over that of Delta itself, for the sample that
    fares worst; infinite if the noise changes nothing, or makes it infinite.
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
    """Try out sigma on a few samples; the replica is restored afterwards.

    A few draws are made at sigma and again, with the same z, at a 64th of it. In exact arithmetic, and to first order,
    each second Delta is a 64th of the first; what it differs by is rounding, which does not shrink with sigma. Of
    antithetic draws it is the even part that must stand out, second order in sigma: rounding of the one forward at
    theta is in all of them, and no number of draws averages it out.
    """
    replica.restore()
    theta = [likelihood.log_neg_log_probs(batch)]

    def parts(step: float) -> torch.Tensor:
        (deltas,) = draw_deltas(replica, likelihood, [batch], theta, step, seed, range(draws), antithetic)
        return deltas.mean(2)

    signal, smaller = parts(sigma), parts(sigma / _SMALLER)
    replica.restore()
    moved, cosine = realised(replica, sigma, draw_seed(seed, 0))
    rounding = smaller - signal / _SMALLER ** (2 if antithetic else 1)
    worst = float((rounding.square().mean(1) / signal.square().mean(1)).sqrt().max())  # nan, too, if there is one
    return Precision(moved, cosine, worst if math.isfinite(worst) else math.inf)


def realised(replica: Replica, sigma: float, seed: int) -> tuple[float, float]:
    """Share of weights that sigma z moves, and cosine between sigma z and what they move by.

    By the middle of large weights, and of the parts that this process holds.
    """
    sums = torch.zeros(5, dtype=torch.float64)  # weights, those moved, step z, z z, step step
    for name, base in replica.base.items():
        first = max(0, base.numel() - _LOOKED_AT) // 2
        part, start = base.view(-1)[first : first + _LOOKED_AT], replica.starts[name] + first
        moved = torch.empty_like(part)
        add_noise(moved, part, sigma, seed, name, start)
        step, z = moved.double() - part.double(), standard_normal_like(part, seed, name, start).double()
        of_part = torch.stack([torch.ones_like(z), (step != 0).double(), step * z, z * z, step * step]).sum(1).cpu()
        sums += of_part * (base.numel() / max(1, len(z)))
    count, changed, product, intended, realised = sums.tolist()
    if not count:  # a process may hold no part of few weights; others answer for them
        return 1.0, 1.0
    return changed / count, product / math.sqrt(intended * realised) if realised else 0.0
