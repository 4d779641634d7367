"""Per-sample gradient norms of layers that must be measured from inside, above all mixtures of experts.

In a mixture of experts, one parameter [E, out, in] holds a matrix for every expert.

The gradient of expert e's matrix is the sum of G_t A_t^T over the tokens t that are routed to e. So its norm for a
sample equals the norm for a linear layer that saw only those tokens of the sample. The parameter's squared norm is the
sum over e.

From outside such a layer, one sees neither the inputs of the second matrices nor the gradients at the outputs of the
first. In the same way, the gradient at a router's logits is hidden inside the router, and the use of attention sinks
inside the attention. So these layers compute with the functions here while norms are measured. (transformers has
several ways to compute experts; this is one more, with the same results.)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode

from mrd_ray.mrd.gradient_rules import Squares, gram_of, is_router, square_of_product, square_sum

Measure = Callable[[torch.Tensor, torch.Tensor], None]  # receives a layer's input and the gradient at its output
Tap = Callable[..., torch.Tensor]  # takes a Measure, an output and an input; returns the output


class _Layout(NamedTuple):
    """Names of a layer's parameters: matrix, and bias if any, of the first and of the second linear map.

    transposed: whether matrices are [E, in, out].
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    transposed: bool


def _layout(module: Module) -> _Layout | None:
    own: Any = module
    if type(module).__name__ == "Llama4TextExperts":
        layout = _Layout(("gate_up_proj",), ("down_proj",), True)
    elif hasattr(module, "is_transposed") and hasattr(module, "has_gate"):  # set by use_experts_implementation
        names = ("gate_up_proj" if own.has_gate else "up_proj", "down_proj")
        first, second = ((name, f"{name}_bias") if own.has_bias else (name,) for name in names)
        layout = _Layout(first, second, own.is_transposed)
    elif hasattr(module, "_apply_gate"):
        layout = _Layout(("gate_up_proj",), ("down_proj",), False)
    else:
        return None
    held = {name for name, _ in module.named_parameters(recurse=False)}
    return layout if held == {*layout.first, *layout.second} else None


def is_experts(module: Module) -> bool:
    """Whether it is one of transformers' expert layers, which are all built from the same parts."""
    return _layout(module) is not None


def measured_inside(module: Module) -> bool:
    """Whether it is one of the layers that compute with the functions here."""
    return is_experts(module) or is_router(module) or has_sinks(module)


def has_sinks(module: Module) -> bool:
    """Whether it is attention whose only own parameter is a sink per head: a logit of no token, as in GPT-OSS."""
    return [name for name, _ in module.named_parameters(recurse=False)] == ["sinks"]


def experts_forward(
    experts: Any, samples: int, tap: Tap, add: Callable[[Squares], None], hidden: torch.Tensor, *routes: torch.Tensor
) -> torch.Tensor:
    """The layer's output for hidden [B T, H]; the backward passes the B samples' squares to `add`.

    Args:
        routes: the experts of each token and their weights, both [B T, k]. Llama 4 has none: there hidden is
            [E B T, H], already weighted, and zero where a token is not routed to the expert.
    """
    if routes:
        chosen, weights = (of_tokens.reshape(len(hidden), -1) for of_tokens in routes)
        order = chosen.flatten().argsort(stable=True)
        expert, token = chosen.flatten()[order], order // chosen.shape[1]
        rows, tokens, places = hidden[token], len(hidden), chosen.numel()
    else:
        order, tokens, places = hidden.any(1).nonzero()[:, 0], len(hidden) // len(experts.down_proj), len(hidden)
        expert, token = order // tokens, order % tokens
        rows = hidden[order]
    of_sample = expert * samples + token // (tokens // samples)  # ascending, since the order of tokens is kept
    counts = torch.bincount(of_sample, minlength=len(experts.down_proj) * samples).view(-1, samples).tolist()
    found = _by_expert(experts, rows, counts, tap, add)
    found = found.new_zeros(places, found.shape[1]).index_copy(0, order, found)
    if not routes:
        return found
    if experts.has_post_expert_norm:
        found = experts.post_expert_norm(found.view(samples, -1, found.shape[1]))  # this norm has its own rule
    return (found.view(tokens, -1, found.shape[-1]) * weights[..., None]).sum(1).to(hidden.dtype)


def _by_expert(
    experts: Any, rows: torch.Tensor, counts: list[list[int]], tap: Tap, add: Callable[[Squares], None]
) -> torch.Tensor:
    """Outputs of rows, which are ordered by expert, then by sample: counts[e][i] rows are of expert e and sample i."""
    layout = _layout(experts)
    assert layout is not None
    both = [{name: getattr(experts, name) for name in names} for names in (layout.first, layout.second)]

    def linear(parameters: dict[str, torch.Tensor], e: int, x: torch.Tensor) -> torch.Tensor:
        matrix, *bias = (parameter[e] for parameter in parameters.values())
        x = x.to(matrix.dtype)
        y = sum(bias, x @ (matrix if layout.transposed else matrix.mT))
        return tap(functools.partial(_measure, list(parameters), counts[e], add), y, x)

    found = []
    for e, x in enumerate(rows.split([sum(of_samples) for of_samples in counts])):
        if len(x):
            found.append(linear(both[1], e, _between(experts, linear(both[0], e, x))))
    return torch.cat(found)


def _between(experts: Any, x: torch.Tensor) -> torch.Tensor:
    """Turns outputs of the first map into inputs of the second."""
    if not getattr(experts, "has_gate", True):
        activated: torch.Tensor = experts.act_fn(x)
    elif hasattr(experts, "_apply_gate"):
        activated = experts._apply_gate(x)
    else:
        gate, up = x.chunk(2, -1)
        activated = experts.act_fn(gate) * up
    return activated


def _measure(
    names: list[str], of_samples: list[int], add: Callable[[Squares], None], x: torch.Tensor, gradient: torch.Tensor
) -> None:
    """Add the squares of one expert's matrix, and of its bias if it has one. x, gradient: [n, in] and [n, out]."""
    # the zeros of the padding add nothing
    a, g = (pad_sequence(of_rows.split(of_samples), batch_first=True) for of_rows in (x, gradient))
    matrix, *bias = names
    add({matrix: square_of_product(a, g, gram_of)} | {name: square_sum(g.sum(1, dtype=torch.float64)) for name in bias})


def router_forward(router: Module, forward: Callable[..., Any], tap: Tap, *args: Any, **kwargs: Any) -> Any:
    """The router's own forward, with a tap on its logits; `tap` takes an output and an input."""
    with _Logits(router, tap):
        return forward(*args, **kwargs)


class _Logits(TorchFunctionMode):
    """Taps the output of F.linear with a router's weight, which may be passed in another dtype."""

    def __init__(self, router: Any, tap: Tap) -> None:
        super().__init__()
        self._shape, self._tap = router.weight.shape, tap

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and args[1].shape == self._shape:
            return self._tap(found, args[0])
        return found


def sinks_forward(
    attention: Module,
    forward: Callable[..., Any],
    copies: Callable[[torch.Tensor], torch.Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The attention's own forward, with separate sinks for every sample; `copies` makes them from [1, heads, ...]."""
    with _Copies(attention, copies):
        return forward(*args, **kwargs)


class _Copies(TorchFunctionMode):
    """Replaces sinks by one copy per sample, where the model reshapes them for use."""

    def __init__(self, attention: Any, copies: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._address, self._copies = attention.sinks.data_ptr(), copies

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.reshape, torch.Tensor.view) and args[0].data_ptr() == self._address:
            return self._copies(found)
        return found
