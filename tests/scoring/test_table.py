"""Units, however cut and whatever the rounds, are gathered into a row for every sample."""

import numpy as np
import pyarrow as pa
import pytest

from mrd_ray.config import ScoringSettings
from mrd_ray.data import samples as samples_table
from mrd_ray.data.micro_batches import Layout, lay_out, lengths
from mrd_ray.mrd.monte_carlo import Moments, exact_sum
from mrd_ray.mrd.standard_errors import of_half_normal
from mrd_ray.scoring import table
from mrd_ray.scoring.result import RESULT_SCHEMA, flaw
from mrd_ray.scoring.units import Unit, cut_units, missing_units

RNG = np.random.default_rng(0)
TOKENS = np.where(RNG.random(300) < 0.1, 0, RNG.integers(2, 60, 300))
UNSETTLED = RNG.random(300) < 0.3  # have a second round
SCORING = ScoringSettings(num_draws=5)


def sample(i: int) -> dict:
    if not TOKENS[i]:
        return {"sample_id": f"s{i:03d}", **place(i), "text": "", "error": "no tokens"}
    return {"sample_id": f"s{i:03d}", **place(i), "text": "t", "token_ids": [1] * TOKENS[i],
            "scored": [False] + [True] * (TOKENS[i] - 1)}  # fmt: skip


def place(i: int) -> dict:
    """The other way round than the ids, in three files."""
    at = 299 - i
    return {"index": at, "file": f"{at // 100}.jsonl", "row": at % 100 + 1}


SAMPLES = pa.Table.from_pylist([sample(i) for i in range(300)], samples_table.SCHEMA)


def result(unit: Unit, layout: Layout) -> pa.Table:
    """Draw k of sample i has Delta = i + k, and each round another log_prob."""
    indices, _ = layout.members(unit.micro_batches)
    draws = range(unit.first_draw, unit.stop_draw)
    found = [
        {
            "sample_id": f"s{i:03d}", "log_prob": -1.0 - unit.round, "num_draws": len(draws), "measures": {},
            "sum_abs": [float(sum(i + k for k in draws))], "sum_abs_squares": [float(sum((i + k) ** 2 for k in draws))],
            "sum": [float(sum(i + k for k in draws))], "sum_squares": [float(sum((i + k) ** 2 for k in draws))],
            **{name: [] for name in Moments.sums()[4:]},
            **{name: eighths(i, draws) for name in ("abs_by_eighth", "mean_by_eighth")},
        }
        for i in indices.tolist()
    ]  # fmt: skip
    return pa.Table.from_pylist([{"unit_id": unit.unit_id, "samples": found}], RESULT_SCHEMA)


def eighths(i: int, draws: range) -> list[list[float]]:
    return [exact_sum(float(i + k) for k in draws if k % 8 == j) for j in range(8)]


def gathered(actors: int) -> pa.Table:
    rounds = [(lengths(SAMPLES), range(5)), (np.where(UNSETTLED, lengths(SAMPLES), 0), range(5, 10))]
    order = np.argsort(lengths(SAMPLES), kind="stable")
    place = np.argsort(order)
    results = []
    for number, (waiting, draws) in enumerate(rounds):
        layout = lay_out(waiting, 128)
        for unit in cut_units(layout, missing_units(number, len(layout), draws, []), actors, 100.0):
            results.append((int(place[layout.samples(unit.first_micro_batch)[0]]), result(unit, layout)))
    assert len(results) >= 4 * actors
    return table.scores_table(SAMPLES, order, sorted(results, key=lambda one: one[0]), SCORING)


@pytest.mark.parametrize("batch", [1, 8, 4096])
def test_every_sample_gets_its_own_draws_and_nothing_else(monkeypatch, batch):
    monkeypatch.setattr(table, "_BATCH", batch)
    one, eight = gathered(1), gathered(8)
    assert one.equals(eight)
    assert one.schema.field("weight").metadata == table.SCHEMA.field("weight").metadata
    assert one["sample_id"].to_pylist() == SAMPLES["sample_id"].to_pylist()
    assert one.select(table.PLACE).equals(SAMPLES.select(table.PLACE))
    for i, row in enumerate(one.to_pylist()):
        if not TOKENS[i]:
            assert (row["error"], row["mrd"], row["weight"]) == ("no tokens", None, None)
            continue
        draws = np.arange(10 if UNSETTLED[i] else 5) + i
        assert row["error"] is None
        assert row["num_draws"] == len(draws)
        assert row["mrd"] == pytest.approx(draws.mean())
        assert row["mrd_se"] == of_half_normal(draws.sum(), (draws**2).sum(), len(draws))
        assert row["mrd_eighths"] == [draws[j::8].mean() for j in range(min(8, len(draws)))]
        assert row["log_prob"] == -1.0  # of round 0, whatever comes first
        assert row["num_tokens"] == TOKENS[i] - 1
    assert sum(row for row in one["weight"].to_pylist() if row) == pytest.approx(1)


