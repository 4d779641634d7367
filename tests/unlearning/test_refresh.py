"""Scores of a refresh on live weights are those that a scoring actor gives for the checkpoint of the same step."""

import itertools
from pathlib import Path

import gang
import numpy as np
import pyarrow as pa
import pytest
import torch

from mrd_ray.config import ModelSettings, ScoringSettings
from mrd_ray.data.micro_batches import lay_out, lengths
from mrd_ray.models import load
from mrd_ray.models.files import model_digest
from mrd_ray.mrd.extraction import extraction_likelihoods
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch, TokenMeasures
from mrd_ray.scoring.actor import ScoringActor, ScoringSetup
from mrd_ray.scoring.table import scores_table
from mrd_ray.scoring.units import Unit, first_draws
from mrd_ray.unlearning import refresh

ESTIMATORS = {
    "closed_form": {"estimator": "closed_form"},
    "recomputing": {"estimator": "closed_form", "activation_gib": 1e-6},
    "monte_carlo": {"estimator": "monte_carlo", "num_draws": 3, "sigma": 1e-4, "antithetic": False},
}


def config(files, run, estimator, stage, **more):
    model, forget, retain, _ = files
    settings = {
        "unlearning__steps": 4, "unlearning__refresh_every": 2, "stopping__evaluate_every": 2,
        "deepspeed__zero_stage": stage, "stopping__forgotten": "never", "stopping__max_retain_loss_ratio": None,
    }  # fmt: skip
    settings |= {f"scoring__{name}": value for name, value in ESTIMATORS[estimator].items()} | more
    return gang.config(model, forget, retain, run, **settings)


def standalone(of_path: ModelSettings, samples: pa.Table, scoring: ScoringSettings) -> pa.Table:
    """What an actor of `mrd-ray score` makes of it, all in one unit."""
    layout = lay_out(lengths(samples), scoring.micro_batch_tokens)
    rows = samples.select(["sample_id", "token_ids", "scored"])
    trial = [{"micro_batch": 0, **row} for row in rows.take(layout.few(4)).to_pylist()]
    unit = Unit(0, 0, len(layout), first_draws(scoring).start, first_draws(scoring).stop)
    indices, micro_batch = layout.members(unit.micro_batches)
    actor = ScoringActor(ScoringSetup(of_path, scoring, model_digest(of_path), 1, False, trial))
    result = actor(unit.unit_id, rows.take(indices).add_column(0, "micro_batch", pa.array(micro_batch)))
    assert result["fatal"][0].as_py() is None
    return scores_table(samples, np.arange(len(samples)), [(0, result)], scoring)


def runs(ranks, configs):
    return [(reason, tables) for reason, _, tables in (gang.train(one, ranks) for one in configs)]


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_refresh_is_a_standalone_run_on_the_checkpoint(files, tmp_path, size):
    cases = [(estimator, stage) for estimator in ESTIMATORS for stage in range(4)]
    configs = [config(files, tmp_path / f"{estimator}-{stage}", estimator, stage) for estimator, stage in cases]
    found = gang.on_ranks(size, runs, configs)[0]
    samples = gang.sets_of(configs[0]).forget
    for one, (reason, tables) in zip(configs, found, strict=True):
        assert reason == "the last of 4 steps"
        assert sorted(tables) == [0, 2]
        first, second = (tables[step]["mrd"].to_numpy() for step in (0, 2))
        assert np.abs(second / first - 1).max() > 1e-3
        for step in (0, 2):
            expected = standalone(
                one.result(str(Path(one.run.dir) / "checkpoints" / str(step) / "model")), samples, one.scoring
            )
            for column in ("mrd", "log_prob"):
                np.testing.assert_allclose(tables[step][column], expected[column], rtol=1e-5, err_msg=one.run.dir)
            assert tables[step]["sample_id"] == expected["sample_id"]


