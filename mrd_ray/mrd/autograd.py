"""Gradient norms of one sample by autograd: for parameters that no rule covers, and to hold the rules against."""

from collections.abc import Callable, Mapping

import torch


def square_norms(
    model: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], objective: Callable[[], torch.Tensor]
) -> dict[str, float]:
    """|gradient|^2 of a scalar objective for each parameter, 0 where it has no influence."""

    def square(_: str, gradient: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()

    return _of_gradients(model, parameters, objective, square)


def along(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.nn.Parameter],
    objective: Callable[[], torch.Tensor],
    step: Mapping[str, torch.Tensor],
) -> float:
    """The derivative of a scalar objective along a step of the parameters."""

    def product(name: str, gradient: torch.Tensor) -> torch.Tensor:
        return (gradient * step[name]).sum(dtype=torch.float64)

    return sum(_of_gradients(model, parameters, objective, product).values())


def _of_gradients(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.nn.Parameter],
    objective: Callable[[], torch.Tensor],
    number: Callable[[str, torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """A number for each parameter's gradient, which is dropped as soon as it is made; 0 where there is none.

    The parameters are left as they were found.
    """
    found = dict.fromkeys(parameters, 0.0)
    kept = {name: (parameter.requires_grad, parameter.grad) for name, parameter in parameters.items()}
    # torch leaves the padding row's gradient out; noise does not leave out the row
    paddings = {m: m.padding_idx for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    hooks = []
    for name, parameter in parameters.items():

        def measure(parameter: torch.Tensor, name: str = name) -> None:
            assert parameter.grad is not None
            found[name] = float(number(name, parameter.grad))
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
    return found
