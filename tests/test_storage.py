"""Data, model and run directory in a bucket: the same scores, the same rules, and no credential left behind."""

import errno
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from mrd_ray.config import RunSettings
from mrd_ray.errors import UserError
from mrd_ray.runs import storage
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.runs.hold import held
from mrd_ray.runs.journal import Journal
from mrd_ray.runs.status import status

SECRET = "a-secret-of-this-test"


@contextmanager
def serving() -> Iterator[tuple[ThreadedMotoServer, dict[str, str]]]:
    """A real S3 server on this machine, with an empty bucket `lab`, and the environment to use it with."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    of_s3 = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in of_s3.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="lab")
        yield server, of_s3
    server.stop()


@pytest.fixture(scope="module")
def s3():
    """The environment of a server for all tests."""
    with serving() as (_, of_s3):
        yield of_s3


def put(folder: Path, key: str) -> str:
    for file in folder.iterdir():
        boto3.client("s3").upload_file(str(file), "lab", f"{key}/{file.name}")
    return f"s3://lab/{key}"


def mrd_ray(command: str, *flags: str, home: Path) -> subprocess.CompletedProcess:
    """The command line, with a Ray of its own whose workers have this environment."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"HOME": str(home)}
    line = [sys.executable, "-m", "mrd_ray", command, *flags]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=280)


