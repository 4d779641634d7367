"""`mrd-ray unlearn` as a Ray Train job on two workers: its files, its equivalences, and going on after anything."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import gang
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from mrd_ray import ScoreConfig, UnlearnConfig, UserError, score, unlearn
from mrd_ray.data.samples import PLACE
from mrd_ray.unlearning.state import State

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
    kept = (
        "step",
        "event",
        "forget_loss",
        "retain_loss",
        "retain_perplexity",
        "grad_norm",
        "mrd_median",
        "forget_log_prob",
    )
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


@pytest.mark.slow
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
    with pytest.raises(UserError, match="holds a checkpoint of step 6 already"):
        unlearn(config(files, run, unlearning__steps=4))
    with pytest.raises(UserError, match=r"unlearning\.beta: 0\.1 there, 0\.5 now"):
        unlearn(config(files, run, unlearning__beta=0.5))
    with pytest.raises(UserError, match=r"ray\.workers: 1, but the checkpoints in .* are of 2"):
        unlearn(config(files, run, ray__workers=1, unlearning__steps=8))


@pytest.mark.slow
def test_a_damaged_log_or_outcome_is_made_again_from_the_checkpoint(finished, files, tmp_path):
    run = shutil.copytree(finished[1], tmp_path / "run")
    (run / "metrics.jsonl").write_text("{")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"outcome": 3}))
    again = unlearn(config(files, run))
    assert (again.reason, again.step) == ("the last of 6 steps", 6)
    assert trajectory(run) == trajectory(finished[1])


def test_what_a_run_did_not_make_is_left_alone(files, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"holds model but no manifest\.json"):
        unlearn(config(files, tmp_path))


def test_a_checkpoint_of_an_earlier_version(finished, tmp_path):
    """Whose scores do not say where the samples are: they are in the order of ids, as the forget set is."""
    _, run = finished
    (folder, *_) = sorted(file.parent for file in (run / "checkpoints").rglob("state.json"))
    shutil.copytree(folder, tmp_path / "old")
    file = tmp_path / "old" / "scores.parquet"
    pq.write_table(pq.read_table(file).drop_columns(PLACE), file)
    assert State.load(tmp_path / "old").scores.equals(State.load(folder).scores.drop_columns(PLACE))


@pytest.mark.slow
def test_more_steps_go_on_from_where_it_ended(finished, files, tmp_path):
    unlearn(config(files, tmp_path, unlearning__steps=4))
    extended = unlearn(config(files, tmp_path))
    assert extended.step == 6
    assert trajectory(tmp_path) == trajectory(finished[1])


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"lora__rank": 2, "unlearning__learning_rate": 1e-2}], ids=["weights", "lora"])
def test_refreshes_by_actors_are_those_in_place(files, tmp_path, more):
    runs = {refresh: tmp_path / refresh for refresh in ("in_place", "actors")}
    for refresh, run in runs.items():
        assert unlearn(config(files, run, unlearning__refresh=refresh, unlearning__steps=4, **more)).step == 4
    events = [line["event"] for line in lines(runs["actors"]) if line["event"] in ("step", "refresh")]
    assert events == ["refresh", "step", "step"] * 2
    in_place, by_actors = (
        [line["forget_loss"] for line in lines(run) if line["event"] == "step"] for run in runs.values()
    )
    assert by_actors == pytest.approx(in_place, rel=1e-5)
    for step in (0, 2):
        a, b = (pq.read_table(run / "scores" / f"step-{step:06d}.parquet")["mrd"] for run in runs.values())
        np.testing.assert_allclose(b, a, rtol=1e-5)


@pytest.mark.slow
def test_the_best_is_never_the_model_as_it_was(files, tmp_path):
    """Which has the lowest retain loss of all, and must not take the place of a result either."""
    settings = {"checkpoints__best_by": "retain_loss", "checkpoints__keep": 1, "unlearning__method": "ga"}
    outcome = unlearn(config(files, tmp_path, **settings))
    losses = {line["step"]: line["retain_perplexity"] for line in outcome.log if line["event"] == "evaluation"}
    assert losses[0] == min(losses.values())
    assert outcome.step == min((step for step in losses if step), key=losses.__getitem__)
    assert not outcome.failed


@pytest.mark.slow
def test_a_learning_rate_that_diverges_keeps_the_last_good_checkpoint(files, tmp_path):
    wild = unlearn(
        config(files, tmp_path, unlearning__learning_rate=1e30, unlearning__method="graddiff", ray__workers=1)
    )
    assert wild.failed
    assert wild.reason.startswith("diverged at step")
    assert wild.step == 0
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.gpu
def test_a_gpu_unlearns_as_a_cpu(files, tmp_path):
    runs = {gpus: tmp_path / str(gpus) for gpus in (0, 1)}
    for gpus, run in runs.items():
        unlearn(config(files, run, ray__workers=1, ray__gpus_per_worker=gpus))
    for step, (on_cpu, on_gpu) in enumerate(zip(*map(lines, runs.values()), strict=True)):
        for name in ("mrd_median", "forget_loss", "retain_loss", "forget_log_prob"):
            assert on_gpu.get(name) == pytest.approx(on_cpu.get(name), rel=1e-2), (step, name)


# -- killed at any moment; the refresh is slow enough to be hit


def long_run(files, run, **more) -> UnlearnConfig:
    slow_refresh = {"scoring__estimator": "monte_carlo", "scoring__num_draws": 100, "scoring__sigma": 1e-4}
    settings = {"unlearning__steps": 60, "unlearning__refresh_every": 20, "stopping__evaluate_every": 10}
    return config(files, run, deepspeed__zero_stage=2, **(settings | slow_refresh | more))


@pytest.fixture(scope="session")
def uninterrupted(files, ray_cluster, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted")
    unlearn(long_run(files, run))
    return trajectory(run)


def events(run: Path) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in lines(run)] if (run / "metrics.jsonl").exists() else []


def checkpoint_parts() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("mrd_ray-checkpoint-*"))


def between_two_refreshes(run: Path) -> bool:
    return ("evaluation", 30) in events(run) and (run / "checkpoints" / "step-000030").exists()


def during_a_refresh(run: Path) -> bool:
    done = events(run)
    return ("evaluation", 20) in done and ("refresh", 20) not in done and not checkpoint_parts()


def during_a_checkpoint(run: Path) -> bool:
    return ("evaluation", 20) in events(run) and bool(checkpoint_parts())


class Killer(threading.Thread):
    """Kills the process that `victim` gives, once, as soon as `when(run)` holds."""

    def __init__(self, run, when, victim) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.when, self.victim = run, when, victim
        self.seen: list[tuple[str, int]] = []
        self.start()

    def run(self) -> None:
        while not self.when(self.run_dir):
            time.sleep(0.005)
        self.victim().kill()
        self.seen = events(self.run_dir)


def a_worker() -> psutil.Process:
    return next(p for p in psutil.process_iter() if "RayTrainWorker" in " ".join(p.cmdline()[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("when", [between_two_refreshes, during_a_refresh, during_a_checkpoint])
def test_a_killed_worker_changes_nothing(files, tmp_path, uninterrupted, when):
    for left_over in checkpoint_parts():
        shutil.rmtree(left_over)
    killer = Killer(tmp_path, when, a_worker)
    outcome = unlearn(long_run(files, tmp_path))
    killer.join(1)
    assert not killer.is_alive()
    assert killer.seen[-1] != ("evaluation", 60)
    if when is between_two_refreshes:
        assert ("refresh", 40) not in killer.seen
    if when is during_a_refresh:
        assert ("refresh", 20) not in killer.seen
    assert outcome.step == 60
    assert trajectory(tmp_path) == uninterrupted


@pytest.mark.slow
def test_a_killed_driver_goes_on_with_the_same_command(files, tmp_path, uninterrupted):
    run = tmp_path / "run"
    settings = tmp_path / "unlearn.yaml"
    settings.write_text(yaml.safe_dump(long_run(files, run).model_dump(mode="json")))
    command = [sys.executable, "-m", "mrd_ray", "unlearn", "--config", str(settings)]
    driver = subprocess.Popen(command, start_new_session=True)
    Killer(run, between_two_refreshes, lambda: psutil.Process(driver.pid)).join(200)
    assert driver.wait() == -signal.SIGKILL
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resume from step" in finished.stderr
    assert trajectory(run) == uninterrupted


@pytest.mark.slow
def test_a_full_disk_is_named_and_nothing_is_lost(files, tmp_path, uninterrupted):
    """On a real file system of a few megabytes."""
    run = tmp_path / "run"
    run.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(run)], check=False).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        with pytest.raises(UserError, match="No space left on device"):
            unlearn(long_run(files, run, checkpoints__keep=100, ray__max_failures=0))
        subprocess.run(["mount", "-o", "remount,size=100m", str(run)], check=True)
        assert unlearn(long_run(files, run, checkpoints__keep=100)).step == 60
        assert trajectory(run) == uninterrupted
    finally:
        subprocess.run(["umount", str(run)], check=True)
