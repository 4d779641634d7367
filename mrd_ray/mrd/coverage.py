"""Which parameters of a model have a rule for their per-sample gradient norms, and which do not."""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from mrd_ray.mrd.expert_rules import measured_inside
from mrd_ray.mrd.gradient_rules import rule_of


@dataclass(frozen=True)
class Coverage:
    """Which layers hold the selected parameters, and which parameters no rule covers.

    layers: layers whose parameters have a rule. tied: names of parameters that an embedding and an output layer share.
    slow: names of parameters that need autograd, one sample at a time.
    """

    layers: list[torch.nn.Module]
    tied: frozenset[str]
    slow: list[str]


def coverage(model: torch.nn.Module, selected: Collection[str], without: Collection[str] = ()) -> Coverage:
    """Match parameters to rules by the types of the layers that hold them; works on a model without weights.

    Args:
        selected: names as in `model.named_parameters()`, which lists tied parameters once, under their first name.
        without: names of parameters whose rules are not used, because they do not hold.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    holders: dict[str, list[torch.nn.Module]] = {name: [] for name in selected}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if (name := names[id(parameter)]) in holders:
                holders[name].append(module)
    tied = {
        name
        for name, modules in holders.items()
        if len(modules) == 2 and isinstance(modules[0], torch.nn.Embedding) and isinstance(modules[1], torch.nn.Linear)
    }
    slow = [
        name
        for name, modules in holders.items()
        if name in without or not all(map(_has_rule, modules)) or (len(modules) > 1 and name not in tied)
    ]
    fast = {id(module) for name in holders if name not in slow for module in holders[name]}
    layers = [module for module in model.modules() if id(module) in fast]
    return Coverage(layers, frozenset(tied.difference(slow)), slow)


def _has_rule(layer: torch.nn.Module) -> bool:
    return rule_of(layer) is not None or measured_inside(layer)
