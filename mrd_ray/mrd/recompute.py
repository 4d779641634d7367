"""Gradient checkpointing with a memory budget: layers keep activations while they fit, the others recompute theirs."""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mrd_ray.mrd.double import as_now


def layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers that can be recomputed, according to transformers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextlib.contextmanager
def recomputing(model: PreTrainedModel, budget: float) -> Iterator[None]:
    """Within this block, what a forward's layers keep for the backward takes at most `budget` bytes on each device.

    The first layers on a device keep their activations. The other layers keep only their inputs, which also count
    towards the budget. Room for one more layer is reserved, because recomputing a layer creates its activations again.
    The first layer keeps its activations whatever their size. What embeddings and the output layer keep comes on top.
    Recomputed activations have the same bits. (transformers' own switch covers all layers or none, and works only in
    training mode, which turns on dropout.)

    Args:
        budget: zero recomputes every layer, and infinity recomputes none.
    """
    layers = layers_of(model) if math.isfinite(budget) else []
    own = {layer: layer.__dict__["forward"] for layer in layers if "forward" in layer.__dict__}
    activations = _Activations(model, budget)
    begins = model.base_model.register_forward_pre_hook(lambda *_: activations.begin())
    for layer in layers:
        layer.forward = functools.partial(activations.run, layer, layer.forward)
    try:
        yield
    finally:
        begins.remove()
        for layer in layers:
            del layer.forward
        for layer, forward in own.items():
            layer.forward = forward


class _Activations:
    """Bytes that a forward's layers have kept so far; memory that several tensors share counts once."""

    def __init__(self, model: PreTrainedModel, budget: float) -> None:
        self._model, self._budget = model, budget
        self.begin()

    def begin(self) -> None:
        """Start counting again, for a new forward."""
        self._held = {_address(parameter) for parameter in self._model.parameters()}
        self._bytes: Counter[torch.device] = Counter()
        self._largest: Counter[torch.device] = Counter()  # most bytes kept by a single layer

    def run(self, layer: torch.nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer's forward, with activations kept or recomputed, as the budget allows."""
        device = next((parameter.device for parameter in layer.parameters()), torch.device("cpu"))
        before = self._bytes[device]
        if self._budget == 0 or before + 2 * self._largest[device] > self._budget:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor):
                    self._keep(value)
            return checkpoint(as_now(forward), *args, use_reentrant=False, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            output = forward(*args, **kwargs)
        self._largest[device] = max(self._largest[device], self._bytes[device] - before)
        return output

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if (address := _address(tensor)) not in self._held:
            self._held.add(address)
            self._bytes[tensor.device] += tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would keep alive the graph that keeps it alive


def _address(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
