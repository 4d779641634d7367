"""The paper's stopping rule, and the floor below which no state becomes the result."""

import math
from dataclasses import replace

import pytest

from mrd_ray.config import StoppingSettings
from mrd_ray.unlearning.stopping import Knowledge, below_floor, forgotten, retain_loss_limit

NAN, INF = math.nan, math.inf


def evaluation(ma=(0.5, 0.7), el=None, retain_loss=None, log_prob=(-3.0, -5.0)) -> Knowledge:
    return Knowledge([*log_prob], [*ma], el and [*el], retain_loss)


def is_forgotten(rule, before, now) -> bool:
    """Of (MAs, ELs) before and now."""
    return forgotten(StoppingSettings(forgotten=rule), evaluation(*before), evaluation(*now))


@pytest.mark.parametrize(
    ("ma", "el", "every", "mean"),
    [
        ((0.5, 0.7), None, False, False),  # as at the start
        ((0.1, 0.7), None, False, True),  # one sample is not below the initial average of 0.6
        ((0.6, 0.1), None, False, True),  # nor is one on it
        ((0.9, 0.3), None, False, False),  # nor is their mean
        ((0.0, 0.0), None, True, True),
        ((0.1, 0.1), (0.1, 0.1), True, True),
        ((0.1, 0.1), (0.1, 0.375), False, True),
        ((0.1, 0.7), (0.1, 0.1), False, True),
        ((0.1, 0.1), (0.375, 0.375), False, False),  # EL alone has not fallen
        ((0.9, 0.9), (0.1, 0.1), False, False),  # MA alone has not
        ((0.0, 0.0), (0.0, 0.0), True, True),
    ],
)
def test_the_rule(ma, el, every, mean):
    """With EL both measures must fall, without it MA."""
    before = ((0.5, 0.7), el and (0.25, 0.5))
    assert is_forgotten("every", before, (ma, el)) == every
    assert is_forgotten("mean", before, (ma, el)) == mean
    assert not is_forgotten("never", before, (ma, el))


@pytest.mark.parametrize("rule", ["every", "mean"])
def test_samples_too_short_for_extraction(rule):
    """They count in MA alone, neither in EL's averages nor against them."""
    before = ((0.5, 0.7, 0.6), (NAN, 0.2, 0.4))
    assert evaluation(*before).means()["forget_extraction_likelihood"] == pytest.approx(0.3)
    assert is_forgotten(rule, before, ((0.1, 0.1, 0.1), (NAN, 0.1, 0.2)))
    assert not is_forgotten(rule, before, ((0.1, 0.1, 0.1), (NAN, 0.4, 0.4)))
    assert not is_forgotten(rule, before, ((0.9, 0.9, 0.9), (NAN, 0.1, 0.2)))
    all_short = ((0.5, 0.7, 0.6), (NAN, NAN, NAN))
    assert evaluation(*all_short).means()["forget_extraction_likelihood"] is None
    assert is_forgotten(rule, all_short, ((0.1, 0.1, 0.1), (NAN, NAN, NAN)))
    assert not is_forgotten(rule, all_short, ((0.9, 0.9, 0.9), (NAN, NAN, NAN)))


@pytest.mark.parametrize("rule", ["every", "mean"])
def test_nothing_is_below_zero(rule):
    """Where the initial model knew nothing, knowing nothing is enough, and anything is too much."""
    before = ((0.5, 0.7), (0.0, 0.0))
    assert is_forgotten(rule, before, ((0.1, 0.1), (0.0, 0.0)))
    assert not is_forgotten(rule, before, ((0.1, 0.1), (0.0, 1e-9)))
    assert is_forgotten(rule, ((0.0, 0.0),), ((0.0, 0.0),))
    assert not is_forgotten(rule, ((0.0, 0.0),), ((0.0, 1e-9),))


def test_means():
    found = evaluation((0.5, 0.7), (NAN, 0.4), 1.5).means()
    assert found == {
        "forget_log_prob": -4.0,
        "forget_memorization_accuracy": pytest.approx(0.6),
        "forget_extraction_likelihood": 0.4,
        "retain_perplexity": pytest.approx(math.exp(1.5)),
    }


@pytest.mark.parametrize(
    ("ratio", "initial", "limit"),
    [
        (2.0, 0.5, 1.0),
        (2.0, 1.5, 1.5 + math.log(2)),  # twice the perplexity comes before twice the loss
        (2.0, 4.05, 4.05 + math.log(2)),  # twice the loss would be more than knowing nothing of 512 tokens
        (1.2, 1.5, 1.5 + math.log(1.2)),
        (2.0, 0.1, 0.2),  # where loss and nats say the same
        (2.0, 0.01, 0.11),  # memorised: twice next to nothing is next to nothing
        (2.0, 0.0, 0.1),
        (1.01, 1.5, 1.6),
        (None, 1.5, INF),
        (2.0, None, INF),
    ],
)
def test_utility_floor(ratio, initial, limit):
    stopping = StoppingSettings(max_retain_loss_ratio=ratio)
    before = evaluation(retain_loss=initial)
    found = retain_loss_limit(stopping, before)
    assert found == pytest.approx(limit)
    on_it = min(found, 1e9)
    assert below_floor(stopping, before, before) is None
    assert below_floor(stopping, before, evaluation(retain_loss=on_it)) is None
    over = below_floor(stopping, before, evaluation(retain_loss=on_it * (1 + 1e-9)))
    assert (over is None) == (limit == INF)


def test_what_the_floor_says():
    stopping = StoppingSettings(max_retain_loss_ratio=1.5)
    expected = "utility floor: the retain loss is 1.75, over 1.41 (it was 1; stopping.max_retain_loss_ratio is 1.5)"
    assert below_floor(stopping, evaluation(retain_loss=1.0), evaluation(retain_loss=1.75)) == expected


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("ratio", [2.0, None])
def test_a_model_without_finite_probabilities(bad, ratio):
    """It is no result, with or without a floor, whatever its retain loss."""
    stopping, before = StoppingSettings(max_retain_loss_ratio=ratio), evaluation(retain_loss=1.5)
    assert before.finite()
    assert evaluation().finite()
    for now in (evaluation(log_prob=(-3.0, bad), retain_loss=1.5), evaluation(retain_loss=bad)):
        assert not now.finite()
        assert below_floor(stopping, before, now).startswith("diverged")
        assert below_floor(stopping, replace(before, retain_loss=None), now).startswith("diverged")