@pytest.mark.slow
def test_adapters_and_bfloat16(files, tmp_path):
    lora = {"lora__rank": 2, "unlearning__learning_rate": 1e-2}
    cases = [("lora-2", 2, lora), ("lora-3", 3, lora | {"scoring__parameters": "lora"})]
    cases += [(f"bf16-{stage}", stage, {"model__dtype": "bfloat16"}) for stage in range(4)]
    configs = [config(files, tmp_path / name, "closed_form", stage, **more) for name, stage, more in cases]
    found = gang.on_ranks(2, runs, configs)[0]
    samples = gang.sets_of(configs[0]).forget
    for (name, _, _), one, (_, tables) in zip(cases, configs, found, strict=True):
        folder = Path(one.run.dir) / "checkpoints" / "2" / "model"
        assert (folder / "adapter_config.json").exists() == name.startswith("lora")
        expected = standalone(one.result(str(folder)), samples, one.scoring)
        np.testing.assert_allclose(tables[2]["mrd"], expected["mrd"], rtol=1e-5, err_msg=name)


def around_a_refresh(ranks, one, estimators):
    """Digests of the weights before and after scoring, and of training with and without it."""
    found = []
    _, loop, _ = gang.train(one, ranks, keep=False)
    for scoring in estimators:
        before = loop.engine.digest()
        refresh.score_in_place(loop.engine, loop.sets.forget, scoring)
        refresh.likelihoods(loop.engine, loop.sets.forget, 64)
        found.append((before, loop.engine.digest()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_are_the_same_after_a_refresh(files, tmp_path, stage):
    one = config(files, tmp_path, "closed_form", stage)
    estimators = [ScoringSettings(**settings) for settings in ESTIMATORS.values()]
    for rank in gang.on_ranks(2, around_a_refresh, one, estimators):
        assert all(before == after for before, after in rank)


def with_and_without(ranks, one):
    """Steps with refreshes in place, and with the same scores handed in instead."""

    def steps(**more):
        _, loop, tables = gang.train(one, ranks, keep=False, **more)
        return [line for line in loop.state.log if line["event"] == "step"], tables

    refreshed, tables = steps()
    of_all = ranks.gather([tables])[0]  # rank 0 keeps them
    live, refresh.score_in_place = refresh.score_in_place, lambda *_: of_all[sorted(of_all)[next(turn)]]
    turn = itertools.count()
    try:
        handed_in, _ = steps()
    finally:
        refresh.score_in_place = live
    return refreshed, handed_in, sorted(of_all)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_training_goes_on_as_if_there_had_been_no_refresh(files, tmp_path, stage):
    one = config(files, tmp_path, "closed_form", stage, unlearning__refresh_every=1, unlearning__steps=3)
    refreshed, handed_in, steps = gang.on_ranks(2, with_and_without, one)[0]
    assert steps == [0, 1, 2]
    for a, b in zip(refreshed, handed_in, strict=True):
        for name in ("forget_loss", "retain_loss", "grad_norm"):
            assert a[name] == b[name]


def measured(ranks, one):
    _, loop, _ = gang.train(one, ranks, keep=False)
    loop.engine.save_model(Path(one.run.dir) / "model")
    return loop.evaluate()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_memorization_accuracy_and_extraction_of_live_weights(files, tmp_path, stage):
    one = config(files, tmp_path, "closed_form", stage, stopping__extraction_n=2)
    first, second = gang.on_ranks(2, measured, one)
    assert first == second

    model = load.load_model(ModelSettings(path=str(tmp_path / "model")), torch.device("cpu"))
    samples = gang.sets_of(one).forget.to_pylist()
    for i, row in enumerate(samples):
        batch = MicroBatch.collate([row["token_ids"]], [row["scored"]], model.device)
        measures = TokenMeasures(batch)
        log_prob = -Likelihood(model).log_neg_log_probs(batch, measures).exp()[batch.scored].sum().item()
        assert first.log_prob[i] == pytest.approx(log_prob, rel=1e-5)
        assert first.memorization_accuracy[i] == measures.means()["memorization_accuracy"][0]
    expected = extraction_likelihoods(model, [row["token_ids"] for row in samples], 2)
    np.testing.assert_allclose(first.extraction_likelihood, expected)
