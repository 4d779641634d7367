"""Monte Carlo's control variate, and L itself, for models that they are right for."""

from collections.abc import Collection
from typing import NamedTuple

from transformers import PreTrainedModel

from mrd_ray.config import ScoringConfig
from mrd_ray.errors import UserError
from mrd_ray.mrd.autograd_check import agrees, disagreements
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.first_order import FirstOrder
from mrd_ray.mrd.monte_carlo import draw_seed
from mrd_ray.mrd.perturb import Replica
from mrd_ray.scoring.memory import activation_bytes, out_of_memory


class Control(NamedTuple):
    """What a control variate needs: |g| of every sample, and L of every draw."""

    norms: GradientNorms
    first_order: FirstOrder

    @classmethod
    def of(
        cls, replica: Replica, model: PreTrainedModel, selected: Collection[str], scoring: ScoringConfig
    ) -> "Control":
        """Of a model that it is right for, which is tried out. Raises UserError, which says why there is none."""
        if replica.sharded:
            raise UserError("scoring.control_variate: none where weights are spread over processes")
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
        try:
            return cls(norms, first_order_of(replica, norms, scoring))
        except UserError as problem:
            raise UserError(f"scoring.control_variate: {problem}") from problem


def disagreements_of(norms: GradientNorms, setting: str) -> list[str]:
    """As `autograd_check.disagreements`. Raises UserError if the model's gradients cannot be made at all."""
    try:
        return disagreements(norms)
    except Exception as problem:  # each architecture objects to being listened to in a way of its own
        if isinstance(problem, RuntimeError) and out_of_memory(problem):
            raise
        reason = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
        raise UserError(
            f"{setting} cannot differentiate {type(norms.model).__name__} (model type "
            f"{norms.model.config.model_type}) by layers ({reason}); use plain monte_carlo, and report the model"
        ) from problem


def first_order_of(replica: Replica, norms: GradientNorms, scoring: ScoringConfig) -> FirstOrder:
    """What gives L, tried out on the replica, which is restored. Raises UserError, which says why there is none."""
    replica.perturb(scoring.sigma, draw_seed(scoring.seed, 0))
    step = replica.step()
    replica.restore()
    first_order = FirstOrder(norms.model, norms.parameters)
    try:
        right = agrees(first_order, norms.parameters, step)
    except RuntimeError as problem:  # NotImplementedError is one
        if out_of_memory(problem):
            raise
        reason = str(problem).splitlines()[0]
        raise UserError(f"torch has no forward mode for this model ({reason})") from problem
    if not right:
        raise UserError("torch's forward mode does not agree with autograd on this model")
    return first_order
