"""`mrd-ray plan` counts what the main job would do, without the weights."""

import shutil

import pyarrow.parquet as pq
import pytest
from runs_of import stamps

from mrd_ray import PlanConfig, UserError, plan
from mrd_ray.cli.main import main
from mrd_ray.planning import probe
from mrd_ray.scoring.units import Unit


@pytest.fixture
def without_weights(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


def plan_config(model, data, **scoring) -> PlanConfig:
    tree = {"model": {"path": str(model)}, "data": {"path": str(data)}, "ray": {"actors": 1}, "tflops": 1e-3}
    return PlanConfig.model_validate(tree | {"scoring": {"num_draws": 12, "micro_batch_tokens": 64} | scoring})


def test_counts_are_those_of_the_run(without_weights, qa_file, reference_dir):
    found = plan(plan_config(without_weights, qa_file))
    units = [Unit.of_id(name.removesuffix(".parquet")) for name in stamps(reference_dir)]
    samples = pq.read_table(reference_dir / "samples.parquet")
    assert found.units == len(units)
    assert found.samples == len(samples)
    assert found.reasons.total() == 0
    assert found.micro_batches == max(unit.stop_micro_batch for unit in units)
    tokens = sum(len(ids) for ids in samples["token_ids"].to_pylist())
    assert tokens <= found.padded_tokens <= 1.5 * tokens
    per_token = 2 * found.parameters  # tied embeddings: every weight takes part in the forward of a token
    assert found.forward_flops == found.padded_tokens * 13 * per_token
    assert found.weight_bytes_per_actor == 2 * 4 * found.parameters
    perturbations = sum(unit.stop_draw - unit.first_draw for unit in units)
    assert found.perturbation_bytes == perturbations * 2 * 4 * found.parameters
    assert found.seconds == pytest.approx((found.forward_flops + perturbations * 256 * per_token) / 1e9)


def test_estimators_cost_what_they_do(without_weights, qa_file):
    plain = plan(plan_config(without_weights, qa_file))
    pairs = plan(plan_config(without_weights, qa_file, antithetic=True))
    closed = plan(plan_config(without_weights, qa_file, estimator="closed_form"))
    assert pairs.forward_flops == pytest.approx(plain.forward_flops * 25 / 13)
    assert closed.forward_flops == pytest.approx(plain.forward_flops * 3 / 13)
    assert closed.weight_bytes_per_actor == plain.weight_bytes_per_actor / 2
    assert closed.perturbation_bytes == 0


def test_command(without_weights, qa_file, capsys):
    line = ["plan", "--model.path", str(without_weights), "--data.path", str(qa_file), "--ray.cpus_per_process", "1"]
    assert main(line) == 0
    printed = capsys.readouterr().out
    for part in ("12 (0 cannot be scored)", "work units", "of a matrix product here", "duration", "1,000"):
        assert part in printed


def with_settings(config: PlanConfig, **settings) -> PlanConfig:
    return PlanConfig.model_validate(config.model_dump() | settings)


def test_scaling_stops_where_units_cannot_be_divided(without_weights, qa_file):
    found = plan(with_settings(plan_config(without_weights, qa_file), straggling=0.0))
    assert [one.actors for one in found.fleets] == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert found.fleets[0].efficiency == pytest.approx(1.0)
    assert found.fleets[0].seconds == pytest.approx(found.seconds)
    efficiencies = [one.efficiency for one in found.fleets]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert efficiencies[-1] < 0.1
    slower = plan(with_settings(plan_config(without_weights, qa_file), straggling=0.5))
    assert slower.fleets[3].seconds > found.fleets[3].seconds


def test_choice_by_deadline_and_by_budget(without_weights, qa_file, capsys):
    config = plan_config(without_weights, qa_file, num_draws=200)
    assert plan(config).choice is None
    cheapest = plan(with_settings(config, deadline=1.0)).choice
    assert (cheapest.met, cheapest.estimator, cheapest.course.actors) == (True, "closed_form", 1)
    hours = cheapest.course.seconds / 3600
    hurried = plan(with_settings(config, deadline=0.7 * hours)).choice
    assert hurried.met
    assert hurried.course.actors > 1
    assert hurried.course.seconds <= 0.7 * 3600 * hours
    fastest = plan(with_settings(config, budget=2 * cheapest.course.device_hours)).choice
    assert fastest.met
    assert fastest.course.seconds < cheapest.course.seconds
    assert not plan(with_settings(config, budget=1e-12)).choice.met
    adaptive = plan(with_settings(config, scoring=config.scoring.model_dump() | {"antithetic": True}, deadline=1.0))
    assert adaptive.choice.estimator == "closed_form"
    line = ["plan", "--model.path", str(without_weights), "--data.path", str(qa_file), "--tflops", "1e-3"]
    assert main([*line, "--deadline", "1"]) == 0
    assert "Choose scoring.estimator closed_form" in capsys.readouterr().out
    assert main([*line, "--budget", "1e-12"]) == 0
    assert "Nothing tried stays within that" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["monte_carlo", "closed_form"])
def test_a_probe_measures(ray_cluster, monkeypatch, tiny_model_dir, qa_file, estimator):
    monkeypatch.setattr(probe, "_SECONDS", 1.0)
    config = plan_config(tiny_model_dir, qa_file, estimator=estimator)
    found = plan(with_settings(config, tflops=None, probe=True))
    rates = found.rates
    assert "measured here, 1 actor(s)" in rates.source
    assert rates.start_up > 0
    assert rates.forward > 0
    assert (rates.perturb > 0) == (estimator == "monte_carlo")
    assert found.seconds > rates.start_up


def test_a_probe_says_what_refuses_a_run(ray_cluster, without_weights, tiny_model_dir, qa_file):
    config = with_settings(plan_config(tiny_model_dir, qa_file, sigma=1e-30), tflops=None, probe=True)
    with pytest.raises(UserError, match=r"scoring\.sigma: 1e-30"):
        plan(config)
    with pytest.raises(UserError, match=r"model\.path: .* no weights|no .*safetensors"):
        plan(with_settings(plan_config(without_weights, qa_file), tflops=None, probe=True))


def test_a_probe_excludes_a_given_rate(tiny_model_dir, qa_file):
    with pytest.raises(ValueError, match="exclude one another"):
        with_settings(plan_config(tiny_model_dir, qa_file), probe=True)
