"""A scoring run on a bucket and several nodes, with failures all around: is anything lost, doubled or changed?"""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import boto3
import psutil
import pyarrow.parquet as pq
from moto.server import ThreadedMotoServer
from ray.cluster_utils import Cluster

from benchmarks.common import Raw
from benchmarks.figures import Figure, Results
from benchmarks.soak import rows_of, texts
from mrd_ray.runs import storage

_BUCKET, _MODEL = "lab", "our/model"
_OUTAGES = (5.0, 60.0)  # seconds
_CALM = (10.0, 30.0)  # seconds between two events


def main(
    model: str, samples: int = 20_000, draws: int = 40, minutes: float = 20.0, out: str = "benchmarks/results"
) -> int:
    """Run with and without failures; exit code 1 if a row is lost or doubled, or a bit of the scores differs.

    The failures: outages of the bucket, killed actors and drivers, a node that cannot load the model, second drivers.

    Args:
        model: directory of a small model.
        samples: number of invented short texts.
        draws: K; enough for the run to take the minutes below.
        minutes: how long things fail; the run must last at least as long.
        out: folder of the JSON file.
    """
    results = Results("chaos", locals(), out)
    with tempfile.TemporaryDirectory() as folder:
        seen = _Chaos(Path(folder), Path(model), samples, draws).run(minutes * 60)
    results.keep("found", seen)
    rows = seen["rows"]
    results.show(
        [
            Figure("duration", seen["seconds"], "s", at_least=minutes * 60),
            *(Figure(what, times, at_least=1) for what, times in seen["events"].items()),
            Figure("second drivers that got in", seen["got in"], at_most=0),
            Figure("rows lost", rows["lost"], detail=f"{rows['scored']:,} scored", at_most=0),
            Figure("rows or draws doubled", rows["doubled"], at_most=0),
            Figure("scores that differ from a quiet run's", seen["differing"], at_most=0),
        ]
    )
    return 0 if rows["lost"] == rows["doubled"] == seen["differing"] == seen["got in"] == 0 else 1


class _Chaos:
    """A bucket, a cluster with a bad node, and a driver, on this machine."""

    def __init__(self, folder: Path, model: Path, samples: int, draws: int) -> None:
        self._folder, self._samples, self._draws = folder, samples, draws
        self._random = random.Random(0)
        repository = folder / "full" / "hub" / "models--our--model"
        shutil.copytree(model, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        (folder / "empty").mkdir()
        self._data = folder / "short.jsonl"
        lines = (json.dumps({"id": f"s{i:06d}", "text": text}) + "\n" for i, text in texts(samples))
        self._data.write_text("".join(lines), encoding="utf-8")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self._host, self._port = self._server.get_host_and_port()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://{self._host}:{self._port}", "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "HF_HOME": str(folder / "full"), "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled",
        }  # fmt: skip
        boto3.client("s3").create_bucket(Bucket=_BUCKET)
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._cluster.add_node(num_cpus=2)

    def run(self, seconds: float) -> Raw:
        """The run with failures, then a quiet one."""
        try:
            seen = self._chaotic(seconds)
            quiet = self._driver(str(self._folder / "quiet"), "quiet")
            assert quiet.wait() == 0
            run = self._fetched()
        finally:
            self._cluster.shutdown()
            self._server.stop()
        scores = [pq.read_table(one / "scores.parquet").to_pylist() for one in (run, self._folder / "quiet")]
        differing = sum(a != b for a, b in zip(*scores, strict=True))
        return seen | {"rows": rows_of(run, self._samples, self._draws), "differing": differing}

    def _fetched(self) -> Path:
        """A copy of the run's folder in the bucket."""
        files, root = storage.filesystem(f"s3://{_BUCKET}/run")
        for file in files.find(root):
            target = self._folder / "fetched" / os.path.relpath(file, root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(files.cat_file(file))
        return self._folder / "fetched"

    def _driver(self, run: str, name: str) -> subprocess.Popen:
        flags = ["--model.path", _MODEL, "--data.path", str(self._data), "--run.dir", run, "--ray.actors", "3"]
        line = [sys.executable, "-m", "mrd_ray", "score", *flags, "--scoring.num_draws", str(self._draws)]
        with (self._folder / f"{name}.log").open("ab") as log:
            environment = os.environ | {"RAY_ADDRESS": self._cluster.address}
            return subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def _chaotic(self, seconds: float) -> Raw:
        uri, began, got_in = f"s3://{_BUCKET}/run", time.monotonic(), 0
        driver = self._driver(uri, "driver")
        events = dict.fromkeys(("outages", "actors killed", "drivers killed", "second drivers", "bad nodes"), 0)
        seconds_out = 0.0
        while driver.poll() is None:
            time.sleep(self._random.uniform(*_CALM))
            left = seconds - (time.monotonic() - began)
            if left <= 0 or driver.poll() is not None:
                continue
            kinds = [one for one in events if one != "bad nodes" or not events[one]]  # one such node is enough
            kind = min(kinds, key=lambda one: (events[one], self._random.random()))
            events[kind] += 1
            if kind == "outages":
                seconds_out += self._outage()
            elif kind == "actors killed":
                actors = [one for one in psutil.process_iter(["cmdline"]) if _is_actor(one)]
                if actors:
                    self._random.choice(actors).kill()
            elif kind == "drivers killed":
                driver.send_signal(signal.SIGKILL)
                driver.wait()
                driver = self._driver(uri, "driver")
            elif kind == "second drivers":
                got_in += self._driver(uri, "second").wait() == 0
            else:
                self._cluster.add_node(num_cpus=2, env_vars={"HF_HOME": str(self._folder / "empty")})
        assert driver.returncode == 0, (self._folder / "driver.log").read_text()[-2000:]
        return {
            "seconds": round(time.monotonic() - began), "events": events, "got in": got_in,
            "seconds without the bucket": round(seconds_out),
        }  # fmt: skip

    def _outage(self) -> float:
        """Seconds without a listener."""
        length = self._random.uniform(*_OUTAGES)
        self._server.stop()
        time.sleep(length)
        self._server = ThreadedMotoServer(ip_address=self._host, port=self._port, verbose=False)
        self._server.start()
        return length


def _is_actor(process: Any) -> bool:
    return "MapWorker" in " ".join(process.info["cmdline"] or [])
