"""`mrd-ray plan` counts what the main job would do, without the weights."""

import shutil

import pyarrow.parquet as pq
import pytest
from runs_of import stamps

from mrd_ray import PlanConfig, plan
from mrd_ray.cli import main
from mrd_ray.scoring.plan import Unit


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
    assert found.unscorable == 0
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
    line = ["plan", "--model.path", str(without_weights), "--data.path", str(qa_file), "--ray.cpus_per_actor", "1"]
    assert main(line) == 0
    printed = capsys.readouterr().out
    for part in ("12 (0 cannot be scored)", "work units", "measured here", "duration"):
        assert part in printed
