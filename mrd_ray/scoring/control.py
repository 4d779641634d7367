"""Monte Carlo's control variate, and L itself, for models where they are valid."""

import functools
from collections.abc import Collection
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from mrd_ray.config import ScoringSettings
from mrd_ray.errors import UserError
from mrd_ray.mrd.autograd import along
from mrd_ray.mrd.autograd_check import agrees, disagreements
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.first_order import FirstOrder, FirstOrders, Weights
from mrd_ray.mrd.likelihood import MicroBatch
from mrd_ray.mrd.monte_carlo import noise_key
from mrd_ray.mrd.perturb import Replica
from mrd_ray.workers.memory import activation_bytes, out_of_memory


class Control(NamedTuple):
    """What a control variate needs: |g| of every sample, and L of every draw. note: why L is slow, or None."""

    norms: GradientNorms
    first_order: FirstOrders
    note: str | None

    @classmethod
    def of(
        cls, replica: Replica, model: PreTrainedModel, selected: Collection[str], scoring: ScoringSettings
    ) -> "Control":
        """The control variate of a model, tested to be valid there. Raises UserError with the reason if it is not."""
        if replica.sharded:
            raise UserError("scoring.control_variate: not available where weights are spread over processes")
        norms = GradientNorms(model, selected, activation_bytes(model, scoring))
        if norms.coverage.slow and not scoring.allow_slow_parameters:
            raise UserError(
                f"scoring.control_variate: no rule covers {norms.coverage.slow[0]} (scoring.allow_slow_parameters)"
            )
        if wrong := disagreements_of(norms, "scoring.control_variate"):
            if not scoring.allow_slow_parameters:
                raise UserError(
                    f"scoring.control_variate: gradient norms do not agree with autograd, first {wrong[0]} "
                    "(scoring.allow_slow_parameters)"
                )
            norms.give_up_rules(wrong)
        return cls(norms, *first_order_of(replica, norms, scoring))


def disagreements_of(norms: GradientNorms, setting: str) -> list[str]:
    """Like `autograd_check.disagreements`. Raises UserError if the model cannot be differentiated by layers at all."""
    try:
        return disagreements(norms)
    except Exception as problem:  # architectures fail in many ways when their layers are tapped
        if isinstance(problem, RuntimeError) and out_of_memory(problem):
            raise
        reason = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
        raise UserError(
            f"{setting} cannot differentiate {type(norms.model).__name__} (model type "
            f"{norms.model.config.model_type}) by layers ({reason}); use plain monte_carlo, and report the model"
        ) from problem


class ByAutograd:
    """L of a few samples, computed one by one. squares: their |g|^2."""

    def __init__(self, norms: GradientNorms) -> None:
        self._norms = norms
        self.squares: list[float] = []

    def __call__(self, batch: MicroBatch, theta: Weights, step: Weights) -> torch.Tensor:
        """-g . step at theta: float64 [B]."""
        found = []
        for row in range(len(batch.token_ids)):
            alone = MicroBatch(batch.token_ids[row : row + 1], batch.scored[row : row + 1])
            found.append(along(self._norms.model, theta, functools.partial(self._norms.objective, alone), step))
        self.squares = [square for _, square in found]
        return -torch.tensor([value for value, _ in found], dtype=torch.float64)


def first_order_of(replica: Replica, norms: GradientNorms, scoring: ScoringSettings) -> tuple[FirstOrders, str | None]:
    """A function that returns L, and a note if it is slow. Forward mode is tested on the replica, which is restored."""
    replica.perturb(scoring.sigma, noise_key(scoring.seed, 0))
    step = replica.step()
    replica.restore()
    first_order = FirstOrder(norms.model, norms.parameters)
    why = "torch's forward mode does not agree with autograd on this model"
    try:
        if agrees(first_order, norms.parameters, step):
            return first_order, None
    except RuntimeError as problem:  # NotImplementedError is one
        if out_of_memory(problem):
            raise
        why = f"torch has no forward mode for this model ({str(problem).splitlines()[0]})"
    return ByAutograd(norms), f"The control variate is slow, because it is computed sample by sample: {why}"
