"""Gradient checkpointing by memory budget: layers keep their activations while it lasts, the rest recompute theirs."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


@contextlib.contextmanager
def recomputing(model: PreTrainedModel, budget: float) -> Iterator[None]:
    """Within this block, the activations that a forward's layers keep for its backward take up to `budget` bytes.

    The layers that keep theirs are the first ones, and one more is left room for, since recomputing a layer makes its
    activations again; that one there is even if it does not fit. What embeddings and the output layer keep comes on
    top. Recomputed activations have the same bits. (transformers' own switch knows all layers or none, and works in
    training mode alone, which turns dropout on.)

    Args:
        budget: zero recomputes every layer, and infinity none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    forwards = [layer.forward for layer in layers]
    activations = _Activations(model, budget)
    for number, layer in enumerate(layers if math.isfinite(budget) else []):
        layer.forward = functools.partial(activations.run, number == 0, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward


class _Activations:
    """What the layers of a forward have kept so far, by the memory that holds it: several tensors may share some."""

    def __init__(self, model: PreTrainedModel, budget: float) -> None:
        self._budget = budget
        self._weights = {_address(parameter) for parameter in model.parameters()}
        self._held: set[tuple[torch.device, int]] = set()
        self._bytes = self._largest = 0

    def run(self, first: bool, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer's forward; `first` begins to count anew."""
        if first:
            self._held, self._bytes, self._largest = set(self._weights), 0, 0
        if self._budget == 0 or self._bytes + 2 * self._largest > self._budget:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        before = self._bytes
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            output = forward(*args, **kwargs)
        self._largest = max(self._largest, self._bytes - before)
        return output

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if (address := _address(tensor)) not in self._held:
            self._held.add(address)
            self._bytes += tensor.untyped_storage().nbytes()
        return tensor


def _address(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
