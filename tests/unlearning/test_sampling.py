"""Draws have the frequencies that were asked for, and are pure functions of what they are asked with."""

import numpy as np
import pytest
from draws import EXPECTED, IDS, MRD, WEIGHTINGS, agrees

from mrd_ray.errors import UserError
from mrd_ray.unlearning import sampling
from mrd_ray.unlearning.sampling import ForgetStream, ShuffledStream, choices, sampling_probabilities


@WEIGHTINGS
def test_frequencies_are_the_probabilities(weighting):
    probabilities = sampling_probabilities(IDS, MRD, weighting)
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities, EXPECTED[weighting], rtol=1e-15)
    stream = ForgetStream(probabilities, seed=1)
    assert agrees(stream.at(3, 100_000), EXPECTED[weighting])
    assert agrees(np.concatenate([stream.at(step, 8) for step in range(5000)]), EXPECTED[weighting])
    assert not agrees(stream.at(3, 100_000), np.roll(EXPECTED[weighting], 1)) or weighting == "uniform"


def test_uniform_needs_no_scores():
    np.testing.assert_allclose(sampling_probabilities(["a", "b"], None, "uniform"), [0.5, 0.5])
    with pytest.raises(UserError, match="weighting: mrd needs scores"):
        sampling_probabilities(["a", "b"], None, "mrd")


@WEIGHTINGS
@pytest.mark.parametrize(
    "mrd", [[1e-300, 1e-300, 2e-300], [1e-300, 1.0], [1e308, 1e308, 1e308], [5e-324, 1e308]], ids=str
)
def test_extreme_scores_do_not_overflow(weighting, mrd):
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        probabilities = sampling_probabilities(["x"] * len(mrd), np.array(mrd), weighting)
    assert probabilities.sum() == pytest.approx(1, abs=1e-15)
    if weighting == "inverse_mrd" and len(mrd) == 3 and mrd[0] < 1:
        np.testing.assert_allclose(probabilities, [0.4, 0.4, 0.2])


@pytest.mark.parametrize("weighting", ["mrd", "inverse_mrd"])
def test_scores_that_cannot_weigh_are_named(weighting):
    mrd = np.array([1.0, np.nan, 0.0, -2.0, np.inf, 3.0, np.nan, -np.inf])
    with pytest.raises(
        UserError,
        match=rf"weighting: {weighting} .* 6 of 8 samples have none: 's1' = nan, 's2' = 0\.0, 's3' = -2\.0, "
        r"'s4' = inf, 's6' = nan, \.\.\. .* Remove them from the forget set, or use weighting: uniform",
    ):
        sampling_probabilities([f"s{i}" for i in range(8)], mrd, weighting)
    assert sampling_probabilities([f"s{i}" for i in range(8)], mrd, "uniform").sum() == 1


@WEIGHTINGS
def test_empty_set(weighting):
    with pytest.raises(UserError, match="the forget set is empty"):
        sampling_probabilities([], np.array([]), weighting)


def test_unknown_weighting():
    with pytest.raises(UserError, match="weighting: 'hard'; expected one of mrd, inverse_mrd, uniform"):
        sampling_probabilities(IDS, MRD, "hard")


def test_draws_are_inverse_cdf():
    probabilities = EXPECTED["mrd"]
    uniforms = sampling._generator("forget", 7, 11).random(500)
    expected = []
    for u in uniforms:
        cumulative = 0.0
        for index, probability in enumerate(probabilities):
            cumulative += probability
            if u < cumulative:
                expected.append(index)
                break
    drawn = ForgetStream(probabilities, 7).at(11, 500)
    assert drawn.dtype == np.int64
    assert drawn.tolist() == expected


def test_draws_depend_on_seed_and_step_alone():
    stream = ForgetStream(EXPECTED["mrd"], 5)
    steps = [0, 1, 2, 1000, 2**40]
    drawn = {step: stream.at(step, 64).tolist() for step in steps}
    assert {step: stream.at(step, 64).tolist() for step in reversed(steps)} == drawn
    for step in steps:
        fresh = ForgetStream(EXPECTED["mrd"], 5)
        assert fresh.at(step, 64).tolist() == drawn[step]
        assert fresh.at(step, 16).tolist() == drawn[step][:16]
    others = [ForgetStream(EXPECTED["mrd"], seed).at(0, 64).tolist() for seed in (0, 1, 6, 2**64 - 1)]
    assert len({*map(tuple, others), *map(tuple, drawn.values())}) == len(others) + len(steps)
    assert stream.at(3, 0).tolist() == []


