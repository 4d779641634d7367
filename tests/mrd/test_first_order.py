"""L against autograd, and Monte Carlo with L as control variate against many plain draws."""

import functools
import math

import pytest
import torch
from architectures import CONFIGS, SAMPLES, SCORED, batch_of, model_of

from mrd_ray.mrd.autograd import along
from mrd_ray.mrd.autograd_check import agrees
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.first_order import FirstOrder
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import Moments, draw_deltas, noise_key
from mrd_ray.mrd.perturb import Replica
from mrd_ray.mrd.scores import monte_carlo_score

SIGMA = 1e-5


def objective(model, sample, scored):
    logits = model(torch.tensor([sample]), use_cache=False).logits[0, :-1]
    values = -logits.log_softmax(-1)[range(len(sample) - 1), sample[1:]]
    return values[torch.tensor(scored[1:])].log().sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_is_the_derivative_along_a_draw(name):
    model = model_of(name)
    replica = Replica(model)
    replica.perturb(SIGMA, noise_key(0, 1))
    step = {name: delta.clone() for name, delta in replica.step().items()}
    replica.restore()
    parameters = dict(model.named_parameters())
    first_order = FirstOrder(model, parameters)
    found = first_order(batch_of(scored=SCORED), replica.base, step).tolist()
    expected = [
        -along(model, parameters, functools.partial(objective, model, *one), step)[0]
        for one in zip(SAMPLES, SCORED, strict=True)
    ]
    assert found == pytest.approx(expected, rel=1e-9)
    assert agrees(first_order, parameters, step)
    without_one = [name for name in parameters if name not in (next(iter(parameters)), list(parameters)[-1])]
    assert not agrees(FirstOrder(model, without_one), parameters, step)


def moments(draws, first_std):
    return Moments.of([one[:-1] for one in draws], [one[-1] for one in draws], first_std)


def drawn(model, sigma, draws, controlled=True, selected=None) -> list:
    batch = batch_of(scored=SCORED)
    selected = selected or dict(model.named_parameters())
    replica, likelihood, first_order = Replica(model, selected), Likelihood(model), FirstOrder(model, selected)
    norms = GradientNorms(model, selected)(batch)[1].sqrt().tolist()
    theta = [likelihood.log_neg_log_probs(batch)]
    given = (sigma, 0, draws, True, first_order if controlled else None)
    (values,) = draw_deltas(replica, likelihood, [batch], theta, *given)
    replica.restore()
    if not controlled:
        return [monte_carlo_score(Moments.of(of_sample), antithetic=True) for of_sample in values.tolist()]
    return [
        monte_carlo_score(moments(of_sample, sigma * norm), antithetic=True, first_std=sigma * norm)
        for of_sample, norm in zip(values.tolist(), norms, strict=True)
    ]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma2", "opt"])
def test_four_draws_are_worth_thousands(name):
    """At sigma 1e-5 they are within a thousandth or so of sigma |g| sqrt(2 / pi), and say so."""
    model = model_of(name)
    found = drawn(model, SIGMA, range(4))
    norms = GradientNorms(model)(batch_of(scored=SCORED))[1].sqrt().tolist()
    for score, norm in zip(found, norms, strict=True):
        assert score.mean_abs_se < 0.01 * score.mean_abs
        assert score.mean_abs == pytest.approx(SIGMA * norm * math.sqrt(2 / math.pi), rel=0.02)


@pytest.mark.parametrize(
    "sigma", [pytest.param(1e-4, marks=pytest.mark.slow), 1e-2, pytest.param(3e-2, marks=pytest.mark.slow)]
)
def test_agrees_with_many_draws_at_every_sigma(sigma):
    model = model_of("llama-tied")
    plain, found = drawn(model, sigma, range(100, 700), controlled=False), drawn(model, sigma, range(100))
    for a, b in zip(plain, found, strict=True):
        assert abs(a.mean_abs - b.mean_abs) < 4 * math.hypot(a.mean_abs_se, b.mean_abs_se)
        assert abs(a.delta_mean - b.delta_mean) < 4 * math.hypot(a.abs_mean_se, b.abs_mean_se)
        assert b.delta_std == pytest.approx(a.delta_std, rel=0.2)


def test_of_some_parameters():
    model = model_of("llama-tied")
    selected = {name: parameter for name, parameter in model.named_parameters() if "layers.1" in name}
    norms = GradientNorms(model, selected)(batch_of(scored=SCORED))[1].sqrt().tolist()
    found = drawn(model, SIGMA, range(4), selected=selected)
    for score, norm in zip(found, norms, strict=True):
        assert score.mean_abs == pytest.approx(SIGMA * norm * math.sqrt(2 / math.pi), rel=0.02)


def test_moments_of_draws_add_up():
    draws = drawn_pairs()
    whole, parts = moments(draws, 0.1), [moments(draws[a:b], 0.1) for a, b in ((0, 3), (3, 19), (19, 20))]
    assert monte_carlo_score(Moments.merge(parts), True, 0.1) == monte_carlo_score(whole, True, 0.1)


def drawn_pairs():
    model = model_of("gpt2")
    batch = MicroBatch.collate([SAMPLES[0]], [SCORED[0]], model.device)
    replica, likelihood = Replica(model), Likelihood(model)
    first_order, theta = FirstOrder(model, dict(model.named_parameters())), [likelihood.log_neg_log_probs(batch)]
    (values,) = draw_deltas(replica, likelihood, [batch], theta, 1e-3, 0, range(20), True, first_order)
    return values[0].tolist()
