"""Thousands of draws of a small model at once, in float64."""

from typing import NamedTuple

import numpy as np
import torch
from architectures import SCORED, batch_of, model_of

from mrd_ray.mrd.likelihood import log_neg_log_prob

_AT_ONCE = 250


class Drawn(NamedTuple):
    """Delta at theta + delta and theta - delta, and L: float64 [n, samples]. first_std: sigma |g|, [samples]."""

    plus: np.ndarray
    minus: np.ndarray
    first: np.ndarray
    first_std: np.ndarray


def drawn(name: str, sigma: float, n: int, seed: int = 0, signs: bool = False) -> Drawn:
    """n draws of a model of architectures.py. signs: instead of normals, as probes of the curvature are."""
    model = model_of(name)
    model.set_attn_implementation("eager")
    batch = batch_of(scored=SCORED)
    theta = {name: parameter.detach() for name, parameter in model.named_parameters()}
    targets = batch.token_ids[:, 1:, None]

    def values(weights):
        """log(-P_t), 0 where a token is not scored."""
        inputs = {"input_ids": batch.token_ids, "use_cache": False}
        logits = torch.func.functional_call(model, weights, kwargs=inputs, tie_weights=True).logits[:, :-1]
        others = logits.scatter(2, targets, -torch.inf).logsumexp(2)
        return torch.where(batch.scored, log_neg_log_prob(others - logits.gather(2, targets)[..., 0]), 0.0)

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    objectives = values(leaves).sum(1)
    gradients = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(one, list(leaves.values()), retain_graph=True)])
         for one in objectives]
    )  # fmt: skip
    at_theta = values(theta)

    def delta(step, sign):
        moved = {name: theta[name] + sign * step[name] for name in theta}
        return -torch.expm1(values(moved) - at_theta).sum(1)

    generator = torch.Generator().manual_seed(seed)
    found = []
    with torch.no_grad():
        for start in range(0, n, _AT_ONCE):
            size = min(_AT_ONCE, n - start)
            noise = {
                name: torch.randn(size, *tensor.shape, generator=generator, dtype=torch.float64)
                for name, tensor in theta.items()
            }
            steps = {name: sigma * (z.sign() if signs else z) for name, z in noise.items()}
            first = -torch.cat([step.flatten(1) for step in steps.values()], 1) @ gradients.T
            pair = [torch.func.vmap(lambda step, sign=sign: delta(step, sign))(steps) for sign in (1, -1)]
            found.append(torch.stack([*pair, first]))
    return Drawn(*torch.cat(found, 1).numpy(), sigma * gradients.norm(dim=1).numpy())
