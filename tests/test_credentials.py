"""Secrets are in no setting, and get from the environment into nothing that a run leaves."""

import os
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from mrd_ray import MRDSampler, ReportConfig, ScoreConfig, UserError
from mrd_ray.cli import main as cli
from mrd_ray.config.credentials import recordable

SECRET = "hunter2hunter2"
HOLD_CREDENTIALS = [
    f"s3://AKIA:{SECRET}@bucket/x.jsonl",
    f"s3://AKIA:hun/ter2+{SECRET}@bucket/x.jsonl",
    f"simplecache::s3://AKIA:{SECRET}@bucket/x.jsonl",
    f"https://user:{SECRET}@host/x.jsonl",
    f"https://{SECRET}@host/x.jsonl",
    f"https://bucket.s3.amazonaws.com/x.jsonl?X-Amz-Expires=60&X-Amz-Signature={SECRET}",
    f"https://host/x.jsonl?token={SECRET}",
    f"https://host/x.jsonl?key={SECRET}",
    f"https://host/x.jsonl?a=b&apikey={SECRET}",
    f"https://host/x.jsonl?password={SECRET}",
    f"host/x.jsonl?token={SECRET}",
    *(
        f"https://host/x.jsonl{separator}{name}={SECRET}"
        for separator in ("?", "?a=b&", "?a=b;", "#", "?%61=b%26")
        for name in (
            "private_token",
            "secret_key",
            "access_key",
            "secret_access_key",
            "api-key",
            "client_secret",
            "AWSAccessKeyId",
            "passphrase",
            "pass",
            "oauth",
            "session_token",
            "account_key",
            "access_token",
            "X-Amz-Credential",
            "sig",
            "auth",
            "Key-Pair-Id",
        )
    ),
]


@pytest.mark.parametrize("uri", HOLD_CREDENTIALS)
def test_uris_with_credentials_are_refused_and_not_repeated(uri, tmp_path, capsys):
    good = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "run": {"dir": "r"}}
    for group, name in (("model", "path"), ("data", "path"), ("run", "dir"), ("model", "tokenizer")):
        with pytest.raises(UserError, match=rf"{group}\.{name}: a URI here holds credentials") as refusal:
            ScoreConfig(**good | {group: good[group] | {name: uri}})
        assert SECRET not in str(refusal.value)
    for make in (lambda: ReportConfig(runs=["a", uri]), lambda: MRDSampler(uri)):
        with pytest.raises(UserError, match="holds credentials"):
            make()

    (tmp_path / "c.yaml").write_text(f'data: {{path: "{uri}"}}\n')
    rest = ["--model.path", "m", "--run.dir", str(tmp_path / "r")]
    assert cli.main(["score", "--config", str(tmp_path / "c.yaml"), *rest]) == 2
    assert cli.main(["score", "--task", str(tmp_path / "c.yaml"), *rest]) == 2
    assert cli.main(["score", "--data.path", uri, *rest]) == 2
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err
    assert printed.err.count("holds credentials") == 3
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "uri",
    [
        "abfs://container@account.dfs.core.windows.net/x.jsonl",
        "sftp://user@host/x.jsonl",
        "https://host:8080/x@y.jsonl",
        "s3://bucket/a:b@c.jsonl",
        "Qwen/Qwen3-0.6B",
        "mail: a@b",
        "https://host/x.jsonl?download=true&max_tokens=5&tokenizer=gpt2&author=smith&design=2",
        "s3://bucket/key=7/token=5/x.jsonl",
    ],
)
def test_uris_without_are_not(uri):
    ScoreConfig(model={"path": uri}, data={"path": uri}, run={"dir": uri})


def test_no_text_takes_long():
    for text in ("://?a" * 5000, "://" * 5000, "https://h/?" + "&a" * 5000, "https://h/?" + "key." * 3000):
        began = time.process_time()  # whatever else the machine does
        recordable([text])
        assert time.process_time() - began < 2


def test_command_lines_of_others_are_recorded_without_secrets():
    command = ["own.py", "--hf_token", SECRET, f"--api-key={SECRET}", HOLD_CREDENTIALS[0], "--data.max_tokens", "7"]
    assert recordable(command) == ["own.py", "--hf_token", "***", "--api-key=***", "***", "--data.max_tokens", "7"]
    command = [
        f"hf_token={SECRET}",
        f"wandb.api_key={SECRET}",
        "--apikey",
        SECRET,
        "--auth",
        SECRET,
        "--passwd",
        SECRET,
    ]
    assert SECRET not in " ".join(recordable(command))
    assert SECRET not in " ".join(recordable(["own.py", "--use_auth", "--token", SECRET, "--passphrase", SECRET]))
    ours = ["score", "--pad_token_id", "5", "--model.tokenizer", "t", "--scoring.micro_batch_tokens", "64"]
    assert recordable(ours) == ours


@pytest.mark.slow
def test_nothing_of_the_environment_is_left_or_printed(tiny_model_dir, qa_file, tmp_path):
    names = ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "WANDB_API_KEY")
    run = tmp_path / "run"
    command = ["score", "--model.path", tiny_model_dir, "--data.path", qa_file, "--run.dir", run]
    command += ["--scoring.estimator", "closed_form", "--ray.actors", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}  # a Ray of its own
    environment |= dict.fromkeys(names, SECRET)
    for runs in (command, ["report", run]):
        done = subprocess.run(
            [sys.executable, "-m", "mrd_ray", *map(str, runs)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
    files = [file for file in run.rglob("*") if file.is_file()]
    assert {"manifest.json", "config.yaml", "scores.parquet", "report.html"} <= {file.name for file in files}
    for file in files:
        assert SECRET.encode() not in file.read_bytes(), file
        if file.suffix == ".parquet":  # compressed
            assert SECRET not in str(pq.read_table(file).to_pylist()), file
