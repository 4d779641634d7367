"""Holds the rules of the closed form against autograd on the very model that is to be scored, on two short samples.

A layer may look like one that a rule knows and yet scale its weights, be called twice, or mix samples: its norms would
be wrong and look right. So this is run once before any sample is scored.
"""

import functools

import torch

from mrd_ray.mrd.autograd import square_norms
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.likelihood import MicroBatch, log_neg_log_prob

_SAMPLES = [[1, 2, 3, 4, 2, 3], [4, 1, 1, 3]]


def disagreements(norms: GradientNorms) -> list[str]:
    """Names of the parameters whose share of |g|^2 is not what autograd gives."""
    model = norms.model
    everything = [[True] * len(sample) for sample in _SAMPLES]
    _, found = norms.by_parameter(MicroBatch.collate(_SAMPLES, everything, model.device))

    def objective(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, use_cache=False).logits[:, :-1].double()
        targets = tokens[:, 1:, None]
        a = logits.scatter(2, targets, -torch.inf).logsumexp(2) - logits.gather(2, targets)[..., 0]
        return log_neg_log_prob(a).sum()

    expected = []
    for sample in _SAMPLES:
        tokens = torch.tensor([sample], device=model.device)
        expected.append(square_norms(model, norms.parameters, functools.partial(objective, tokens)))
    totals = torch.tensor([sum(squares.values()) for squares in expected], dtype=torch.float64)
    tolerance = 0.1 if model.dtype == torch.bfloat16 else 1e-2
    wrong = []
    for name, squares in found.items():
        right = torch.tensor([of_sample[name] for of_sample in expected], dtype=torch.float64)
        # some gradients are zero but for rounding, such as those of key biases
        if not ((squares.cpu() - right).abs() <= tolerance * right + 1e-6 * totals).all():
            wrong.append(name)
    return wrong
