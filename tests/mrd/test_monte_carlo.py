"""Against Algorithm 1 written out line by line in float64, with the same draws."""

import copy
import itertools
import math
import random

import numpy as np
import pytest
import scipy.stats
import torch
from architectures import memorise
from transformers import AutoModelForCausalLM, LlamaConfig

from mrd_ray.models.load import weights_digest
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import Moments, draw_deltas, exact_sum, noise_key
from mrd_ray.mrd.noise import standard_normal
from mrd_ray.mrd.perturb import Replica
from mrd_ray.mrd.scores import monte_carlo_score

K = 16


def model_of(tied: bool = True, memorised: list[list[int]] | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
    )
    if memorised:
        memorise(model, memorised)
    return model.eval()


def log_probs(model: torch.nn.Module, sample: list[int]) -> list[torch.Tensor]:
    """log(-log p(x_t | x_<t)) for t = 1.., in float64, in a form exact for memorised tokens too."""
    logits = model(torch.tensor([sample])).logits[0].double()
    found = []
    for t in range(1, len(sample)):
        row = logits[t - 1]
        a = row[torch.arange(len(row)) != sample[t]].logsumexp(0) - row[sample[t]]
        found.append(-a.exp().log1p())
    return found


@torch.no_grad()
def algorithm_1(
    model: torch.nn.Module, sample: list[int], scored: list[bool], sigma: float, seed: int, num_draws: int = K
) -> list[float]:
    """Delta_k as in the paper, for one sample at a time; float64 whatever the model's dtype."""
    model = copy.deepcopy(model).double()
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    before = log_probs(model, sample)
    deltas = []
    for k in range(num_draws):
        for name, parameter in model.named_parameters():
            z = standard_normal(noise_key(seed, k), name, 0, parameter.numel()).double().view_as(parameter)
            parameter.copy_(kept[name] + sigma * z)
        after = log_probs(model, sample)
        deltas.append(sum(float((p - q) / p) for p, q, counts in zip(before, after, scored[1:], strict=True) if counts))
    return deltas


def engine(model, samples, scored, sigma, seed, draws=range(K)):
    batch = MicroBatch.collate(samples, scored, torch.device("cpu"))
    model = copy.deepcopy(model)  # its parameters become the working copy
    replica, likelihood = Replica(model), Likelihood(model)
    theta = [likelihood.log_neg_log_probs(batch)]
    (deltas,) = draw_deltas(replica, likelihood, [batch], theta, sigma, seed, draws)
    return deltas[:, :, 0].tolist()


SAMPLES = [[1, 5, 9, 3, 22, 17, 40, 8], [1, 33, 2], [1, 7], [1, 60, 59, 3, 3, 3, 12, 14, 50, 20, 31, 44]]
ALL = [[True] * len(sample) for sample in SAMPLES]
RESPONSE = [[False] * 3 + [True] * 5, [False, False, True], [False, True], [False] * 9 + [True] * 3]


def score(deltas):
    return monte_carlo_score(Moments.of([[delta] for delta in deltas]))


def relative_errors(found, expected):
    pairs = [(score(a), score(b)) for a, b in zip(found, expected, strict=True)]
    return [abs(a.mean_abs / b.mean_abs - 1) for a, b in pairs]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scored", [ALL, RESPONSE], ids=["all", "response"])
@pytest.mark.parametrize("sigma", [1e-5, 1e-3])
def test_float64_is_algorithm_1(tied, scored, sigma):
    model = model_of(tied).double()
    expected = [algorithm_1(model, *sample, sigma, seed=3) for sample in zip(SAMPLES, scored, strict=True)]
    found = engine(model, SAMPLES, scored, sigma, seed=3)
    assert max(relative_errors(found, expected)) < 1e-9
    for a, b in zip(found, expected, strict=True):
        assert score(a).abs_mean == pytest.approx(score(b).abs_mean, rel=1e-7)


@pytest.mark.parametrize(("sigma", "tolerance"), [(1e-3, 1e-4), (1e-5, 5e-3)])
@pytest.mark.parametrize("scored", [ALL, RESPONSE], ids=["all", "response"])
def test_float32_to_its_rounding(sigma, tolerance, scored):
    model = model_of()
    expected = [algorithm_1(model, *sample, sigma, seed=3) for sample in zip(SAMPLES, scored, strict=True)]
    assert max(relative_errors(engine(model, SAMPLES, scored, sigma, seed=3), expected)) < tolerance


@pytest.fixture(scope="module")
def memorised():
    return model_of(memorised=SAMPLES)


@pytest.mark.parametrize(("sigma", "tolerance"), [(1e-3, 1e-4), (1e-5, 5e-3)])
def test_memorised_samples(memorised, sigma, tolerance):
    """Probability 1 to float32 rounding, where (P - P')/P taken literally is 0/0."""
    model = memorised
    p = model(torch.tensor([SAMPLES[3]])).logits[0, :-1].log_softmax(-1)[range(11), SAMPLES[3][1:]]
    assert int((p == 0).sum()) >= 5
    expected = [algorithm_1(model, *sample, sigma, seed=3) for sample in zip(SAMPLES, ALL, strict=True)]
    found = engine(model, SAMPLES, ALL, sigma, seed=3)
    assert all(math.isfinite(delta) for deltas in found for delta in deltas)
    assert max(relative_errors(found, expected)) < tolerance


