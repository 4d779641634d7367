"""The main job through real Ray: right, invariant, resumable, and loud about what it cannot score."""

import copy
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from runs_of import config, stamps
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrd_ray import (
    CompareConfig,
    ModelSettings,
    MRDSampler,
    ReportConfig,
    ScoringSettings,
    UserError,
    compare,
    score,
    write_report,
)
from mrd_ray.cli.main import main
from mrd_ray.data.samples import PLACE
from mrd_ray.errors import Unfit
from mrd_ray.models.files import model_digest
from mrd_ray.mrd.double import Float64, keep_float64
from mrd_ray.mrd.monte_carlo import noise_key
from mrd_ray.mrd.noise import standard_normal
from mrd_ray.scoring.actor import ScoringActor, ScoringSetup
from mrd_ray.scoring.units import Unit


@torch.no_grad()
def algorithm_1(model, tokens, scored, sigma, seed, num_draws):
    """Line by line, one sample at a time, in float64: both statistics."""
    model = copy.deepcopy(model).double()
    theta = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def log_probs():
        logits = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        return logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0][torch.tensor(scored[1:])]

    before, deltas = log_probs(), []
    for k in range(num_draws):
        for name, parameter in model.named_parameters():
            z = standard_normal(noise_key(seed, k), name, 0, parameter.numel()).double().view_as(parameter)
            parameter.copy_(theta[name] + sigma * z)
        deltas.append(float(((before - log_probs()) / before).sum()))
    return np.abs(deltas).mean(), abs(np.mean(deltas))


@pytest.fixture(scope="module")
def reference(reference_dir):
    """Its scores, which other ways to compute them must equal to the last bit."""
    return pq.read_table(reference_dir / "scores.parquet")


def test_equals_algorithm_1(tiny_model_dir, qa_file, tmp_path):
    """In float64, through the main job; float32 and memorised samples are held against it in tests/mrd."""
    settings = {"model__dtype": "float64", "scoring__seed": 7, "data__score_on": "response"}
    found = score(config(tiny_model_dir, qa_file, tmp_path, **settings))
    with Float64():
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64).eval()
    keep_float64(model)
    for row, sample in zip(found.scores.to_pylist(), found.samples.to_pylist(), strict=True):
        mean_abs, abs_mean = algorithm_1(model, sample["token_ids"], sample["scored"], 1e-5, 7, 12)
        assert row["mean_abs"] == row["mrd"] == pytest.approx(mean_abs, rel=1e-9)
        assert row["abs_mean"] == pytest.approx(abs_mean, rel=1e-6)
        assert row["num_tokens"] == sum(sample["scored"])
        assert 0 < row["mrd_se"] < row["mrd"]
    assert sum(found.scores["weight"].to_pylist()) == pytest.approx(1)


@pytest.mark.parametrize("actors", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_neither_actors_nor_order_of_rows_change_a_bit(tiny_model_dir, qa_file, tmp_path, reference, actors):
    lines = qa_file.read_text().splitlines()
    random.Random(actors).shuffle(lines)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(lines))
    found = score(config(tiny_model_dir, shuffled, tmp_path / "run", ray__actors=actors))
    assert found.scores.drop_columns(PLACE).equals(reference.drop_columns(PLACE))
    written = [json.loads(lines[index])["id"] for index in found.scores["index"].to_pylist()]
    assert written == found.scores["sample_id"].to_pylist()
    assert found.scores.select(PLACE).equals(found.samples.select(PLACE))


def test_a_run_of_an_earlier_version(tiny_model_dir, qa_file, tmp_path, reference, reference_dir):
    """Without places it can be read, but for a sampler without ids; started again, it has them and computes nothing."""
    run = tmp_path / "run"
    shutil.copytree(reference_dir, run)
    for name in ("scores.parquet", "samples.parquet"):
        pq.write_table(pq.read_table(run / name).drop_columns(["index", "file"]), run / name)
    pq.write_table(pq.read_table(run / "scores.parquet").drop_columns("row"), run / "scores.parquet")
    compared = compare(CompareConfig(run_a=str(run), run_b=str(reference_dir)))
    assert (compared.compared, compared.spearman) == (len(reference), 1.0)
    write_report(ReportConfig(runs=[str(run)], out=str(tmp_path / "report.html")))
    ids = reference["sample_id"]
    expected = list(MRDSampler(reference_dir / "scores.parquet"))
    assert list(MRDSampler(run / "scores.parquet", ids.take(pc.sort_indices(reference["index"])))) == expected
    with pytest.raises(UserError, match=r"scores\.parquet: no column index or row.* again on the same directory"):
        MRDSampler(run / "scores.parquet")
    before = stamps(run)
    assert score(config(tiny_model_dir, qa_file, run)).scores.equals(reference)
    assert stamps(run) == before
    assert pq.read_table(run / "scores.parquet").equals(reference)
    assert list(MRDSampler(run / "scores.parquet")) == expected


