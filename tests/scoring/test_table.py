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
from mrd_ray.scoring.result import RESULT_SCHEMA
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
