"""What is checked of the closed form before its scores are given, and which scores are then in doubt."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from architectures import mixture_of, model_of
from rich.console import Console

from mrd_ray.config import ScoringSettings
from mrd_ray.errors import UserError
from mrd_ray.mrd import gradient_rules
from mrd_ray.scoring import summary
from mrd_ray.scoring.estimators import estimator_of
from mrd_ray.scoring.result import RESULT_SCHEMA
from mrd_ray.scoring.table import scores_table
from mrd_ray.scoring.units import first_draws


@pytest.fixture
def mixture():
    return mixture_of(torch.float32, router=30.0, experts=10.0)


@pytest.fixture
def small():
    return model_of("llama-tied", torch.float32)


def samples_of(count: int, tokens: int = 60) -> list[dict]:
    drawn = torch.randint(1, 61, (count, tokens), generator=torch.Generator().manual_seed(1)).tolist()
    flags = [False] + [True] * (tokens - 1)
    return [{"micro_batch": i // 8, "sample_id": f"s{i:02d}", "token_ids": t, "scored": flags}
            for i, t in enumerate(drawn)]  # fmt: skip


def scored(model, samples, **settings):
    """What was checked, and the scores table."""
    scoring = ScoringSettings(**({"estimator": "closed_form"} | settings))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    estimator = estimator_of(model, scoring, samples[:4])
    results = estimator(samples, first_draws(scoring))
    estimator.restore()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    row = {"unit_id": "one", "precision": estimator.precision, "checked": estimator.checked, "samples": results}
    table = pa.table(
        {"sample_id": [s["sample_id"] for s in samples], "scored": [s["scored"] for s in samples]}
        | {name: pa.nulls(len(samples), kind) for name, kind in
           (("index", pa.int64()), ("file", pa.string()), ("row", pa.int64()), ("error", pa.string()))}
    )  # fmt: skip
    of_unit = pa.Table.from_pylist([row], RESULT_SCHEMA)
    return estimator.checked, scores_table(table, np.arange(len(samples)), [(0, of_unit)], scoring)


def test_a_model_that_chooses_experts(mixture):
    checked, scores = scored(mixture, samples_of(24))
    assert checked["choices"]
    assert checked["every_sample"]
    assert checked["unchecked"] is None
    doubted = scores.filter(pc.is_valid(scores["doubt"]))
    assert 2 <= len(doubted) <= 22
    assert doubted["mrd_se"].null_count == len(doubted)
    assert doubted["mrd"].null_count == 0
    sure = scores.filter(pc.is_null(scores["doubt"]))
    assert set(sure["mrd_se"].to_pylist()) == {0.0}
    said = io.StringIO()
    Console(file=said, width=300).print(summary.doubts(scores))
    assert f"{len(doubted)} score(s) are in doubt" in said.getvalue()
    assert "control_variate" in said.getvalue()


def test_a_smooth_model_is_tried_on_two_samples(small):
    checked, scores = scored(small, samples_of(8))
    assert (checked["samples"], checked["draws"]) == (2, 2)
    assert 0 < checked["worst"] < 0.1
    assert not checked["choices"]
    assert not checked["every_sample"]
    assert scores["doubt"].null_count == 8
    assert summary.doubts(scores) == ""


def test_no_check_on_request(mixture):
    checked, scores = scored(mixture, samples_of(4), verify_draws=0)
    assert checked["unchecked"] == "scoring.verify_draws is 0"
    assert scores["doubt"].null_count == 4


def test_low_precision_cannot_check_choices(mixture, small):
    checked, scores = scored(mixture.to(torch.bfloat16), samples_of(4))
    assert "bfloat16 rounds sigma away" in checked["unchecked"]
    assert scores["doubt"].null_count == scores["mrd_se"].null_count - 4 == 0
    checked, scores = scored(small.to(torch.bfloat16), samples_of(4))
    assert "bfloat16" in checked["unchecked"]
    assert scores["doubt"].null_count == 4


def test_rounding_is_no_finding(small):
    """At so small a sigma float32 shows rounding alone; the closed form is right all the same."""
    for sigma, why in (
        (1e-8, "float32 rounds sigma away"),
        (5e-8, "float32 rounds what sigma does to the samples away"),
    ):
        checked, scores = scored(small, samples_of(4), sigma=sigma)
        assert why in checked["unchecked"]
        assert scores["doubt"].null_count == 4


def test_where_the_trial_finds_something_every_sample_is_checked(small):
    """Waves within sigma's reach, of which the gradient knows nothing."""
    small.model.layers[1].mlp.register_forward_hook(lambda _, args, y: y + 1e-3 * torch.sin(y.detach() * 3e4))
    checked, scores = scored(small, samples_of(8))
    assert checked["every_sample"]
    assert scores["doubt"].null_count < 8
    assert all("draws differ" in doubt for doubt in scores["doubt"].drop_null().to_pylist())


def test_wrong_rules_are_found_on_the_samples_themselves(small, monkeypatch):
    """Rules that are right for the few tokens of the first check, and wrong for long samples."""
    right = gradient_rules.linear

    def wrong(layer, a, g, grams):
        return {name: square * (1.05 if a.shape[1] > 20 else 1.0) for name, square in right(layer, a, g, grams).items()}

    monkeypatch.setattr(gradient_rules, "linear", wrong)
    with pytest.raises(UserError, match="does not agree with autograd on sample 's00'"):
        scored(small, samples_of(4))


@pytest.mark.slow
def test_monte_carlo_is_right_where_the_closed_form_is_in_doubt(mixture):
    """Within three of its own standard errors, which know of flips that four draws do not meet."""
    samples = samples_of(48)
    _, closed = scored(mixture, samples)
    draws = {"estimator": "monte_carlo", "micro_batch_tokens": 4096}
    _, found = scored(mixture, samples, num_draws=4, control_variate=True, **draws)
    _, many = scored(mixture, samples, num_draws=600, seed=5, **draws)
    doubted = pc.is_valid(closed["doubt"]).to_numpy(zero_copy_only=False)
    exact, a, b = (table["mrd"].to_numpy() for table in (closed, found, many))
    se = np.hypot(found["mrd_se"].to_numpy(), many["mrd_se"].to_numpy())
    assert (np.abs(a - b) <= 3 * se)[doubted].mean() >= 0.95
    assert (np.abs(exact - b) > 3 * many["mrd_se"].to_numpy())[doubted].any()
    assert np.abs(a / exact - 1)[~doubted].max() < 0.01
    assert (found["mrd_se"].to_numpy() < 0.01 * a)[~doubted].all()


def test_what_there_is_no_memory_to_check_is_in_doubt(mixture, monkeypatch):
    samples = samples_of(2)
    estimator = estimator_of(mixture, ScoringSettings(estimator="closed_form"), samples)

    def lacking(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr("mrd_ray.scoring.verification.SelfCheck.__call__", lacking)
    assert {result["doubt"] for result in estimator(samples, range(1))} == {
        "the device lacks memory to check it by draws"
    }


def test_a_unit_without_a_sample_that_fits_has_no_doubts(mixture):
    estimator = estimator_of(mixture, ScoringSettings(estimator="closed_form"), samples_of(2))
    assert estimator([], range(1)) == []