def test_streams_of_one_seed_share_no_numbers():
    purposes = ["forget", "shuffled", "choices"]
    words = [sampling._generator(purpose, s, t).random(100) for purpose in purposes for s in (0, 1) for t in (0, 1)]
    assert len(np.unique(words)) == 1200


@pytest.mark.parametrize(("seed", "step"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_seeds_and_steps_do_not_wrap_around(seed, step):
    with pytest.raises(OverflowError):
        ForgetStream(EXPECTED["mrd"], seed).at(step, 1)


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.1, 1e-300, 1e300])
def test_neither_impossible_nor_absent_indices_are_drawn(monkeypatch, scale):
    """Even from the uniform numbers at the ends of their range."""
    probabilities = np.array([0.0, 0.0, 0.1, 0.0, 0.2, 0.7, 0.0]) * scale
    assert set(ForgetStream(probabilities, 0).at(0, 10_000).tolist()) == {2, 4, 5}

    class Ends:
        def random(self, count):
            return np.resize([0.0, 5e-324, 2.0**-53, 1 - 2.0**-53], count)

    monkeypatch.setattr(sampling, "_generator", lambda *_: Ends())
    assert ForgetStream(probabilities, 0).at(0, 4).tolist() == [2, 2, 2, 5]
    many = np.random.default_rng(0).random(1001) * scale
    many[[0, -1]] = 0
    assert ForgetStream(many, 0).at(0, 4).tolist() == [1, 1, 1, 999]


@pytest.mark.parametrize("probabilities", [[], [0.0, 0.0], [1.0, -0.1], [1.0, np.nan], [np.inf, 1.0]])
def test_what_are_no_probabilities(probabilities):
    with pytest.raises(ValueError, match="expected probabilities"):
        ForgetStream(np.array(probabilities), 0)


def test_shuffled_epochs():
    sequence = ShuffledStream(50, 3).at(0, 50 * 20)
    assert sequence.dtype == np.int64
    epochs = sequence.reshape(20, 50)
    assert (np.sort(epochs) == np.arange(50)).all()
    assert len(np.unique(epochs, axis=0)) == 20
    assert (ShuffledStream(50, 4).at(0, 50) != epochs[0]).any()
    # every number equally often at every place
    places = ShuffledStream(5, 0).at(0, 5 * 5000).reshape(-1, 5)
    assert all(agrees(place, np.full(5, 0.2)) for place in places.T)


def test_any_cut_of_the_shuffled_sequence_is_the_sequence():
    sequence = ShuffledStream(7, 9).at(0, 100)
    stream, random = ShuffledStream(7, 9), np.random.default_rng(0)
    for start, stop in np.sort(random.integers(0, 101, (200, 2)), axis=1).tolist():
        assert stream.at(start, stop - start).tolist() == sequence[start:stop].tolist()
    assert ShuffledStream(7, 9).at(93, 7).tolist() == sequence[93:].tolist()
    assert ShuffledStream(1, 9).at(10**12, 3).tolist() == [0, 0, 0]


def test_what_was_handed_out_is_the_callers():
    stream = ShuffledStream(5, 0)
    first = stream.at(0, 5).copy()
    stream.at(0, 5)[:] = 0
    assert stream.at(0, 5).tolist() == first.tolist()


def test_nothing_to_shuffle():
    with pytest.raises(UserError, match="empty"):
        ShuffledStream(0, 0)


def test_choices():
    chosen = choices(2, 3, 50_000, 7)
    assert chosen.dtype == np.int64
    assert agrees(chosen, np.full(7, 1 / 7))
    assert choices(2, 3, 20, 7).tolist() == chosen[:20].tolist()
    assert len({tuple(choices(*at, 20, 7)) for at in [(2, 3), (2, 4), (3, 3), (3, 2)]}) == 4
    assert set(choices(0, 0, 10, 1).tolist()) == {0}