def test_samples_that_all_have_errors():
    broken = SAMPLES.filter(pa.array(TOKENS == 0))
    scores = table.scores_table(broken, np.arange(len(broken)), [], SCORING)
    assert scores["error"].to_pylist() == ["no tokens"] * len(broken)
    assert scores["weight"].null_count == len(broken)


def of_first_unit(**changes) -> tuple[pa.Table, Unit]:
    """A result of samples without errors whose first sample is changed."""
    layout = lay_out(lengths(SAMPLES), 128)
    unit = Unit(0, 0, 3, 0, 5)
    good = result(unit, layout).to_pylist()[0]
    first = good["samples"][0]
    good["samples"][0] = None if changes.pop("whole", False) else first | changes
    return pa.Table.from_pylist([good], RESULT_SCHEMA), unit


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, None),
        ({"error": "too large", "num_draws": None, "log_prob": None, "sum_abs": None}, None),
        ({"sum_abs": [], "sum_abs_squares": [], "sum": [], "sum_squares": []}, None),  # memorised to the last bit
        ({"whole": True}, "a sample is null"),
        ({"num_draws": 4}, "num_draws is not 5"),
        ({"num_draws": None}, "num_draws is not 5"),
        ({"log_prob": None}, "log_prob is null"),
        ({"log_prob": float("nan")}, "log_prob is null or not finite"),
        ({"measures": None}, "measures are null"),
        ({"sum_abs": None}, "sum_abs is null"),
        ({"sum": [None]}, "sum is null"),
        ({"sum_squares": [float("inf")]}, "sum_squares is null or not finite"),
        ({"abs_by_eighth": None}, "abs_by_eighth is null"),
        ({"mean_by_eighth": [[1.0]] * 7}, "not of 8 parts"),
        ({"mean_by_eighth": [[float("nan")]] * 8}, "mean_by_eighth is null, not finite"),
        ({"sum_abs": []}, "no draws have these moments"),
        ({"sum_abs": [1000.0], "sum": [10.0]}, "no draws have these moments"),
        ({"sum_abs": [-11.0]}, "no draws have these moments"),
        ({"sum": [1e4]}, "no draws have these moments"),
        ({"sum_squares": [1e9]}, "no draws have these moments"),
    ],
)
def test_a_result_that_cannot_be_is_found(changes, wrong):
    found = flaw(*of_first_unit(**changes), SCORING)
    assert found is None if wrong is None else wrong in found


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, None),
        ({"num_draws": 1}, "num_draws is not 2"),
        ({"gradient_norm": float("inf")}, "gradient_norm is null or not finite"),
        ({"probes": [1.0]}, "probes are not"),
        ({"probes": [1.0, None]}, "probes are not"),
        ({"measures": {"entropy": None}}, "entropy is null"),
    ],
)
def test_a_closed_form_that_cannot_be_is_found(changes, wrong):
    scoring = ScoringSettings(estimator="closed_form", curvature_probes=2, measures=("entropy", "mean_log_prob"))
    sample = {"sample_id": "a", "log_prob": -1.0, "num_draws": 2, "measures": {"entropy": 1.0}, "gradient_norm": 1.0}
    sample |= {"probes": [1.0, 2.0]} | changes
    unit = Unit(0, 0, 1, 0, 1)
    table = pa.Table.from_pylist([{"unit_id": unit.unit_id, "samples": [sample]}], RESULT_SCHEMA)
    found = flaw(table, unit, scoring)
    assert found is None if wrong is None else wrong in found


def test_moments_beyond_all_floats_are_an_error_of_the_sample():
    layout = lay_out(lengths(SAMPLES), 128)
    rows = []
    for draws in (range(5), range(5, 10)):
        (row,) = result(Unit(0, 0, len(layout), draws.start, draws.stop), layout).to_pylist()
        row["samples"][0] |= {"sum_abs": [1e154], "sum_abs_squares": [1e308]}
        rows.append((0, pa.Table.from_pylist([row], RESULT_SCHEMA)))
    order = np.argsort(lengths(SAMPLES), kind="stable")
    scores = table.scores_table(SAMPLES, order, rows, SCORING)
    errors = [error for error in scores["error"].to_pylist() if error not in (None, "no tokens")]
    assert len(errors) == 1
    assert "beyond all floats" in errors[0]
