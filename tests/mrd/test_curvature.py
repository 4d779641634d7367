"""Probes of the curvature against autograd, and their mean against Theorem 3.2's trace."""

import pytest
import torch
from architectures import CONFIGS, SAMPLES, SCORED, batch_of, experts_of, model_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig

from mrd_ray.mrd.curvature import TraceEstimator
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import Moments, draw_deltas, noise_key
from mrd_ray.mrd.noise import standard_normal
from mrd_ray.mrd.perturb import Replica
from mrd_ray.mrd.scores import monte_carlo_score

SMOOTH = [name for name in CONFIGS if name != "opt"]  # which has ReLU


@pytest.mark.parametrize("name", SMOOTH)
def test_a_probe_is_the_second_derivative_along_it(name):
    """Against autograd, twice in reverse mode, of P_t(theta + eps v) / P_t(theta) as the theorem has it."""
    model = model_of(name)
    estimator = TraceEstimator(model)
    estimator.aim(5)
    found = estimator.probe(batch_of(SAMPLES, SCORED))
    theta = {key: parameter.detach() for key, parameter in model.named_parameters()}
    sign = {key: standard_normal(5, key, 0, t.numel()).sign().double().view_as(t) for key, t in theta.items()}
    for i, (sample, flags) in enumerate(zip(SAMPLES, SCORED, strict=True)):
        tokens, scored = torch.tensor([sample]), torch.tensor(flags[1:])

        def log_probs(eps, tokens=tokens, scored=scored):
            moved = {key: tensor + eps * sign[key] for key, tensor in theta.items()}
            logits = torch.func.functional_call(model, moved, kwargs={"input_ids": tokens}).logits[0, :-1]
            return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[scored]

        eps = torch.zeros((), dtype=torch.float64, requires_grad=True)
        with sdpa_kernel(SDPBackend.MATH):
            now = log_probs(eps)
            (first,) = torch.autograd.grad((now / now.detach()).sum(), eps, create_graph=True)
            (second,) = torch.autograd.grad(first, eps)
        assert float(found[i]) == pytest.approx(-0.5 * float(second), rel=1e-8)


def aimed(estimator: TraceEstimator, batch: MicroBatch, seed: int) -> torch.Tensor:
    estimator.aim(seed)
    return estimator.probe(batch)


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).double().eval()


def test_mean_of_probes_is_the_trace():
    """Against -1/2 sum_t Tr(H_t) / P_t with whole Hessians."""
    model, tokens = tiny(), torch.tensor([[1, 5, 3, 7]])
    names = [name for name, parameter in model.named_parameters() if parameter.numel() <= 88]
    parameters = {name: dict(model.named_parameters())[name].detach() for name in names}
    base = model(tokens).logits[0, :-1].log_softmax(-1)[range(3), tokens[0, 1:]].detach()

    def relative(flat: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([tensor.numel() for tensor in parameters.values()])
        moved = {n: piece.view_as(parameters[n]) for n, piece in zip(parameters, pieces, strict=True)}
        logits = torch.func.functional_call(model, moved, kwargs={"input_ids": tokens}).logits
        return (logits[0, :-1].log_softmax(-1)[range(3), tokens[0, 1:]] / base).sum()

    with sdpa_kernel(SDPBackend.MATH):
        flat = torch.cat([tensor.flatten() for tensor in parameters.values()])
        hessian = torch.autograd.functional.hessian(relative, flat)
    expected = -0.5 * float(hessian.trace())
    estimator = TraceEstimator(model, names)
    batch = MicroBatch(tokens, torch.ones(1, 3, dtype=torch.bool))
    probes = torch.cat([aimed(estimator, batch, noise_key(0, k)) for k in range(200)])
    off_diagonal = hessian - hessian.diag().diag()
    spread = float(off_diagonal.square().sum() / 2) ** 0.5  # of -v^T H v / 2 for random signs v
    assert abs(float(probes.mean()) - expected) < 3 * spread / 200**0.5
    assert float(probes.std()) == pytest.approx(spread, rel=0.2)


@pytest.mark.slow
def test_agrees_with_antithetic_draws():
    model = tiny()
    batch = MicroBatch(torch.tensor([[1, 5, 3, 7], [2, 2, 9, 4]]), torch.ones(2, 3, dtype=torch.bool))
    estimator = TraceEstimator(model)
    probes = torch.stack([aimed(estimator, batch, noise_key(1, k)) for k in range(200)], 1)
    replica, likelihood = Replica(model), Likelihood(model)
    theta = [likelihood.log_neg_log_probs(batch)]
    (pairs,) = draw_deltas(replica, likelihood, [batch], theta, 1e-3, 0, range(400), antithetic=True)
    for own, of_sample in zip(probes, pairs.tolist(), strict=True):
        drawn = monte_carlo_score(Moments.of(of_sample), antithetic=True)
        mean, se = float(own.mean()) * 1e-6, float(own.std()) * 1e-6 / 200**0.5
        assert abs(mean - drawn.delta_mean) < 4 * (se**2 + drawn.abs_mean_se**2) ** 0.5


@pytest.mark.parametrize("budget", [1, 800])
def test_samples_in_groups_bound_the_memory_of_logits(budget, monkeypatch):
    model = model_of("gemma2")
    whole = aimed(TraceEstimator(model), batch_of(), 5)
    monkeypatch.setattr("mrd_ray.mrd.curvature.LOGITS", budget)
    torch.testing.assert_close(aimed(TraceEstimator(model), batch_of(), 5), whole, rtol=1e-9, atol=0)


@pytest.mark.parametrize("function", [torch.nn.ReLU(), torch.nn.LeakyReLU(), torch.nn.Hardswish()])
def test_a_function_with_a_kink_is_an_error(function):
    model = model_of("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = function
    with pytest.raises(NotImplementedError, match="has a kink"):
        aimed(TraceEstimator(model), batch_of(), 5)


def test_a_model_with_relu_is_refused():
    with pytest.raises(NotImplementedError, match="relu has a kink"):
        aimed(TraceEstimator(model_of("opt")), batch_of(), 5)


def test_experts_are_refused():
    with pytest.raises(NotImplementedError, match="topk jumps"):
        aimed(TraceEstimator(experts_of("mixtral")), batch_of(), 5)


def test_a_function_that_torch_cannot_differentiate_twice_is_an_error():
    model = model_of("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Mish()
    with pytest.raises(NotImplementedError):
        aimed(TraceEstimator(model), batch_of(), 5)