def test_a_finished_run_on_reordered_rows(tiny_model_dir, qa_file, tmp_path, reference, reference_dir):
    """The samples are the same, so it goes on; both tables say where they are now."""
    run, data = tmp_path / "run", tmp_path / "reversed.jsonl"
    shutil.copytree(reference_dir, run)
    data.write_text("\n".join(qa_file.read_text().splitlines()[::-1]))
    found, before = score(config(tiny_model_dir, data, run)), stamps(run)
    assert stamps(run) == before == stamps(reference_dir)
    for table in (pq.read_table(run / "scores.parquet"), pq.read_table(run / "samples.parquet"), found.scores):
        assert table["index"].to_pylist() == [11 - index for index in reference["index"].to_pylist()]


def test_scores_of_other_samples_are_refused(tiny_model_dir, qa_file, tmp_path, reference_dir):
    """Where they are matched with samples by place: those of a file that was changed meanwhile."""
    run, data = tmp_path / "run", tmp_path / "data.jsonl"
    shutil.copytree(reference_dir, run)
    data.write_text(qa_file.read_text())
    found = score(config(tiny_model_dir, data, run))
    found.refuse_other_samples(pq.read_table(reference_dir / "samples.parquet"))
    for column in ("sample_id", "token_ids", "scored"):
        i, field = found.samples.schema.get_field_index(column), found.samples.schema.field(column)
        values = found.samples[column].to_pylist()
        other = found.samples.set_column(i, field, pa.array([*values[:-1], values[0]], field.type))
        with pytest.raises(UserError, match=r"^data\.path: .*data\.jsonl has changed since this run read it"):
            found.refuse_other_samples(other)


@pytest.mark.slow
def test_more_draws_later_change_no_bit_and_repeat_nothing(tiny_model_dir, qa_file, tmp_path, reference):
    few = score(config(tiny_model_dir, qa_file, tmp_path, scoring__num_draws=5)).scores
    assert set(few["num_draws"].to_pylist()) == {5}
    before = stamps(tmp_path)
    assert score(config(tiny_model_dir, qa_file, tmp_path)).scores.equals(reference)
    assert before.items() < stamps(tmp_path).items()
    with pytest.raises(UserError, match=r"scoring\.num_draws"):
        score(config(tiny_model_dir, qa_file, tmp_path, scoring__num_draws=5))


def test_finished_run_is_only_summed_up_again(tiny_model_dir, qa_file, tmp_path, reference_dir, reference):
    run = shutil.copytree(reference_dir, tmp_path / "run")
    before = stamps(run)
    again = score(config(tiny_model_dir, qa_file, run, scoring__statistic="abs_mean")).scores
    assert stamps(run) == before
    assert again["mrd"].equals(reference["abs_mean"])


def test_config_yaml_replays(tmp_path, reference_dir, reference):
    run = shutil.copytree(reference_dir, tmp_path / "run")
    before = stamps(run)
    assert main(["score", "--config", str(run / "config.yaml"), "--run.dir", str(run)]) == 0
    assert stamps(run) == before
    assert pq.read_table(run / "scores.parquet").equals(reference)


LONG = {"scoring__num_draws": 400, "ray__actors": 2}  # seconds of work in many units


@pytest.fixture(scope="module")
def long_reference(tiny_model_dir, qa_file, tmp_path_factory):
    return score(config(tiny_model_dir, qa_file, tmp_path_factory.mktemp("long"), **LONG)).scores


def start_driver(model: Path, data: Path, run: Path) -> subprocess.Popen:
    """The same run as a process of its own, once it has finished its first unit."""
    command = [sys.executable, "-m", "mrd_ray", "score", "--model.path", model, "--data.path", data, "--run.dir", run]
    command += ["--scoring.num_draws", "400", "--scoring.micro_batch_tokens", "64", "--ray.actors", "2"]
    driver = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: (run / "units").is_dir() and stamps(run), driver)
    return driver


