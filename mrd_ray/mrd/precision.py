"""Whether a precision can carry a sigma: rounding can swallow the noise on its way into the weights, or the signal."""

import math
from dataclasses import dataclass

from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import draw_deltas, draw_seed
from mrd_ray.mrd.noise import standard_normal_like
from mrd_ray.mrd.perturb import Replica

# Rounding at 0.3 of the signal's level adds 4% to a score, for it adds in quadrature: as much as 200 draws leave.
_MAX_NOISE = 0.3
_MIN_COSINE = 0.99
_SMALLER = 64.0  # the noise floor is looked for at sigma over this, where the signal is so much smaller


@dataclass(frozen=True)
class Precision:
    """What becomes of noise of a given sigma.

    share_moved: of the weights, those that differ from the base after theta + sigma z is rounded. cosine: between
    sigma z and what the weights really moved by. noise_floor: root mean square of what rounding in the forward adds to
    Delta, over that of Delta itself, for the sample that fares worst; infinite if the noise changes nothing.
    """

    share_moved: float
    cosine: float
    noise_floor: float

    @property
    def sufficient(self) -> bool:
        """Whether scores would be more than rounding noise."""
        return self.cosine >= _MIN_COSINE and self.noise_floor <= _MAX_NOISE

    def sigma_needed(self, sigma: float) -> float:
        """A sigma, a power of ten, that rounding would leave ample room for: its share falls as sigma rises."""
        angle = math.acos(min(1.0, max(0.01, self.cosine)))
        noise = min(self.noise_floor, 100.0)  # infinite where nothing moves: suggest a step, not the whole way
        factor = max(1.0, noise / _MAX_NOISE, math.tan(angle) / math.tan(math.acos(_MIN_COSINE)))
        return float(10.0 ** math.ceil(math.log10(sigma * 3 * factor) - 1e-9))


def examine(
    replica: Replica, likelihood: Likelihood, batch: MicroBatch, sigma: float, seed: int, draws: int = 4
) -> Precision:
    """Try out sigma on a few samples; the replica is restored afterwards.

    A few draws are made at sigma and again, with the same z, at a 64th of it. In exact arithmetic, and to first order,
    each second Delta is a 64th of the first; what it differs by is rounding, which does not shrink with sigma.
    """
    replica.restore()
    theta = [likelihood.log_neg_log_probs(batch)]
    (signal,) = draw_deltas(replica, likelihood, [batch], theta, sigma, seed, range(draws))
    (smaller,) = draw_deltas(replica, likelihood, [batch], theta, sigma / _SMALLER, seed, range(draws))
    moved, cosine = _realised(replica, sigma, draw_seed(seed, 0))
    replica.restore()
    floors = (smaller - signal / _SMALLER).square().mean((1, 2)) / signal.square().mean((1, 2))
    worst = float(floors.sqrt().max())  # nan, too, if there is one
    return Precision(moved, cosine, worst if worst == worst else math.inf)


def _realised(replica: Replica, sigma: float, seed: int) -> tuple[float, float]:
    """Share of weights moved, and cosine between what they should move by and do."""
    replica.perturb(sigma, seed)
    count, moved = 0, 0
    product, intended, realised = 0.0, 0.0, 0.0
    for name, tensor in replica.working.items():
        step = (tensor.double() - replica.base[name].double()).flatten()
        z = standard_normal_like(tensor, seed, name).flatten().double()
        count, moved = count + len(step), moved + int((step != 0).sum())
        product += float(step @ z)
        intended += float(z @ z)
        realised += float(step @ step)
    return moved / count, product / math.sqrt(intended * realised) if realised else 0.0
