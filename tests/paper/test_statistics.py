"""Estimates and intervals against scipy and closed forms."""

import math

import numpy as np
import pytest
import scipy.stats

from jobs.paper.statistics import excess, mean, spearman, variation


@pytest.fixture(scope="module")
def triple():
    rng = np.random.default_rng(1)
    x = rng.normal(size=60)
    return x, x + rng.normal(size=60), rng.integers(0, 5, size=60) + x


def test_mean_is_students():
    found = mean([1.0, 2.0, 4.0])
    half = scipy.stats.t.ppf(0.975, 2) * np.std([1, 2, 4], ddof=1) / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half))
    assert not found.decided
    assert mean([1.0, 1.1, 0.9]).decided


def test_spearman(triple):
    x, y, _ = triple
    found = spearman(x, y)
    assert found.value == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    # Fisher's interval, with the variance of Bonett and Wright (2000) for ranks
    half = 1.96 * math.sqrt((1 + found.value**2 / 2) / (len(x) - 3))
    low, high = np.tanh(np.arctanh(found.value) + np.array([-half, half]))
    assert found.low == pytest.approx(low, abs=0.08)
    assert found.high == pytest.approx(high, abs=0.08)
    assert str(found) == f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"


def test_partial_spearman_is_the_correlation_of_residual_ranks(triple):
    ranks = [scipy.stats.rankdata(values) for values in triple]
    x, y = (values - np.polyval(np.polyfit(ranks[2], values, 1), ranks[2]) for values in ranks[:2])
    assert spearman(*triple).value == pytest.approx(scipy.stats.pearsonr(x, y).statistic)


def test_excess_compares_strengths_whatever_their_signs(triple):
    x, y, _ = triple
    noise = np.random.default_rng(2).normal(size=60)
    assert excess(-x, noise, y).low > 0
    assert excess(noise, -x, y).high < 0
    assert excess(x, -x, y).value == 0


def test_variation_and_values_that_are_all_alike():
    values = [3.0, 4.0, 5.0, 8.0]
    assert variation(values).value == pytest.approx(np.std(values, ddof=1) / 5)
    alike = spearman(range(12), [5] * 12)
    assert math.isnan(alike.value)
    assert not alike.decided
    assert str(mean([2.0, 2.0])) == "2"


def test_of_few_samples_there_is_no_verdict():
    assert spearman([1, 2, 3], [3, 2, 1]).value == -1
    assert not spearman([1, 2, 3], [3, 2, 1]).decided
    assert not spearman(range(9), range(9)).decided
    assert spearman(range(10), range(10)).decided


def test_intervals_of_many_comparisons_are_wider(triple):
    x, y, _ = triple
    one, four = spearman(x, y), spearman(x, y, comparisons=4)
    assert four.low < one.low < one.high < four.high
    half = scipy.stats.t.ppf(1 - 0.025 / 4, 2) * np.std([1, 2, 4], ddof=1) / math.sqrt(3)
    assert mean([1.0, 2.0, 4.0], comparisons=4).high == pytest.approx(7 / 3 + half)