def wait_for(condition, driver: subprocess.Popen, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, f"the driver ended: {driver.stdout.read().decode()}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def actors() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if "MapWorker" in " ".join(p.info["cmdline"] or [])]


@pytest.mark.slow
def test_killed_actor(tiny_model_dir, qa_file, tmp_path, long_reference):
    driver = start_driver(tiny_model_dir, qa_file, tmp_path / "run")
    victims = actors()
    assert victims
    os.kill(victims[0].pid, signal.SIGKILL)
    assert driver.wait(120) == 0, driver.stdout.read().decode()
    assert pq.read_table(tmp_path / "run" / "scores.parquet").equals(long_reference)


def test_killed_driver(tiny_model_dir, qa_file, tmp_path, long_reference):
    run = tmp_path / "run"
    driver = start_driver(tiny_model_dir, qa_file, run)
    with pytest.raises(UserError, match="another run"):
        score(config(tiny_model_dir, qa_file, run, **LONG))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = stamps(run)
    assert not (run / "scores.parquet").exists()
    assert score(config(tiny_model_dir, qa_file, run, **LONG)).scores.equals(long_reference)
    assert before.items() < stamps(run).items()


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("scoring__sigma", 1e-4, "scoring.sigma: 1e-05 there, 0.0001 now"),
        ("scoring__seed", 1, "scoring.seed"),
        ("data__template", "{prompt} {response}", "data.template"),
        ("data__score_on", "response", "data.score_on"),
        ("model__dtype", "float64", "model.dtype"),
        ("scoring__micro_batch_tokens", 128, "scoring.micro_batch_tokens"),
    ],
)
def test_other_settings_on_the_directory_are_refused(tiny_model_dir, qa_file, reference_dir, setting, value, named):
    with pytest.raises(UserError, match="What differs") as refusal:
        score(config(tiny_model_dir, qa_file, reference_dir, **{setting: value}))
    assert named in str(refusal.value)


