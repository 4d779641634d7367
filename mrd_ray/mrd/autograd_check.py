"""Checks the rules of the closed form against autograd, on the model to be scored and two short samples.

A layer may look like one that a rule knows, but scale its weights, be called twice, or mix samples. Its norms would
look right and be wrong. So this check runs once, before any sample is scored.
"""

import functools
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from mrd_ray.mrd.autograd import along, square_norms
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.first_order import FirstOrder, Weights
from mrd_ray.mrd.likelihood import MicroBatch, log_neg_log_prob

_SAMPLES = [[1, 2, 3, 4, 2, 3], [4, 1, 1, 3]]


def disagreements(norms: GradientNorms) -> list[str]:
    """Names of the parameters whose share of |g|^2 differs from autograd's."""
    model = norms.model
    everything = [[True] * len(sample) for sample in _SAMPLES]
    _, found = norms.by_parameter(MicroBatch.collate(_SAMPLES, everything, model.device))

    expected = [
        square_norms(model, norms.parameters, functools.partial(_objective, model, sample)) for sample in _SAMPLES
    ]
    totals = torch.tensor([sum(squares.values()) for squares in expected], dtype=torch.float64)
    tolerance = 0.1 if model.dtype == torch.bfloat16 else 1e-2
    wrong = []
    for name, squares in found.items():
        right = torch.tensor([of_sample[name] for of_sample in expected], dtype=torch.float64)
        ours = squares.cpu()
        # some gradients are zero except for rounding, for example of key biases
        holds = (ours - right).abs() <= tolerance * right + 1e-6 * totals
        unseen = (ours == 0) & (right > 1e-12 * totals)  # the weight is used without calling its layer
        if not (holds & ~unseen).all():
            wrong.append(name)
    return wrong


def agrees(first_order: FirstOrder, parameters: Mapping[str, torch.nn.Parameter], step: Weights) -> bool:
    """Whether L along this step, computed in forward mode, agrees with autograd; the model is at theta."""
    model = first_order.model
    everything = [[True] * len(sample) for sample in _SAMPLES]
    theta = {name: parameter.detach() for name, parameter in parameters.items()}
    found = first_order(MicroBatch.collate(_SAMPLES, everything, model.device), theta, step).tolist()
    for sample, value in zip(_SAMPLES, found, strict=True):
        of_sample = functools.partial(_objective, model, sample)
        expected, square = along(model, parameters, of_sample, step)
        size, length = square**0.5, sum(float(delta.double().square().sum()) for delta in step.values()) ** 0.5
        count = sum(parameter.numel() for parameter in parameters.values()) ** 0.5
        if (
            not abs(value + expected) <= 1e-2 * size * length / count
        ):  # L has a standard deviation of |g| |delta| / sqrt(n)
            return False
    return True


def _objective(model: PreTrainedModel, sample: list[int]) -> torch.Tensor:
    """sum_t log(-P_t), computed in the simplest way."""
    tokens = torch.tensor([sample], device=model.device)
    logits = model(tokens, use_cache=False).logits[:, :-1].double()
    targets = tokens[:, 1:, None]
    a = logits.scatter(2, targets, -torch.inf).logsumexp(2) - logits.gather(2, targets)[..., 0]
    return log_neg_log_prob(a).sum()
