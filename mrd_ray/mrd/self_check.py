"""Checks the closed form against draws: compares Delta_k, the effect of sigma z_k on a sample, with its prediction L_k.

The closed form assumes that Delta is L + mu. Both share a draw's noise, so a few draws show how wrong that is: where
the model has jumps or kinks, where a rule is wrong, or where something is cast to too few bits. It also looks for
choices that sigma can flip (see `choices`), because a few draws may miss one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from mrd_ray.mrd.choices import Choices, Gaps, Reach
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.first_order import FirstOrders
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import delta, noise_key
from mrd_ray.mrd.perturb import Replica

_OFF = 0.3  # in units of s: then the part of Delta that L does not predict adds 4% to a score, in quadrature
_TAIL = 4.5  # standard deviations; a normal Delta is farther out in 7 of a million draws
_FLIPS = 0.001  # share of a score


class Finding(NamedTuple):
    """What the draws show about one sample.

    deltas: Delta_k / s. first: L_k / s, empty if unknown. flips: what flips of choices add, as a share of its score.
    flip_squares: what they add to E Delta^2.
    """

    deltas: list[float]
    first: list[float]
    flips: float
    flip_squares: float

    def off(self, mu: float = 0.0) -> float:
        """Root mean square of Delta_k - L_k - mu, divided by s. mu: the mean of Delta, divided by s."""
        return math.sqrt(sum((d - f - mu) ** 2 for d, f in zip(self.deltas, self.first, strict=True)) / len(self.first))

    def differs(self, mu: float = 0.0) -> bool:
        """Whether the draws differ from what the gradient predicts."""
        return bool(self.first) and not self.off(mu) <= _OFF

    def doubt(self, mu: float = 0.0) -> str | None:
        """Why the closed form should not be trusted, or None."""
        if self.flips > _FLIPS:
            return "sigma can flip a choice inside the model, such as of experts, that its score depends on"
        if self.differs(mu):
            return f"draws differ from what its gradient foretells by {self.off(mu):.2g} of their standard deviation"
        if not self.first and not max(abs(d - mu) for d in self.deltas) <= _TAIL:
            return "a draw is farther out than its gradient allows for"
        return None


class SelfCheck:
    """Findings for samples whose gradient norms are known. The model is at theta before and after.

    Args:
        norms: of the replica's model.
        first_order: returns L, as `FirstOrder` does; None if L cannot be computed: then only draws far out are found.
        choices: whether to look for choices within reach.
        exact: whether to compute from `norms` how far sigma moves a choice, which needs the whole weights.
    """

    def __init__(
        self,
        replica: Replica,
        likelihood: Likelihood,
        norms: GradientNorms,
        first_order: FirstOrders | None,
        sigma: float,
        seed: int,
        draws: int,
        choices: bool,
        exact: bool,
    ) -> None:
        self._replica, self.likelihood, self._norms, self._first_order = replica, likelihood, norms, first_order
        self._sigma, self._seed, self._draws = sigma, seed, draws
        self._choices, self._exact = choices, exact

    def __call__(
        self, batches: Sequence[MicroBatch], theta: Sequence[torch.Tensor], norms: Sequence[Sequence[float]]
    ) -> list[list[Finding]]:
        """Findings by batch. theta: log(-P_t). norms: |g|."""
        reaches = [Reach(batch.scored, self._at(batch)[1]) for batch in batches] if self._choices else []
        values: list[list[list[float]]] = [[[] for _ in of_batch] for of_batch in norms]
        first: list[list[list[float]]] = [[[] for _ in of_batch] for of_batch in norms]
        try:
            for k in range(self._draws):
                self._replica.perturb(self._sigma, noise_key(self._seed, k))
                for i, (batch, at_theta) in enumerate(zip(batches, theta, strict=True)):
                    perturbed, gaps = self._at(batch)
                    if reaches:
                        reaches[i].draw(gaps)
                    _append(values[i], delta(at_theta, perturbed, batch.scored))
                    if self._first_order is not None:
                        _append(first[i], self._first_order(batch, self._replica.base, self._replica.step()))
        finally:
            self._replica.restore()
        none = [[[0.0, 0.0] for _ in of_batch] for of_batch in norms]
        flips = [self._flips(*one) for one in zip(reaches, batches, theta, strict=True)] if reaches else none
        deviations = [[self._sigma * norm for norm in of_batch] for of_batch in norms]
        return [
            [
                Finding(_over(d, s), _over(f, s), _share(once, s), twice)
                for d, f, (once, twice), s in zip(*of_batch, strict=True)
            ]
            for of_batch in zip(values, first, flips, deviations, strict=True)
        ]

    def _at(self, batch: MicroBatch) -> tuple[torch.Tensor, Gaps]:
        """log(-P_t) under the current weights, and the gaps of choices."""
        if not self._choices:
            return self.likelihood.log_neg_log_probs(batch), {}
        with Choices(positions=batch.token_ids.numel()) as heard:
            return self.likelihood.log_neg_log_probs(batch), heard.gaps()

    def _flips(self, reach: Reach, batch: MicroBatch, theta: torch.Tensor) -> list[list[float]]:
        """What flips add to each sample's E|Delta| and E Delta^2."""

        def jumps(flips: Gaps) -> torch.Tensor:
            with Choices(flips, batch.token_ids.numel()):
                return delta(theta, self.likelihood.log_neg_log_probs(batch), batch.scored)

        def deviations(flips: Gaps) -> torch.Tensor:
            return self._sigma * self._norms.of_gaps(batch, flips)

        whole = not self._norms.coverage.slow
        return reach.effect(jumps, deviations if self._exact else None, whole).tolist()


def has_choices(model: PreTrainedModel, token_ids: torch.Tensor) -> bool:
    """Whether a forward makes discrete choices among numbers that depend on the tokens [B, T] (masks do not)."""
    both = []
    for tokens in (token_ids, torch.where(token_ids > 0, token_ids - 1, 1)):  # the second replaces every token
        with torch.no_grad(), Choices(positions=token_ids.numel()) as heard:
            model.base_model(tokens, use_cache=False)
            both.append(heard.gaps())
    a, b = both
    return a.keys() != b.keys() or any(((a[turn] != b[turn]) & a[turn].isfinite()).any() for turn in a)


def _append(lists: list[list[float]], values: torch.Tensor) -> None:
    for one, value in zip(lists, values.tolist(), strict=True):
        one.append(value)


def _over(values: list[float], s: float) -> list[float]:
    return [value / s if s else math.copysign(math.inf, value) if value else 0.0 for value in values]


def _share(flips: float, s: float) -> float:
    return flips / (s * math.sqrt(2 / math.pi)) if s else math.inf if flips else 0.0
