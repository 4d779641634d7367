"""However a run ends, nothing calls Ray after it: Ray would start another cluster of its own accord."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import glob, os, signal, sys, threading, time
import ray
from mrd_ray import evaluate, score
from mrd_ray.config import EvaluateConfig, ScoreConfig
from mrd_ray.errors import UserError
from mrd_ray.workers import lookout

command, way, model, data, run = sys.argv[1:]
lookout._LOOK_EVERY = 0.2
started = []
init = ray.init
ray.init = lambda *args, **kwargs: (started.append(kwargs), init(*args, **kwargs))[1]


def meddle():
    while not glob.glob(f"{run}/units/*.parquet"):
        time.sleep(0.01)
    if way == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
    else:
        os.rename(f"{run}/units", f"{run}/away")
        open(f"{run}/units", "w").close()


if way in ("interrupted", "disk"):
    threading.Thread(target=meddle, daemon=True).start()
shared = {"model": {"path": model}, "run": {"dir": run}, "ray": {"actors": 1}}
try:
    if command == "score":
        sigma = {"sigma": 1e-12, "control_variate": False} if way == "fatal" else {}
        scoring = {"num_draws": 400, "micro_batch_tokens": 32} | sigma
        score(ScoreConfig.model_validate(shared | {"data": {"path": data}, "scoring": scoring}))
    else:
        one = {"path": data, "metrics": ["probability"]}
        evaluation = {"sets": {"a": one}, "toxicity_model": data if way == "fatal" else None}
        if way == "fatal":
            one["metrics"] = ["toxicity"]
        evaluate(EvaluateConfig.model_validate(shared | {"evaluation": evaluation}))
    print("ended: done")
except UserError as problem:
    print("ended: error", problem)
except KeyboardInterrupt:
    print("ended: interrupted")
time.sleep(2)
print("started", len(started), "is on", ray.is_initialized())
print("threads", [t.name for t in threading.enumerate() if "_watch" in t.name or "_beat" in t.name])
"""


@pytest.mark.parametrize(
    ("command", "way", "end"),
    [
        ("score", "fatal", "ended: error"),
        pytest.param("score", "disk", "ended: error", marks=pytest.mark.slow),
        pytest.param("score", "interrupted", "ended: interrupted", marks=pytest.mark.slow),
        pytest.param("score", "done", "ended: done", marks=pytest.mark.slow),
        pytest.param("evaluate", "fatal", "ended: error", marks=pytest.mark.slow),
        pytest.param("evaluate", "done", "ended: done", marks=pytest.mark.slow),
    ],
)
def test_nothing_calls_ray_after_the_end(tiny_model_dir, qa_file, tmp_path, command, way, end):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    line = [sys.executable, "-c", SCRIPT, command, way, str(tiny_model_dir), str(qa_file), str(tmp_path / "run")]
    ran = subprocess.run(
        line, capture_output=True, text=True, timeout=280, env=environment | {"RAY_ADDRESS": "local"}, check=False
    )
    assert end in ran.stdout, ran.stderr
    assert "started 1 is on False" in ran.stdout
    assert "threads []" in ran.stdout
    assert "Traceback" not in ran.stderr
