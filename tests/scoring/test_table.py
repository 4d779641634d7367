"""Units, however cut and whatever the rounds, are gathered into a row for every sample."""

import numpy as np
import pyarrow as pa
import pytest

from mrd_ray.config import ScoringConfig
from mrd_ray.data import samples as samples_table
from mrd_ray.scoring import plan, table
from mrd_ray.scoring.actor import RESULT_SCHEMA
from mrd_ray.scoring.score import lengths

RNG = np.random.default_rng(0)
TOKENS = np.where(RNG.random(300) < 0.1, 0, RNG.integers(2, 60, 300))
UNSETTLED = RNG.random(300) < 0.3  # have a second round
SCORING = ScoringConfig(num_draws=5)


def sample(i: int) -> dict:
    if not TOKENS[i]:
        return {"sample_id": f"s{i:03d}", "row": i + 1, "text": "", "error": "no tokens"}
    return {"sample_id": f"s{i:03d}", "row": i + 1, "text": "t", "token_ids": [1] * TOKENS[i],
            "scored": [False] + [True] * (TOKENS[i] - 1)}  # fmt: skip


SAMPLES = pa.Table.from_pylist([sample(i) for i in range(300)], samples_table.SCHEMA)


def result(unit: plan.Unit, layout: plan.Layout) -> pa.Table:
    """Draw k of sample i has Delta = i + k, and each round another log_prob."""
    indices, _ = layout.members(unit.micro_batches)
    draws = range(unit.first_draw, unit.stop_draw)
    found = [
        {
            "sample_id": f"s{i:03d}", "log_prob": -1.0 - unit.round, "num_draws": len(draws), "measures": {},
            "sum_abs": [float(sum(i + k for k in draws))], "sum_abs_squares": [float(sum((i + k) ** 2 for k in draws))],
            "sum": [float(sum(i + k for k in draws))], "sum_squares": [float(sum((i + k) ** 2 for k in draws))],
            "sum_odd_squares": [],
        }
        for i in indices.tolist()
    ]  # fmt: skip
    return pa.Table.from_pylist([{"unit_id": unit.unit_id, "samples": found}], RESULT_SCHEMA)


def gathered(actors: int) -> pa.Table:
    rounds = [(lengths(SAMPLES), range(5)), (np.where(UNSETTLED, lengths(SAMPLES), 0), range(5, 10))]
    order = np.argsort(lengths(SAMPLES), kind="stable")
    place = np.argsort(order)
    results = []
    for number, (waiting, draws) in enumerate(rounds):
        layout = plan.layout(waiting, 128)
        for unit in plan.cut(layout, plan.missing(number, len(layout), draws, []), actors, 100.0):
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
    for i, row in enumerate(one.to_pylist()):
        if not TOKENS[i]:
            assert (row["error"], row["mrd"], row["weight"]) == ("no tokens", None, None)
            continue
        draws = np.arange(10 if UNSETTLED[i] else 5) + i
        assert row["error"] is None
        assert row["num_draws"] == len(draws)
        assert row["mrd"] == pytest.approx(draws.mean())
        assert row["mrd_se"] == pytest.approx(draws.std(ddof=1) / len(draws) ** 0.5)
        assert row["log_prob"] == -1.0  # of round 0, whatever comes first
        assert row["num_tokens"] == TOKENS[i] - 1
    assert sum(row for row in one["weight"].to_pylist() if row) == pytest.approx(1)


def test_samples_that_all_have_errors():
    broken = SAMPLES.filter(pa.array(TOKENS == 0))
    scores = table.scores_table(broken, np.arange(len(broken)), [], SCORING)
    assert scores["error"].to_pylist() == ["no tokens"] * len(broken)
    assert scores["weight"].null_count == len(broken)
