"""`ray job submit` against a real cluster with token authentication: submit, refuse, log, stop, submit again."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drivers import ROOT, forget_address, nothing_twice, scores, scoring, units, workers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def token():
    return secrets.token_hex(32)


@pytest.fixture(scope="module")
def environment(token):
    """Of a client. RAY_ADDRESS would be another cluster's."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return own | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def address(environment, tmp_path_factory):
    """A head on this machine that asks for the token, with its dashboard on the loopback."""
    port, dashboard = free_port(), free_port()
    folder = tmp_path_factory.mktemp("head")
    with (folder / "log").open("wb") as log:
        head = subprocess.Popen(
            [
                *(BIN / "ray", "start", "--head", "--block", "--num-cpus", "4", "--port", str(port)),
                *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
            ],
            env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(120):
            assert head.poll() is None, (folder / "log").read_text()
            tried = [BIN / "ray", "job", "submit", "--address", url, "--", "true"]
            if subprocess.run(tried, env=environment, capture_output=True).returncode == 0:
                break  # there is a dashboard, and an agent that starts jobs
            time.sleep(1)
        yield url
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        forget_address(next(iter(re.findall(rf"[\d.]+:{port}\b", (folder / "log").read_text())), ""))


@pytest.fixture(scope="module")
def working_dir(tmp_path_factory):
    """What a client sends: this code, changed so that its results say that it was this copy that made them."""
    folder = tmp_path_factory.mktemp("working")
    for name in ("jobs", "mrd_ray"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    actor = folder / "mrd_ray" / "scoring" / "actor.py"
    changed = actor.read_text().replace('"worker": f"{os.uname().nodename}:', '"worker": f"working-directory:')
    assert changed != actor.read_text()
    actor.write_text(changed)
    return folder


@pytest.fixture
def ray_job(address, environment):
    def call(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        verb, *rest = words
        line = [str(BIN / "ray"), "job", verb, "--address", address, *rest]
        return subprocess.run(line, env=environment | (env or {}), capture_output=True, text=True, timeout=300)

    return call


def submission(working_dir: Path, name: str, job: str, flags: list[str], *more: str) -> list[str]:
    return [
        *("submit", "--working-dir", str(working_dir), "--submission-id", name, *more),
        *("--", "python", f"jobs/{job}.py", *flags),
    ]


def until(condition, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_submit_log_stop_and_submit_again(ray_job, working_dir, tiny_model_dir, qa_file, tmp_path, token):
    run = tmp_path / "run"
    flags = scoring(tiny_model_dir, qa_file, run, "--ray.actors", "2")
    first = ray_job(*submission(working_dir, "first", "score", flags, "--no-wait"))
    assert first.returncode == 0, first.stderr
    until(lambda: len(units(run)) >= 3)
    assert "RUNNING" in ray_job("status", "first").stdout
    stopped = ray_job("stop", "first")
    assert stopped.returncode == 0, stopped.stderr
    before = units(run)
    assert "was stopped" in ray_job("status", "first").stdout
    assert "interrupted; the same command resumes from here" in ray_job("logs", "first").stdout
    assert json.loads((run / "progress.json").read_text())["state"] == "interrupted"
    assert not (run / "scores.parquet").exists()

    again = ray_job(*submission(working_dir, "again", "score", flags))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "succeeded" in ray_job("status", "again").stdout
    assert "12 of 12 samples scored" in ray_job("logs", "again").stdout
    assert before.items() < units(run).items()
    assert {worker.split(":")[0] for worker in workers(run)} == {"working-directory"}
    nothing_twice(run)

    once_more = ray_job(*submission(working_dir, "once-more", "score", flags))  # nothing left to do
    assert once_more.returncode == 0
    kept = [file for file in run.rglob("*") if file.is_file()]
    assert not [file for file in kept if token.encode() in file.read_bytes()]
    assert token not in again.stdout + again.stderr


def test_a_wrong_token_is_refused(ray_job, working_dir, tiny_model_dir, qa_file, tmp_path):
    flags = scoring(tiny_model_dir, qa_file, tmp_path / "run")
    for environment in ({"RAY_AUTH_TOKEN": secrets.token_hex(32)}, {"RAY_AUTH_MODE": "disabled"}):
        refused = ray_job(*submission(working_dir, "refused", "score", flags), env=environment)
        assert refused.returncode != 0
        assert re.search("401|403|[Uu]nauth|[Tt]oken", refused.stdout + refused.stderr)
    assert "refused" not in ray_job("list").stdout
    assert not (tmp_path / "run").exists()


def test_exit_codes(ray_job, working_dir, tiny_model_dir, qa_file, tmp_path):
    """3: done, with samples that have no score. 2: bad settings. 1: failed."""
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(qa_file.read_text() + '{"id": "empty", "prompt": "", "response": ""}\n')
    of_samples = scoring(tiny_model_dir, mixed, tmp_path / "run", draws=12)
    cases = {
        3: of_samples,
        2: [*of_samples, "--scoring.sigma", "-1"],
        1: scoring(tmp_path / "none", mixed, tmp_path / "x"),
    }
    for code, flags in cases.items():
        job = ray_job(*submission(working_dir, f"code-{code}", "score", flags))
        assert job.returncode != 0
        assert f"exit code {code}" in job.stdout + job.stderr, job.stdout + job.stderr
    assert len(scores(tmp_path / "run")) == 13


def test_a_pipeline_that_is_stopped_while_it_unlearns(ray_job, working_dir, tiny_model_dir, qa_file, tmp_path):
    run = tmp_path / "run"
    flags = [
        *("--model.path", str(tiny_model_dir), "--data.path", str(qa_file), "--run.dir", str(run)),
        *("--unlearning.method", "ga", "--unlearning.steps", "400", "--unlearning.batch_size", "4"),
        *("--unlearning.learning_rate", "1e-7", "--stopping.evaluate_every", "20", "--stopping.forgotten", "never"),
        *("--stopping.extraction_n", "0", "--ray.actors", "1", "--ray.workers", "1"),
    ]
    job = ray_job(*submission(working_dir, "pipeline", "pipeline", flags, "--no-wait"))
    assert job.returncode == 0, job.stderr
    until(lambda: (run / "unlearn" / "checkpoints" / "step-000040").is_dir())
    assert ray_job("stop", "pipeline").returncode == 0
    until(lambda: "was stopped" in ray_job("status", "pipeline").stdout)
    assert json.loads((run / "unlearn" / "progress.json").read_text())["state"] == "interrupted"
    assert not (run / "unlearn" / "model").exists()
    before = units(run / "score")

    again = ray_job(*submission(working_dir, "pipeline-again", "pipeline", flags))
    assert again.returncode == 0, again.stdout + again.stderr
    assert re.search("resume from step [1-9]", again.stdout)
    assert units(run / "score") == before
    assert json.loads((run / "unlearn" / "manifest.json").read_text())["outcome"]["step"] == 400
    assert (run / "report.html").is_file()
