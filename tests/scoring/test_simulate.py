"""Simulated actors against sums done by hand."""

import numpy as np
import pytest

from mrd_ray.data.micro_batches import Layout
from mrd_ray.planning.simulate import Fleet, Rates, simulate
from mrd_ray.scoring.units import Unit

LAYOUT = Layout(np.arange(8), np.arange(9), np.full(8, 100))
RATES = Rates(start_up=10.0, theta=0.01, perturb=0.5, forward=0.02, source="")


def units(draws: int, blocks: int = 4) -> list[Unit]:
    """Of two micro-batches and so many draws each, two of a block after one another."""
    return [Unit(0, 2 * b, 2 * b + 2, k, k + draws) for b in range(blocks) for k in (0, draws)]


def test_one_actor_runs_each_block_at_theta_once():
    course = simulate(units(3), LAYOUT, RATES, Fleet(1))
    assert course.seconds == pytest.approx(10 + 4 * 200 * 0.01 + 8 * 3 * (0.5 + 200 * 0.02))
    assert course.device_seconds == course.seconds
    assert course.units_lost == 0


def test_actors_share_what_there_is_and_wait_for_the_last():
    of_unit = 200 * 0.01 + 3 * (0.5 + 200 * 0.02)  # two actors that take turns both run every block at theta
    course = simulate(units(3), LAYOUT, RATES, Fleet(2))
    assert course.seconds == pytest.approx(10 + 4 * of_unit)
    three = simulate(units(3), LAYOUT, RATES, Fleet(3))
    assert three.seconds == pytest.approx(10 + 3 * of_unit)
    assert three.device_seconds == pytest.approx(3 * three.seconds)
    many = simulate(units(3), LAYOUT, RATES, Fleet(100))
    assert many.seconds == pytest.approx(10 + of_unit)


def test_nothing_to_do():
    assert simulate([], LAYOUT, RATES, Fleet(3)).seconds == 0.0


def test_stragglers_are_as_slow_as_the_slowest():
    slowest = np.exp(0.3 * np.random.default_rng(0).standard_normal(8)).max()
    course = simulate(units(3), LAYOUT, RATES, Fleet(8, straggling=0.3))
    assert course.seconds == pytest.approx(10 + slowest * (200 * 0.01 + 3 * (0.5 + 200 * 0.02)))


def test_lost_units_are_made_again():
    """With exponential lives, a unit of d seconds ends without a loss with probability e^(-d / life)."""
    many = units(10, 4) * 50
    of_unit = 200 * 0.01 + 10 * (0.5 + 200 * 0.02)
    course = simulate(many, LAYOUT, RATES, Fleet(4, losses_per_hour=20.0))
    expected = len(many) * (np.exp(of_unit * 20 / 3600) - 1)
    assert course.units_lost == pytest.approx(expected, rel=0.25)
    assert course.seconds > simulate(many, LAYOUT, RATES, Fleet(4)).seconds
    assert course == simulate(many, LAYOUT, RATES, Fleet(4, losses_per_hour=20.0))
