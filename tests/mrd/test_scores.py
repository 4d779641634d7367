"""Scores, standard errors and weights against numpy and scipy."""

import numpy as np
import pytest
from scipy import stats

from mrd_ray.mrd.monte_carlo import Moments
from mrd_ray.mrd.scores import sampling_weights, score


def test_both_statistics_and_their_standard_errors():
    deltas = np.random.default_rng(0).normal(1e-4, 3e-3, 200)
    found = score(Moments.of(deltas.tolist()))
    assert found.mean_abs == pytest.approx(np.abs(deltas).mean(), rel=1e-12)
    assert found.mean_abs_se == pytest.approx(stats.sem(np.abs(deltas)), rel=1e-9)
    assert found.abs_mean == pytest.approx(abs(deltas.mean()), rel=1e-12)
    assert found.abs_mean_se == pytest.approx(stats.sem(deltas), rel=1e-9)


def test_standard_error_is_the_spread_of_repeated_scores():
    generator = np.random.default_rng(1)
    repeats = [score(Moments.of(generator.normal(0, 1, 200).tolist())) for _ in range(500)]
    spread = np.std([one.mean_abs for one in repeats])
    assert np.mean([one.mean_abs_se for one in repeats]) == pytest.approx(spread, rel=0.1)
    assert np.mean([one.mean_abs for one in repeats]) == pytest.approx(np.sqrt(2 / np.pi), rel=0.01)


def test_one_draw_has_no_standard_error():
    assert np.isnan(score(Moments.of([0.5])).mean_abs_se)


def test_weights_are_probabilities_proportional_to_mrd():
    weights = sampling_weights(np.array([1.0, np.nan, 3.0]))
    np.testing.assert_allclose(weights, [0.25, np.nan, 0.75])
    assert np.isnan(sampling_weights(np.array([0.0, 0.0]))).all()