def contents(bucket: str = "lab") -> dict[str, bytes]:
    s3 = boto3.client("s3")
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {key: s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


SCORING = ["--scoring.num_draws", "12", "--scoring.micro_batch_tokens", "64", "--ray.actors", "1"]


@pytest.mark.slow
def test_scores_in_a_bucket_equal_those_on_disk(s3, tiny_model_dir, qa_file, tmp_path):
    model = put(tiny_model_dir, "models/tiny [1]")  # brackets are no pattern
    boto3.client("s3").upload_file(str(qa_file), "lab", "data/forget set.jsonl")
    there = ["--model.path", model, "--data.path", "s3://lab/data/forget set.jsonl", "--run.dir", "s3://lab/runs/a b"]
    here = ["--model.path", str(tiny_model_dir), "--data.path", str(qa_file), "--run.dir", str(tmp_path / "run")]
    first = mrd_ray("score", *there, *SCORING, home=tmp_path)
    assert first.returncode == 0, first.stderr
    assert mrd_ray("score", *here, *SCORING, home=tmp_path).returncode == 0
    written = contents()
    scores = pq.read_table(pa.BufferReader(written["runs/a b/scores.parquet"]))
    assert scores.equals(pq.read_table(tmp_path / "run" / "scores.parquet"))

    unit = next(key for key in written if key.startswith("runs/a b/units/"))
    boto3.client("s3").delete_object(Bucket="lab", Key=unit)
    boto3.client("s3").delete_object(Bucket="lab", Key="runs/a b/scores.parquet")
    again = mrd_ray("score", *there, *SCORING, home=tmp_path)  # goes on: one unit is computed anew
    assert again.returncode == 0, again.stderr
    assert contents()["runs/a b/scores.parquet"] == written["runs/a b/scores.parquet"]

    other = mrd_ray("score", *there, *SCORING, "--scoring.sigma", "1e-4", home=tmp_path)
    assert other.returncode == 1
    assert "scoring.sigma: 1e-05 there, 0.0001 now" in other.stderr
    said = [run.stdout + run.stderr for run in (first, again, other)]
    assert not any(SECRET in text for text in said)
    assert not any(SECRET.encode() in content for content in contents().values())


@pytest.mark.slow
def test_unlearn_evaluate_and_report_in_a_bucket(s3, tiny_model_dir, qa_file, tmp_path):
    put(tiny_model_dir, "models/small")
    run = ["--model.path", "s3://lab/models/small", "--run.dir", "s3://lab/runs/unlearn", "--ray.workers", "1"]
    short = ["--unlearning.method", "ga", "--unlearning.steps", "2", "--unlearning.batch_size", "4"]
    short += ["--scoring.estimator", "closed_form", "--stopping.extraction_n", "0"]
    unlearned = mrd_ray("unlearn", *run, "--data.path", str(qa_file), *short, home=tmp_path)
    assert unlearned.returncode == 0, unlearned.stderr
    sets = "{asked: {path: " + str(qa_file) + ", metrics: [probability]}}"
    of_result = ["--model.path", "s3://lab/runs/unlearn/model", "--run.dir", "s3://lab/runs/evaluate"]
    evaluated = mrd_ray("evaluate", *of_result, "--evaluation.sets", sets, "--ray.actors", "1", home=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    page = tmp_path / "report.html"
    reported = mrd_ray("report", "s3://lab/runs/unlearn", "s3://lab/runs/evaluate", "--out", str(page), home=tmp_path)
    assert reported.returncode == 0, reported.stderr
    assert "forget MA" in page.read_text()
    in_bucket = mrd_ray("report", "s3://lab/runs/unlearn", home=tmp_path)
    assert in_bucket.returncode == 0, in_bucket.stderr
    assert b"<html" in contents()["runs/unlearn/report.html"]
    assert not any(SECRET.encode() in content for content in contents().values())


@pytest.mark.parametrize("command", ["score", "plan"])
@pytest.mark.parametrize(
    ("setting", "uri", "said"),
    [
        ("model.path", "s3://lab/none", "model.path: cannot copy s3://lab/none to this machine"),
        ("data.path", "s3://lab/none.jsonl", "data.path: cannot read s3://lab/none.jsonl"),
        ("data.path", "s3://no-such-bucket/a.jsonl", "data.path: cannot read s3://no-such-bucket/a.jsonl"),
        ("data.path", "sieben://a.jsonl", "data.path: cannot open sieben://a.jsonl"),
    ],
)
def test_what_is_not_there_is_named(s3, tiny_model_dir, qa_file, tmp_path, capsys, command, setting, uri, said):
    from mrd_ray.cli.main import main

    paths = {"model.path": str(tiny_model_dir), "data.path": str(qa_file)} | {setting: uri}
    if command == "score":
        paths["run.dir"] = str(tmp_path)
    assert main([command, *(f"--{name}={value}" for name, value in paths.items())]) == 1
    assert said in capsys.readouterr().err


def test_a_bucket_that_is_not_there(s3, tiny_model_dir, qa_file, capsys):
    from mrd_ray.cli.main import main

    flags = ["--model.path", str(tiny_model_dir), "--data.path", str(qa_file), "--run.dir", "s3://no-such-bucket/run"]
    assert main(["score", *flags]) == 1
    assert "run.dir: cannot write" in capsys.readouterr().err


def test_reading_a_run_writes_nothing(s3, tmp_path):
    run = RunDirectory("s3://lab/team/runs/x")
    run.claim({"a": 1}, RunSettings(dir="x"))
    with Journal(run, "score"):
        pass
    s3_client = boto3.client("s3")
    for key in ("team/", "team/runs/", "team/runs/x/"):  # as credentials for that prefix alone may not make
        s3_client.delete_object(Bucket="lab", Key=key)
    before = contents()
    assert status("s3://lab/team/runs/x")[0].state == "done"
    with pytest.raises(UserError, match="not a run directory"):
        status("s3://lab/team/runs/none")
    assert contents() == before


HOLDING = """
import sys, time
from mrd_ray.runs import hold
from mrd_ray.errors import UserError
from mrd_ray.runs.directory import RunDirectory
hold.BEAT = 0.5
try:
    with hold.held(RunDirectory("s3://lab/runs/" + sys.argv[1])):
        print("on", flush=True)
        time.sleep(float(sys.argv[2]))
except UserError as problem:
    print(problem, flush=True)
"""


def holding(name: str, seconds: float) -> subprocess.Popen:
    line = [sys.executable, "-c", HOLDING, name, str(seconds)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True)


def test_a_second_driver_on_a_bucket_is_refused_and_waits_for_one_that_was_killed(s3, monkeypatch):
    run = RunDirectory("s3://lab/runs/shared")
    with holding("shared", 60) as process:
        assert process.stdout.readline() == "on\n"
        with (
            pytest.raises(UserError, match=rf"process {process.pid} on .* is working in s3://lab/runs/shared"),
            held(run),
        ):
            pass
        process.kill()
    monkeypatch.setattr("mrd_ray.runs.hold.SILENT", 2.0)
    with held(run):  # it has waited until that one was cold
        assert contents("lab").keys() >= {"runs/shared/driver.json"}
    assert not [key for key in contents("lab") if key.startswith("runs/shared/driver") and key.endswith(".json")]


def test_of_drivers_that_start_together_on_a_bucket_one_runs(s3):
    drivers = [holding("together", 12) for _ in range(4)]
    said = [driver.communicate(timeout=120)[0] for driver in drivers]
    assert sorted(text == "on\n" for text in said) == [False, False, False, True]
    assert sum("is working in s3://lab/runs/together" in text for text in said) == 3


def test_an_outage_is_waited_out(capfd):
    with serving() as (server, _):
        host, port = server.get_host_and_port()
        run = RunDirectory("s3://lab/run", patience=120)
        run.write("units/u.parquet", b"whole")
        server.stop()
        back = ThreadedMotoServer(ip_address=host, port=port, verbose=False)

        def mend() -> None:
            time.sleep(20)  # a few are waited out by AWS's own library
            back.start()

        mending = threading.Thread(target=mend)
        mending.start()
        run.write("units/v.parquet", b"another")  # the bucket is in this process's memory
        mending.join()
        assert run.names("units") == ["u.parquet", "v.parquet"]
        said = capfd.readouterr().err
        assert said.count("cannot be reached (") == 1
        assert said.count("s3://lab/run answers again, after ") == 1
        back.stop()


@pytest.mark.parametrize(
    ("problem", "passes"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (TimeoutError("no answer"), True),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), True),
        (OSError("When completing multiple part upload: AWS Error SLOW_DOWN during PutObject operation"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 503) during PutObject operation: No response body."), True),
        (OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7, Couldn't connect"), True),
        (OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)"), True),
        (OSError("AWS Error ACCESS_DENIED during PutObject operation: Access Denied"), False),
        (OSError("AWS Error UNKNOWN (HTTP status 400) during PutObject operation: ExpiredToken"), False),
        (OSError("AWS Error INVALID_ACCESS_KEY_ID during HeadObject operation"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
    ],
    ids=str,
)
def test_what_can_pass_and_what_cannot(problem, passes):
    assert storage.may_pass(problem) == passes


def test_what_cannot_pass_is_told_at_once(s3):
    run = RunDirectory("s3://lab/run", patience=600)
    with pytest.raises(UserError, match="cannot write lab-that-is-not-there/run"):
        RunDirectory("s3://lab-that-is-not-there/run", patience=600)
    with pytest.raises(UserError, match="cannot read"):
        run.read("nothing")


@pytest.mark.slow
def test_a_bucket_that_goes_away():
    with serving() as (server, _):
        run = RunDirectory("s3://lab/run")
        run.write("units/u.parquet", b"whole")
        server.stop()
        asked = (lambda: run.names("units"), lambda: run.exists("manifest.json"), lambda: run.read("units/u.parquet"))
        for ask in asked:
            with pytest.raises(UserError, match=r"cannot read lab/run/.* fix this and run the same command again"):
                ask()
        with pytest.raises(UserError, match=r"cannot write lab/run/units/u\.parquet"):
            run.write("units/u.parquet", b"other")


def test_a_copy_is_made_once_and_anew_where_the_folder_changed(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CACHE", tmp_path / "cache")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    uri = put(tmp_path / "model", "models/changing")
    first = storage.local_folder(uri)
    assert (first / "config.json").read_text() == "{}"
    assert storage.local_folder(uri) == first
    (tmp_path / "model" / "config.json").write_text('{"a": 1}')
    put(tmp_path / "model", "models/changing")
    second = storage.local_folder(uri)
    assert second != first
    assert (second / "config.json").read_text() == '{"a": 1}'
    assert sorted(path.name for path in (tmp_path / "cache" / "copies").iterdir()) == sorted([first.name, second.name])


def test_a_copy_is_made_anew_where_a_file_system_tells_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CACHE", tmp_path / "cache")
    for weights in (b"AAAA", b"BBBB"):
        with storage.open_file("memory://model/model.safetensors", "wb") as file:
            file.write(weights)
        assert (storage.local_folder("memory://model") / "model.safetensors").read_bytes() == weights


def test_a_copy_stays_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CACHE", tmp_path / "cache")
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("model/config.json", "{}")
        archive.writestr("model/../../../stolen.txt", "x")
    with pytest.raises(ValueError, match="would be written outside its copy"):
        storage.local_folder(f"zip://model::{tmp_path / 'm.zip'}")
    assert not list(tmp_path.rglob("stolen.txt"))
