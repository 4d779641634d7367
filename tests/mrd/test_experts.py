"""Mixtures of experts: gradient norms and forward mode against autograd, one sample at a time."""

import pytest
import torch
from architectures import EXPERTS, SAMPLES, SCORED, batch_of, experts_of
from test_closed_form import check

from mrd_ray.mrd.autograd_check import agrees, disagreements
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.first_order import FirstOrder


@pytest.mark.parametrize("name", EXPERTS)
def test_every_family(name):
    model = experts_of(name)
    norms = GradientNorms(model)
    assert norms.coverage.slow == []
    assert disagreements(norms) == []
    check(model, norms)
    check(model, GradientNorms(model, activations=0))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_every_implementation_has_the_same_norms(name, implementation):
    exact = experts_of(name)
    _, expected = GradientNorms(exact)(batch_of(SAMPLES, SCORED))
    model = experts_of(name, torch.float32, implementation)
    model.load_state_dict(exact.state_dict())
    norms = GradientNorms(model)
    assert disagreements(norms) == []
    torch.testing.assert_close(norms(batch_of(SAMPLES, SCORED))[1], expected, rtol=1e-4, atol=0)
    assert not any("forward" in vars(module) for module in model.modules())


def test_bfloat16():
    norms = GradientNorms(experts_of("mixtral", torch.bfloat16, "grouped_mm"))
    assert disagreements(norms) == []


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, "eager") for name in EXPERTS]
    + [(name, way) for name in ("mixtral", "qwen3-moe", "gpt-oss") for way in ("grouped_mm", "batched_mm")],
)
def test_forward_mode(name, implementation):
    model = experts_of(name, torch.float32, implementation)
    parameters = dict(model.named_parameters())
    torch.manual_seed(1)
    step = {name: 1e-5 * torch.randn_like(parameter) for name, parameter in parameters.items()}
    assert agrees(FirstOrder(model, parameters), parameters, step)


def test_some_of_the_experts_parameters_alone():
    model = experts_of("gpt-oss")
    for part in ("down_proj", "gate_up_proj_bias", "router", "sinks"):
        selected = [name for name, _ in model.named_parameters() if part in name]
        assert selected
        check(model, GradientNorms(model, selected))
