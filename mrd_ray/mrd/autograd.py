"""Gradient norms of one sample by autograd: for parameters that no rule covers, and to check the rules."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch


def square_norms(
    model: torch.nn.Module, parameters: Mapping[str, torch.Tensor], objective: Callable[[], torch.Tensor]
) -> dict[str, float]:
    """|gradient|^2 of a scalar objective for each parameter; 0 if the parameter does not affect the objective."""

    found = _of_gradients(model, parameters, objective, lambda _, gradient: [_square(gradient)])
    return {name: values[0] if values else 0.0 for name, values in found.items()}


def along(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.Tensor],
    objective: Callable[[], torch.Tensor],
    step: Mapping[str, torch.Tensor],
) -> tuple[float, float]:
    """The derivative of a scalar objective along a step of the parameters, and |gradient|^2."""

    def numbers(name: str, gradient: torch.Tensor) -> list[torch.Tensor]:
        return [(gradient * step[name]).sum(dtype=torch.float64), _square(gradient)]

    found = [values for values in _of_gradients(model, parameters, objective, numbers).values() if values]
    return math.fsum(values[0] for values in found), math.fsum(values[1] for values in found)


def _square(gradient: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()


def _of_gradients(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.Tensor],
    objective: Callable[[], torch.Tensor],
    numbers: Callable[[str, torch.Tensor], list[torch.Tensor]],
) -> dict[str, list[float]]:
    """Numbers computed from each parameter's gradient; an empty list if it has none. Gradients are freed at once.

    Meanwhile the model computes with other tensors that share the parameters' memory. So code that waits for gradients
    of the model's own parameters, such as DeepSpeed, sees none.
    """
    found: dict[str, list[float]] = {name: [] for name in parameters}
    leaves = {}
    for name, parameter in parameters.items():

        def measure(leaf: torch.Tensor, name: str = name) -> None:
            assert leaf.grad is not None
            found[name] = [float(number) for number in numbers(name, leaf.grad)]
            leaf.grad = None

        leaves[f"model.{name}"] = parameter.detach().requires_grad_()
        leaves[f"model.{name}"].register_post_accumulate_grad_hook(measure)
    # torch skips the gradient of the padding row, but noise is added to that row too
    paddings = {m: m.padding_idx for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    try:
        for embedding in paddings:
            embedding.padding_idx = None
        torch.func.functional_call(_Backward(model, objective, [*leaves.values()]), leaves, ())
    finally:
        for embedding, padding in paddings.items():
            embedding.padding_idx = padding
    return found


class _Backward(torch.nn.Module):
    """Differentiates a model's objective with respect to tensors that temporarily replace its parameters."""

    def __init__(
        self, model: torch.nn.Module, objective: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor]
    ) -> None:
        super().__init__()
        self.model, self._objective, self._leaves = model, objective, leaves

    def forward(self) -> None:
        with torch.enable_grad():
            value = self._objective()
            if value.requires_grad:
                value.backward(inputs=self._leaves)
