"""Gradient norms of one sample by autograd: for parameters that no rule covers, and to hold the rules against."""

from collections.abc import Callable, Mapping

import torch


def square_norms(
    model: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], objective: Callable[[], torch.Tensor]
) -> dict[str, float]:
    """|gradient|^2 of a scalar objective for each parameter, 0 where it has no influence.

    Every gradient is dropped as soon as it is made. The parameters are left as they were found.
    """
    squares = dict.fromkeys(parameters, 0.0)
    kept = {name: (parameter.requires_grad, parameter.grad) for name, parameter in parameters.items()}
    # torch leaves the padding row's gradient out; noise does not leave out the row
    paddings = {m: m.padding_idx for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    hooks = []
    for name, parameter in parameters.items():

        def measure(parameter: torch.Tensor, name: str = name) -> None:
            assert parameter.grad is not None
            squares[name] = float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64).square())
            parameter.grad = None

        parameter.grad = None
        hooks.append(parameter.requires_grad_().register_post_accumulate_grad_hook(measure))
    try:
        for embedding in paddings:
            embedding.padding_idx = None
        with torch.enable_grad():
            value = objective()
            if value.requires_grad:
                value.backward()
    finally:
        for embedding, padding in paddings.items():
            embedding.padding_idx = padding
        for hook in hooks:
            hook.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(kept[name][0])
            parameter.grad = kept[name][1]
    return squares
