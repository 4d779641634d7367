"""What the zoo is held against, written out for one sample at a time: no padding, no shared code but the noise."""

import copy

import torch

from mrd_ray.mrd.monte_carlo import noise_key
from mrd_ray.mrd.noise import standard_normal

SEED, DRAWS = 5, 3
SAMPLES = [[3, 5, 9, 3, 22, 17, 40, 8], [4, 33, 2], [7, 7], [9, 60, 59, 3, 0, 3, 12, 14, 50, 20, 31, 44, 6]]
SCORED = [[False] * 4 + [True] * 4, *([True] * len(sample) for sample in SAMPLES[1:])]


def log_probs(model: torch.nn.Module, sample: list[int], scored: list[bool]) -> torch.Tensor:
    """log p(x_t | x_<t) of the scored tokens, in float64."""
    logits = model(input_ids=torch.tensor([sample]), use_cache=False).logits[0].double()
    found = [logits[t - 1].log_softmax(0)[sample[t]] for t in range(1, len(sample)) if scored[t]]
    return torch.stack(found)


def noise(model: torch.nn.Module, k: int) -> dict[str, torch.Tensor]:
    """z of draw k by the names of the parameters: float64."""
    return {
        name: standard_normal(noise_key(SEED, k), name, 0, parameter.numel()).double().view_as(parameter)
        for name, parameter in model.named_parameters()
    }


@torch.no_grad()
def algorithm_1(model: torch.nn.Module, sigma: float) -> list[list[float]]:
    """Delta of each sample, for each draw."""
    kept = copy.deepcopy(model)
    before = [log_probs(kept, *one) for one in zip(SAMPLES, SCORED, strict=True)]
    found: list[list[float]] = [[] for _ in SAMPLES]
    for k in range(DRAWS):
        perturbed = copy.deepcopy(kept)
        z = noise(kept, k)
        for name, parameter in perturbed.named_parameters():
            parameter.copy_((parameter.double() + sigma * z[name]).to(parameter.dtype))
        for deltas, p, one in zip(found, before, zip(SAMPLES, SCORED, strict=True), strict=True):
            deltas.append(float(((p - log_probs(perturbed, *one)) / p).sum()))
    return found


def gradients(model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """Of sum_t log(-P_t), of each sample, by autograd: float64, none where a parameter has no influence."""
    model = copy.deepcopy(model).requires_grad_(True)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # torch leaves that row's gradient out; noise does not leave out the row
    found = []
    for one in zip(SAMPLES, SCORED, strict=True):
        model.zero_grad()
        (-log_probs(model, *one)).log().sum().backward()
        found.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
    return found


def norm(gradient: dict[str, torch.Tensor]) -> float:
    """|g|."""
    return sum(float(part.square().sum()) for part in gradient.values()) ** 0.5


def along(gradient: dict[str, torch.Tensor], z: dict[str, torch.Tensor]) -> float:
    """g . z."""
    return sum(float((part * z[name]).sum()) for name, part in gradient.items())