def test_other_model_or_tokenizer_on_the_directory_is_refused(tiny_model_dir, qa_file, reference_dir, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(tiny_model_dir, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(other)
    with pytest.raises(UserError, match=r"  model: \w+ there, \w+ now"):
        score(config(other, qa_file, reference_dir))

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = {"model__tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(UserError, match=r"  tokenizer: \w+ there, \w+ now"):
        score(config(tiny_model_dir, qa_file, reference_dir, **settings))


def test_bad_samples_keep_a_row_and_stop_nobody(tiny_model_dir, qa_file, tmp_path, reference, capsys):
    data = tmp_path / "mixed.jsonl"
    bad = [
        {"id": "bad-empty", "prompt": "what", "response": "  "},
        {"id": "bad-number", "prompt": "what", "response": 7},
        {"id": "bad-long", "prompt": "what " * 500, "response": "that"},
    ]
    data.write_text(qa_file.read_text().strip() + "\n" + "\n".join(map(json.dumps, bad)) + "\n")
    code = main(
        ["score", "--model.path", str(tiny_model_dir), "--data.path", str(data), "--run.dir", str(tmp_path / "run"),
         "--scoring.num_draws", "12", "--scoring.micro_batch_tokens", "64", "--ray.actors", "1"]
    )  # fmt: skip
    assert code == 3
    printed = capsys.readouterr().out
    assert "Without a score" in printed
    assert "is empty" in printed
    table = pq.read_table(tmp_path / "run" / "scores.parquet")
    errors = {row["sample_id"]: row["error"] for row in table.to_pylist() if row["error"]}
    assert errors.keys() == {"bad-empty", "bad-number", "bad-long"}
    assert "not text but a number: 7" in errors["bad-number"]
    assert "over the limit" in errors["bad-long"]
    good = table.filter(pc.is_null(table["error"]))
    assert good["mrd"].to_pylist() == reference["mrd"].to_pylist()
    assert sum(good["weight"].to_pylist()) == pytest.approx(1)
    assert (tmp_path / "run" / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_no_sample_can_be_scored(tiny_model_dir, tmp_path):
    data = tmp_path / "empty.jsonl"
    data.write_text('{"text": ""}\n{"text": null}\n')
    found = score(config(tiny_model_dir, data, tmp_path / "run"))
    assert found.num_errors == 2
    assert found.scores["mrd"].null_count == 2


def test_sigma_that_breaks_the_forward_is_an_error_of_each_sample(tiny_model_dir, qa_file, tmp_path):
    settings = {"scoring__sigma": 1e38, "scoring__num_draws": 2, "scoring__allow_low_precision": True}
    found = score(config(tiny_model_dir, qa_file, tmp_path, **settings))
    assert found.num_errors == len(found.scores)
    assert "sigma too large?" in found.scores["error"][0].as_py()


def first_word_of(model: Path, **scoring) -> dict:
    """What an actor makes of a unit without samples."""
    of_path = ModelSettings(path=str(model))
    sample = {"micro_batch": 0, "sample_id": "s", "token_ids": [5, 6, 7], "scored": [False, True, True]}
    actor = ScoringActor(ScoringSetup(of_path, ScoringSettings(**scoring), model_digest(of_path), 1, False, [sample]))
    (row,) = actor(Unit(0, 0, 1, 0, 1).unit_id, pa.table({})).to_pylist()
    return row


def test_weights_that_are_written_to_while_they_are_in_use(tiny_model_dir, tmp_path):
    """On a CPU they are the file, mapped."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    of_path = ModelSettings(path=str(folder))
    sample = {"micro_batch": 0, "sample_id": "s", "token_ids": [5, 6, 7], "scored": [False, True, True]}
    task = ScoringSetup(of_path, ScoringSettings(estimator="closed_form"), model_digest(of_path), 1, False, [sample])
    actor, unit, block = ScoringActor(task), Unit(0, 0, 1, 0, 1).unit_id, pa.Table.from_pylist([sample])
    assert actor(unit, block)["fatal"].to_pylist() == [None]
    shutil.copy(folder / "model.safetensors", folder / "other")
    (folder / "other").replace(folder / "model.safetensors")  # the weights in use live on
    assert actor(unit, block)["fatal"].to_pylist() == [None]
    actor = ScoringActor(task)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\x40")
    assert "was written to while its weights were in use" in actor(unit, block)["fatal"].to_pylist()[0]


def test_sigma_that_breaks_the_forward_is_refused(tiny_model_dir):
    refusal = first_word_of(tiny_model_dir, sigma=1e38)["fatal"]
    assert "causes infinite values" in refusal
    assert "scoring.sigma: 1e-05" in refusal


def test_nan_weights_are_refused_by_name(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(Unfit, match=r"first in model\.layers\.1\.mlp\.up_proj\.weight"):
        first_word_of(tmp_path)


def test_gpu_that_is_not_there(tiny_model_dir, qa_file, tmp_path):
    """A cluster that was there before may still get one; without a number of actors there is nothing to wait for."""
    wanted = {"ray__gpus_per_actor": 1, "ray__start_timeout": 1.0}
    with pytest.raises(UserError, match=r"ray\.start_timeout: no room for 1 of 1 CPU and 1 GPU each within 1 s"):
        score(config(tiny_model_dir, qa_file, tmp_path, **wanted))
    with pytest.raises(UserError, match=r"ray\.gpus_per_actor: 1 requested, but the cluster has 0"):
        score(config(tiny_model_dir, qa_file, tmp_path, **wanted, ray__actors=None))


def test_full_disk_is_named_and_survived(tiny_model_dir, qa_file, tmp_path, reference_dir, reference):
    run = shutil.copytree(reference_dir, tmp_path / "run")
    before, limits = stamps(run), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((run / "scores.parquet").stat().st_size - 1, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*\.parquet: File too large"):
            score(config(tiny_model_dir, qa_file, run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert score(config(tiny_model_dir, qa_file, run)).scores.equals(reference)
    assert stamps(run) == before


def test_nodes_with_other_weights_are_noticed(tiny_model_dir, qa_file):
    """An actor whose copy of the model is not the driver's gives no score."""
    with pytest.raises(Unfit, match="is another model"):
        ScoringActor(ScoringSetup(ModelSettings(path=str(tiny_model_dir)), ScoringSettings(), "0" * 64, 1, False, []))


@pytest.mark.slow
def test_tofu_forget10(stories_dir, tofu_dir, tmp_path):
    """Real model, real text: all 400 samples through two actors, some checked line by line in float64."""
    settings = {"scoring__num_draws": 3, "scoring__sigma": 1e-4, "scoring__micro_batch_tokens": 4096}
    found = score(config(stories_dir, tofu_dir / "forget10.json", tmp_path, **settings, ray__actors=2))
    assert len(found.scores) == 400
    assert found.num_errors == 0
    model = AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float32).eval()
    rows, samples = found.scores.to_pylist(), found.samples.to_pylist()
    for i in range(0, 400, 67):
        expected, _ = algorithm_1(model, samples[i]["token_ids"], samples[i]["scored"], 1e-4, 0, 3)
        assert rows[i]["mrd"] == pytest.approx(expected, rel=2e-3)
