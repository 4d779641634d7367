"""The guard lets float32 through at the paper's sigma, and stops what rounding would swallow."""

import pytest
import torch
from architectures import SAMPLES, batch_of, model_of

from mrd_ray.models.load import weights_digest
from mrd_ray.mrd.likelihood import Likelihood
from mrd_ray.mrd.noise import standard_normal
from mrd_ray.mrd.perturb import Replica
from mrd_ray.mrd.precision import examine


def figures(dtype, sigma):
    model = model_of("llama-tied", torch.float32).to(dtype)
    return examine(Replica(model), Likelihood(model), batch_of(), sigma, seed=0)


@pytest.mark.parametrize("sigma", [1e-5, 1e-3])
def test_float32_carries_the_papers_sigma(sigma):
    found = figures(torch.float32, sigma)
    assert found.sufficient
    assert found.share_moved > 0.99
    assert found.cosine > 0.999
    assert found.noise_floor < 0.1


def test_noise_floor_grows_as_sigma_falls():
    floors = [figures(torch.float32, sigma).noise_floor for sigma in (1e-4, 1e-5, 1e-6, 1e-7)]
    assert floors == sorted(floors)
    assert not figures(torch.float32, 1e-9).sufficient


def test_bfloat16_swallows_the_papers_sigma():
    found = figures(torch.bfloat16, 1e-5)
    assert not found.sufficient
    assert found.share_moved < 0.5
    assert found.cosine < 0.9


def test_the_sample_that_fares_worst_decides():
    """A memorised sample is quieter than others, and rounding as loud: it must not hide behind them."""
    torch.manual_seed(0)
    model = model_of("llama", torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        model(torch.tensor([SAMPLES[3]]), labels=torch.tensor([SAMPLES[3]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    replica, likelihood = Replica(model), Likelihood(model)
    alone = [examine(replica, likelihood, batch_of([SAMPLES[i]]), 1e-7, seed=0).noise_floor for i in (0, 3)]
    together = examine(replica, likelihood, batch_of([SAMPLES[0], SAMPLES[3]]), 1e-7, seed=0).noise_floor
    assert together == pytest.approx(max(alone), rel=0.5)


def test_noise_without_effect_is_not_sufficient():
    model = model_of("llama", torch.float32)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # nothing before it matters
    found = examine(Replica(model, ["model.norm.weight"]), Likelihood(model), batch_of(), 1e-3, seed=0)
    assert not found.sufficient
    assert found.noise_floor == float("inf")


def test_share_and_cosine_are_those_of_the_rounded_weights():
    model = model_of("llama-tied", torch.float32).to(torch.bfloat16)
    theta = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found = examine(Replica(model), Likelihood(model), batch_of(), 1e-3, seed=0)
    z = torch.cat([standard_normal(0, name, 0, tensor.numel()).double() for name, tensor in theta.items()])
    base = torch.cat([tensor.flatten().float() for tensor in theta.values()])
    step = ((base + 1e-3 * z.float()).bfloat16().double()) - base.double()
    assert found.share_moved == pytest.approx(float((step != 0).double().mean()), rel=1e-3)
    assert found.cosine == pytest.approx(float(step @ z / step.norm() / z.norm()), rel=1e-3)


def test_the_replica_is_restored():
    model = model_of("gpt2", torch.float32)
    before = weights_digest(dict(model.named_parameters()))
    examine(Replica(model), Likelihood(model), batch_of(), 1e-3, seed=0)
    assert weights_digest(dict(model.named_parameters())) == before


@pytest.mark.parametrize(("dtype", "sigma", "enough"), [
    (torch.float32, 1e-6, False), (torch.float32, 1e-3, True), (torch.float64, 1e-6, True),
])  # fmt: skip
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_antithetic_draws_need_their_even_part_to_stand_out(name, dtype, sigma, enough):
    model = model_of(name, dtype)
    found = examine(Replica(model), Likelihood(model), batch_of(), sigma, seed=0, antithetic=True)
    assert found.sufficient == enough