def test_one_by_one_equals_batched():
    model = model_of().double()
    together = engine(model, SAMPLES, ALL, 1e-3, seed=1)
    alone = [engine(model, [s], [m], 1e-3, seed=1)[0] for s, m in zip(SAMPLES, ALL, strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_base_weights_are_untouched_and_restored():
    model = model_of()
    before = weights_digest(dict(model.named_parameters()))
    replica = Replica(model)
    replica.perturb(1e-2, 5)
    assert weights_digest({name: shard.tensor for name, shard in replica.working().items()}) != before
    assert weights_digest(replica.base) == before
    replica.restore()
    assert weights_digest(dict(model.named_parameters())) == before


@pytest.mark.parametrize("selected", [None, ["model.norm.weight"]])
def test_memory_of_a_restored_model_is_that_which_it_came_in(selected):
    """An optimiser, or the file of the weights, is bound to it."""
    model = model_of()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    replica = Replica(model, selected)
    for seed in (5, 6):
        replica.perturb(1e-2, seed)
        moved = {name for name, parameter in model.named_parameters() if parameter.data_ptr() != before[name]}
        assert moved == set(selected or before)
        replica.restore()
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_perturbation_is_the_noise_whatever_the_number_of_threads():
    model = model_of(tied=False)
    replica = Replica(model)
    replica.perturb(1e-2, 5)
    for name, parameter in model.named_parameters():
        z = standard_normal(5, name, 0, parameter.numel()).view_as(parameter)
        torch.testing.assert_close(parameter.data, replica.base[name] + 1e-2 * z, rtol=1e-6, atol=1e-8)
    one = weights_digest({name: shard.tensor for name, shard in replica.working().items()})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        other = Replica(model)
        other.base = replica.base
        other.perturb(1e-2, 5)
    finally:
        torch.set_num_threads(threads)
    assert weights_digest({name: shard.tensor for name, shard in other.working().items()}) == one


@pytest.mark.parametrize("antithetic", [False, True])
def test_moments_merge_to_the_same_bits_however_they_are_cut(antithetic):
    gauss = [random.Random(i).gauss(1e-4, 1e-2) * 10 ** (i % 7 - 3) for i in range(400)]
    deltas = (
        [[a, b] for a, b in zip(gauss[::2], gauss[1::2], strict=True)] if antithetic else [[a] for a in gauss[:200]]
    )
    whole = Moments.of(deltas)
    for cuts in ([50], [1, 2, 199], [7, 50, 120]):
        edges = [0, *cuts, 200]
        parts = [Moments.of(deltas[a:b]) for a, b in itertools.pairwise(edges)]
        random.Random(0).shuffle(parts)
        assert monte_carlo_score(Moments.merge(parts)) == monte_carlo_score(whole)


def test_exact_sum():
    assert math.fsum(exact_sum([1e16, 1.0, -1e16])) == 1.0
    assert math.fsum(exact_sum([*exact_sum([1e300, 1.0]), *exact_sum([-1e300, 1e-300])])) == 1.0
    assert math.isnan(exact_sum([1.0, math.inf])[0])
    assert exact_sum([]) == []


def test_draws_of_different_seeds_differ():
    assert len({noise_key(seed, k) for seed in range(5) for k in range(200)}) == 1000


def test_antithetic_pairs_are_both_signs_of_the_same_noise():
    """theta - delta is Algorithm 1 with sigma negated; the pair gives |Delta|, the even and the odd part."""
    model = model_of().double()
    batch = MicroBatch.collate(SAMPLES, ALL, torch.device("cpu"))
    plus, minus = (
        [algorithm_1(model, *sample, sigma, seed=3) for sample in zip(SAMPLES, ALL, strict=True)]
        for sigma in (1e-3, -1e-3)
    )
    copied = copy.deepcopy(model)
    replica, likelihood = Replica(copied), Likelihood(copied)
    theta = [likelihood.log_neg_log_probs(batch)]
    (pairs,) = draw_deltas(replica, likelihood, [batch], theta, 1e-3, 3, range(K), antithetic=True)
    for of_sample, a, b in zip(pairs.tolist(), plus, minus, strict=True):
        found = monte_carlo_score(Moments.of(of_sample), antithetic=True)
        a, b = np.array(a), np.array(b)
        assert found.mean_abs == pytest.approx((np.abs(a) + np.abs(b)).mean() / 2, rel=1e-7)
        assert found.delta_mean == pytest.approx((a + b).mean() / 2, rel=1e-5)
        students = scipy.stats.t.ppf(scipy.stats.norm.cdf(2), K - 1) / 2
        assert found.abs_mean_se == pytest.approx(students * ((a + b) / 2).std(ddof=1) / K**0.5, rel=1e-5)
        assert found.delta_std == pytest.approx(((a - b) ** 2).mean() ** 0.5 / 2, rel=1e-7)
        assert found.nonlinearity == pytest.approx(abs((a + b).mean()) / 2 / found.delta_std, rel=1e-5)


def test_only_selected_parameters_are_perturbed():
    model = model_of()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    Replica(model, ["model.norm.weight"]).perturb(1e-2, 5)
    assert [n for n, p in model.named_parameters() if not torch.equal(p, before[n])] == ["model.norm.weight"]
