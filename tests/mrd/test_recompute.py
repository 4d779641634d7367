"""A budget for activations decides what is recomputed, and nothing about the result."""

import collections
import gc
import math
import weakref

import pytest
import torch
from architectures import CONFIGS, batch_of, model_of
from transformers import AutoModelForCausalLM, LlamaConfig

from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.recompute import recomputing


def layer_runs(model, budget):
    """How often each layer runs in a forward and backward."""
    runs = collections.Counter()
    layers = [layer.mlp for layer in model.model.layers]
    hooks = [layer.register_forward_pre_hook(lambda layer, _: runs.update([layer])) for layer in layers]
    with recomputing(model, budget):
        model.model(input_ids=batch_of().token_ids, use_cache=False).last_hidden_state.sum().backward()
    for hook in hooks:
        hook.remove()
    return [runs[layer] for layer in layers]


def bytes_of_layers(model):
    """What autograd holds for the layers between a forward and its backward, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(input_ids=batch_of().token_ids, use_cache=False).last_hidden_state
    del output
    return sum(size for address, size in held.items() if address not in weights)


def deep():
    torch.manual_seed(0)
    config = CONFIGS["llama"].to_dict() | {"num_hidden_layers": 6, "layer_types": None}
    return AutoModelForCausalLM.from_config(LlamaConfig(**config)).eval()


def test_layers_are_recomputed_once_the_budget_is_used_up():
    model = deep()
    everything = bytes_of_layers(model)
    layer = everything / 6  # little is kept outside of layers
    assert layer_runs(model, math.inf) == [1] * 6
    assert layer_runs(model, 1.2 * everything) == [1] * 6
    # room for four layers: three are kept, and one is made again at a time
    assert layer_runs(model, 4.2 * layer) == [1, 1, 1, 2, 2, 2]
    assert layer_runs(model, 1.0) == [1, 2, 2, 2, 2, 2]
    assert layer_runs(model, 0) == [2] * 6


def test_a_forward_that_fails_leaves_nothing_behind():
    """As one that runs out of memory does, whose halves are tried again."""
    model, made = deep(), []
    model.model.layers[3].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda layer, args, output: made.append(weakref.ref(output)))
    with pytest.raises(ZeroDivisionError), recomputing(model, 1e12):
        model.model(input_ids=batch_of().token_ids, use_cache=False)
    gc.collect()
    assert len(made) == 4
    assert [output() for output in made] == [None] * 4


def test_layers_are_left_as_they_were():
    model = deep()
    own = model.model.layers[1].forward
    model.model.layers[1].forward = own  # as a library that hooks layers leaves them
    with recomputing(model, 1.0):
        pass
    assert ["forward" in layer.__dict__ for layer in model.model.layers] == [False, True, False, False, False, False]
    assert model.model.layers[1].forward is own
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("budget", [0, 1.0, 1e5])
def test_recomputed_scores_have_the_same_bits(name, budget):
    model = model_of(name, torch.float32)
    theta, squares = GradientNorms(model)(batch_of())
    again, recomputed = GradientNorms(model, activations=budget)(batch_of())
    assert torch.equal(theta, again)
    assert torch.equal(squares, recomputed)


def test_every_forward_has_the_whole_budget():
    """What one batch kept must not be counted against the next one."""
    model = deep()
    everything = bytes_of_layers(model)
    runs = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with recomputing(model, 1.5 * everything):
        for _ in range(3):
            model.model(input_ids=batch_of().token_ids, use_cache=False).last_hidden_state.sum().backward()
    assert len(runs) == 3
