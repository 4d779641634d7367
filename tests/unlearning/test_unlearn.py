"""`mrd-ray unlearn` as a Ray Train job on two workers: its files, its equivalences, and going on after anything."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gang
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from mrd_ray import ScoreConfig, UnlearnConfig, UserError, score, unlearn

pytestmark = pytest.mark.usefixtures("ray_cluster")


def config(files, run, **more) -> UnlearnConfig:
    model, forget, retain, _ = files
    settings = {
        "unlearning__steps": 6, "unlearning__refresh_every": 2, "stopping__evaluate_every": 2, "ray__workers": 2,
        "stopping__forgotten": "never", "stopping__max_retain_loss_ratio": None, "deepspeed__zero_stage": 3,
    }  # fmt: skip
    return gang.config(model, forget, retain, run, **(settings | more))


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trajectory(run: Path) -> list[tuple]:
    """What must not differ, bit for bit."""
    kept = ("step", "event", "forget_loss", "retain_loss", "grad_norm", "mrd_median", "forget_log_prob")
    return [tuple(line.get(name) for name in kept) for line in lines(run) if line["event"] != "stop"]


@pytest.fixture(scope="session")
def finished(files, ray_cluster, tmp_path_factory):
    run = tmp_path_factory.mktemp("unlearned")
    return unlearn(config(files, run)), run


def test_a_run_leaves_model_log_scores_and_checkpoints(finished, files):
    outcome, run = finished
    assert (outcome.reason, outcome.step, outcome.failed) == ("the last of 6 steps", 6, False)
    assert outcome.log == lines(run)
    assert sorted(path.name for path in (run / "scores").iterdir()) == [f"step-{s:06d}.parquet" for s in (0, 2, 4)]
    assert {path.name for path in (run / "checkpoints").glob("step-*")} == {"step-000004", "step-000006"}
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["outcome"]["step"] == 6
    again = UnlearnConfig.model_validate(yaml.safe_load((run / "config.yaml").read_text()))
    assert again == config(files, run)


def test_a_refresh_is_a_run_of_mrd_ray_score_on_the_checkpoint(finished, tmp_path):
    outcome, run = finished
    for name, step in ((f"checkpoints/step-{4:06d}/model", 4), (outcome.config.model.path, 0)):
        tree = {"model": {"path": str(run / name), "tokenizer": outcome.config.model.path}}
        tree |= {
            "data": outcome.config.data,
            "scoring": outcome.config.scoring,
            "run": {"dir": str(tmp_path / str(step))},
        }
        standalone = score(ScoreConfig.model_validate(tree | {"ray": {"actors": 1}})).scores
        refreshed = pq.read_table(run / "scores" / f"step-{step:06d}.parquet")
        np.testing.assert_allclose(refreshed["mrd"], standalone["mrd"], rtol=1e-5)
        np.testing.assert_allclose(refreshed["weight"], standalone["weight"], rtol=1e-5)
    assert np.abs(refreshed["mrd"].to_numpy() / standalone["mrd"].to_numpy() - 1).max() < 1e-5


def test_the_same_command_again_has_nothing_to_do_and_another_is_refused(finished, files):
    _, run = finished
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    assert unlearn(config(files, run)).step == 6
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")} == before
    with pytest.raises(UserError, match=r"unlearning\.beta: 0\.1 there, 0\.5 now"):
        unlearn(config(files, run, unlearning__beta=0.5))
    with pytest.raises(UserError, match=r"ray\.workers: 1, but the checkpoints in .* are of 2"):
        unlearn(config(files, run, ray__workers=1, unlearning__steps=8))


def test_more_steps_go_on_from_where_it_ended(finished, files, tmp_path):
    unlearn(config(files, tmp_path, unlearning__steps=4))
    extended = unlearn(config(files, tmp_path))
    assert extended.step == 6
    assert trajectory(tmp_path) == trajectory(finished[1])


def test_refreshes_by_actors_are_those_in_place(finished, files, tmp_path):
    by_actors = unlearn(config(files, tmp_path, unlearning__refresh="actors", checkpoints__keep=9))
    assert by_actors.reason == "the last of 6 steps"
    for step in (0, 2, 4):
        name = f"scores/step-{step:06d}.parquet"
        np.testing.assert_allclose(
            pq.read_table(tmp_path / name)["mrd"], pq.read_table(finished[1] / name)["mrd"], rtol=1e-5
        )
    losses = [
        [line["forget_loss"] for line in lines(run) if line["event"] == "step"] for run in (tmp_path, finished[1])
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_learning_rate_that_diverges_keeps_the_last_good_checkpoint(files, tmp_path):
    wild = unlearn(
        config(files, tmp_path, unlearning__learning_rate=1e30, unlearning__method="graddiff", ray__workers=1)
    )
    assert wild.failed
    assert wild.reason.startswith("diverged at step")
    assert wild.step == 0
    assert (tmp_path / "model" / "model.safetensors").exists()


def workers() -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if "RayTrainWorker" in "".join(process.cmdline()[:1])]


KILLS = {
    "between two refreshes": lambda run: steps(run) == 3,
    "during a refresh": lambda run: steps(run) == 4 and lines(run)[-1]["event"] == "evaluation",
    "during a checkpoint": lambda run: (run / "checkpoints" / "step-000004").exists(),
}


def steps(run: Path) -> int:
    return lines(run)[-1]["step"] if (run / "metrics.jsonl").exists() else 0
