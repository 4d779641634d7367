"""Two nodes with addresses of their own, in network namespaces, and a link between them that can be cut."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from drivers import Driver, events, forget_address, nothing_twice, scores, scoring, units

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root"),
]
HEAD, WORKER = "10.213.0.1", "10.213.0.2"
QUICK = '{"health_check_period_ms": 1000, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}'


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """A namespace with one end of a cable as its eth0, and a Ray node in it."""

    def __init__(self, name: str, address: str, end: str) -> None:
        self.name, self.address, self.node = name, address, None
        ip("netns", "add", name)
        ip("link", "set", end, "netns", name)
        ip("-n", name, "link", "set", end, "name", "eth0")
        ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")

    def line(self, *words: str) -> list[str]:
        """A command in the namespace. Gloo would look the machine's own name up, which is of no namespace."""
        own = ["RAY_AUTH_MODE=disabled", "GLOO_SOCKET_IFNAME=eth0"]
        return ["ip", "netns", "exec", self.name, "env", "-u", "RAY_ADDRESS", *own, *words]

    def start_ray(self, log: Path, *flags: str) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        words = self.line(ray, "start", "--block", "--node-ip-address", self.address, *flags)
        with log.open("wb") as file:
            self.node = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text(encoding="utf-8"):
            assert self.node.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.2)

    def stop_ray(self) -> None:
        if self.node is not None and self.node.poll() is None:
            self.node.send_signal(signal.SIGTERM)
            try:
                self.node.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.node.pid, signal.SIGKILL)

    def close(self) -> None:
        self.stop_ray()
        left = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        for pid in left:
            os.kill(int(pid), signal.SIGKILL)
        ip("netns", "delete", self.name)


@pytest.fixture
def hosts(tmp_path):
    """The head and the worker, two CPUs each, of a cluster."""
    names = [f"mrd-ray-{end}-{os.getpid()}" for end in "ab"]
    try:
        ip("link", "add", "mrd-ray-a", "type", "veth", "peer", "name", "mrd-ray-b")
    except (OSError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"no network namespaces here: {problem}")
    head, worker = Host(names[0], HEAD, "mrd-ray-a"), Host(names[1], WORKER, "mrd-ray-b")
    try:
        dashboard = ["--include-dashboard", "false"]
        head.start_ray(
            tmp_path / "head", "--head", "--port", "6379", "--num-cpus", "2", "--system-config", QUICK, *dashboard
        )
        join(worker, tmp_path)
        yield head, worker
    finally:
        for host in (worker, head):
            host.close()
        forget_address(f"{HEAD}:6379")


def join(worker: Host, folder: Path) -> None:
    worker.start_ray(folder / "worker", "--address", f"{HEAD}:6379", "--num-cpus", "2")


def cut(worker: Host) -> None:
    ip("-n", worker.name, "link", "set", "eth0", "down")


def mend(worker: Host) -> None:
    ip("-n", worker.name, "link", "set", "eth0", "up")


def job(head: Host, command: str, flags: list[str], log: Path) -> Driver:
    words = head.line(f"RAY_ADDRESS={HEAD}:6379", sys.executable, "-m", "mrd_ray", command, *flags)
    return Driver(words, log, {})


def test_a_link_is_cut_during_scoring(hosts, tiny_model_dir, qa_file, tmp_path):
    head, worker = hosts
    whole, run = tmp_path / "whole", tmp_path / "run"
    undisturbed = job(
        head, "score", scoring(tiny_model_dir, qa_file, whole, "--ray.actors", "3", draws=6000), tmp_path / "log-1"
    )
    undisturbed.ends()
    nodes = {pq.read_table(file)["worker"][0].as_py() for file in (whole / "units").glob("*.parquet")}
    assert len(nodes) == 3

    disturbed = job(
        head, "score", scoring(tiny_model_dir, qa_file, run, "--ray.actors", "3", draws=6000), tmp_path / "log-2"
    )
    disturbed.until(lambda: len(units(run)) >= 3)
    cut(worker)
    disturbed.ends()
    assert scores(run).equals(scores(whole))
    nothing_twice(run, draws=6000)
    assert "node_lost" in {event["event"] for event in events(run)}


def test_a_link_is_cut_during_training(hosts, tiny_model_dir, qa_file, tmp_path):
    """One worker on each node. The node comes back; training resumes from its checkpoint, as if nothing had been."""
    head, worker = hosts
    flags = [
        *("--model.path", str(tiny_model_dir), "--data.path", str(qa_file), "--unlearning.method", "ga"),
        *("--unlearning.steps", "60", "--unlearning.batch_size", "4", "--unlearning.refresh_every", "10"),
        *("--stopping.extraction_n", "0", "--stopping.forgotten", "never", "--stopping.max_retain_loss_ratio", "null"),
        *("--ray.workers", "2", "--ray.cpus_per_process", "2"),  # more than one node has for both
    ]
    whole, run = tmp_path / "whole", tmp_path / "run"
    job(head, "unlearn", [*flags, "--run.dir", str(whole)], tmp_path / "log-1").ends()

    def step() -> int:
        log = run / "metrics.jsonl"
        return json.loads(log.read_text().splitlines()[-1])["step"] if log.is_file() and log.read_text() else 0

    disturbed = job(head, "unlearn", [*flags, "--run.dir", str(run)], tmp_path / "log-2")
    disturbed.until(lambda: step() >= 15)
    cut(worker)
    time.sleep(20)  # well over the head's patience
    worker.stop_ray()
    mend(worker)
    join(worker, tmp_path)
    disturbed.ends(seconds=400)
    assert "the workers have restarted and resume from step" in disturbed.said

    def losses(of: Path) -> list[tuple]:
        lines = [json.loads(line) for line in (of / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["forget_loss"]) for line in lines if line["event"] == "step"]

    assert losses(run) == losses(whole)
    assert len(losses(run)) == 60
