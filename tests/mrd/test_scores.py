"""Scores, standard errors and weights against numpy and scipy."""

import numpy as np
import pytest
from scipy import stats

from mrd_ray.mrd.monte_carlo import Moments
from mrd_ray.mrd.scores import closed_form_score, folded_normal_mean, monte_carlo_score, sampling_weights


def factor(freedom):
    """Half the interval that holds what two standard deviations of a normal do."""
    return stats.t.ppf(stats.norm.cdf(2), freedom) / 2


def score(deltas):
    return monte_carlo_score(Moments.of([[delta] for delta in deltas]))


def test_both_statistics_and_their_standard_errors():
    deltas = np.random.default_rng(0).normal(1e-4, 3e-3, 200)
    found = score(deltas.tolist())
    assert found.mean_abs == pytest.approx(np.abs(deltas).mean(), rel=1e-12)
    assert found.mean_abs_se == pytest.approx(stats.sem(np.abs(deltas)), rel=0.02)
    assert found.abs_mean == pytest.approx(abs(deltas.mean()), rel=1e-12)
    assert found.abs_mean_se == pytest.approx(stats.sem(deltas) * factor(199), rel=1e-9)
    assert found.delta_std == pytest.approx(deltas.std(ddof=1), rel=1e-9)
    assert found.nonlinearity is None


def test_standard_error_is_the_spread_of_repeated_scores():
    generator = np.random.default_rng(1)
    repeats = [score(generator.normal(0, 1, 200).tolist()) for _ in range(500)]
    spread = np.std([one.mean_abs for one in repeats])
    assert np.mean([one.mean_abs_se for one in repeats]) == pytest.approx(spread, rel=0.1)
    assert np.mean([one.mean_abs for one in repeats]) == pytest.approx(np.sqrt(2 / np.pi), rel=0.01)


def test_one_draw_has_no_standard_error():
    assert score([0.5]).mean_abs_se is score([0.5]).delta_std is None


def test_weights_are_probabilities_proportional_to_mrd():
    weights = sampling_weights(np.array([1.0, np.nan, 3.0]))
    np.testing.assert_allclose(weights, [0.25, np.nan, 0.75])
    assert np.isnan(sampling_weights(np.array([0.0, 0.0]))).all()


@pytest.mark.parametrize("mu", [0.0, 0.3, -0.3, 2.0, -50.0])
@pytest.mark.parametrize("s", [1.0, 1e-4])
def test_folded_normal_mean_is_scipys(mu, s):
    assert folded_normal_mean(mu * s, s) == pytest.approx(stats.foldnorm(abs(mu), scale=s).mean(), rel=1e-12)


def test_folded_normal_mean_of_a_constant():
    assert folded_normal_mean(-2.0, 0.0) == 2.0


def test_closed_form_without_and_with_curvature():
    plain = closed_form_score(1e-3, 50.0, [])
    assert plain.mean_abs == pytest.approx(0.05 * np.sqrt(2 / np.pi))
    assert (plain.mean_abs_se, plain.abs_mean, plain.nonlinearity) == (0.0, None, None)
    probes = np.random.default_rng(0).normal(4e4, 1e4, 64)
    bent = closed_form_score(1e-3, 50.0, probes.tolist())
    mu, se = 1e-6 * probes.mean(), 1e-6 * stats.sem(probes) * factor(63)
    assert bent.mean_abs == pytest.approx(folded_normal_mean(mu, 0.05))
    assert bent.abs_mean == pytest.approx(mu)
    assert bent.abs_mean_se == pytest.approx(se)
    assert bent.nonlinearity == pytest.approx(mu / 0.05)
    sampling = (folded_normal_mean(mu + 2 * se, 0.05) - folded_normal_mean(mu, 0.05)) / 2
    added = folded_normal_mean(mu, 0.05) - folded_normal_mean(0, 0.05)  # by mu: what higher orders may be like
    assert sampling + 0.3 * added < bent.mean_abs_se < sampling + added
