"""Holds the closed form against autograd on the very model that is to be scored, on two short samples.

A layer may look like one that a rule knows and yet scale its weights, be called twice, or mix samples: its norms would
be wrong and look right. So this is run once before any sample is scored.
"""

import torch

from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.likelihood import MicroBatch, log_neg_log_prob


def disagreements(norms: GradientNorms) -> list[str]:
    """Names of the parameters whose share of |g|^2 is not what autograd gives."""
    model = norms.model
    pads = {model.config.get_text_config().pad_token_id}  # torch's own backward leaves the padding row out
    pads |= {module.padding_idx for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    a, b, c, d = [token for token in range(4 + len(pads)) if token not in pads][:4]
    samples = [[a, b, c, d, b, c], [d, a, a, c]]
    everything = [[True] * len(sample) for sample in samples]
    _, found = norms.by_parameter(MicroBatch.collate(samples, everything, model.device))
    expected = [_by_autograd(norms, torch.tensor([sample], device=model.device)) for sample in samples]
    totals = torch.tensor([sum(squares.values()) for squares in expected], dtype=torch.float64)
    tolerance = 0.1 if model.dtype == torch.bfloat16 else 1e-2
    wrong = []
    for name, squares in found.items():
        right = torch.tensor([of_sample[name] for of_sample in expected], dtype=torch.float64)
        # some gradients are zero but for rounding, such as those of key biases
        if not ((squares.cpu() - right).abs() <= tolerance * right + 1e-6 * totals).all():
            wrong.append(name)
    return wrong


def _by_autograd(norms: GradientNorms, tokens: torch.Tensor) -> dict[str, float]:
    """Each selected parameter's |gradient|^2 for one sample; every gradient is dropped as soon as it is made."""
    squares = dict.fromkeys(norms.parameters, 0.0)
    kept = {name: (parameter.requires_grad, parameter.grad) for name, parameter in norms.parameters.items()}
    hooks = []
    for name, parameter in norms.parameters.items():

        def measure(parameter: torch.Tensor, name: str = name) -> None:
            assert parameter.grad is not None
            squares[name] = float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64).square())
            parameter.grad = None

        parameter.grad = None
        hooks.append(parameter.requires_grad_().register_post_accumulate_grad_hook(measure))
    try:
        with torch.enable_grad():
            logits = norms.model(tokens, use_cache=False).logits[:, :-1].double()
            targets = tokens[:, 1:, None]
            a = logits.scatter(2, targets, -torch.inf).logsumexp(2) - logits.gather(2, targets)[..., 0]
            log_neg_log_prob(a).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in norms.parameters.items():
            parameter.requires_grad_(kept[name][0])
            parameter.grad = kept[name][1]
    return squares
