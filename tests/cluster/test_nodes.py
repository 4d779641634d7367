"""Several nodes, on this machine: the same scores to the last bit, whatever comes, goes or dies meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from drivers import DRAWS, actors, driver, events, nothing_twice, scores, scoring, units, workers
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def cluster(monkeypatch):
    """A head that takes no work, and two nodes with two CPUs each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes.add_node(num_cpus=2)
    nodes.add_node(num_cpus=2)
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def alone(tiny_model_dir, qa_file, tmp_path_factory):
    """The scores of one actor on one node, by a Ray of its own."""
    run = tmp_path_factory.mktemp("alone")
    flags = scoring(tiny_model_dir, qa_file, run, "--ray.actors", "1")
    with driver("score", flags, run / "log.txt", "local") as single:
        single.ends()
    return scores(run)


@contextmanager
def started(cluster, model: Path, data: Path, run: Path, *more: str, actors: int = 3, draws: int = DRAWS):
    """A job on the cluster, once it has finished its first units; it must end well."""
    run.mkdir()
    flags = scoring(model, data, run, "--ray.actors", str(actors), *more, draws=draws)
    with driver("score", flags, run / "log", cluster.address) as job:
        job.until(lambda: len(units(run)) >= 3)
        yield job
        job.ends()


def test_three_nodes_score_as_one(cluster, tiny_model_dir, qa_file, tmp_path, alone):
    with started(cluster, tiny_model_dir, qa_file, tmp_path / "run"):
        pass
    assert scores(tmp_path / "run").equals(alone)
    assert len(workers(tmp_path / "run")) == 3
    nothing_twice(tmp_path / "run")


def test_a_node_is_killed(cluster, tiny_model_dir, qa_file, tmp_path, alone):
    run = tmp_path / "run"
    with started(cluster, tiny_model_dir, qa_file, run) as job:
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        job.until(lambda: "is gone (" in job.said)
    assert scores(run).equals(alone)
    nothing_twice(run)
    assert [event["event"] for event in events(run)].count("node_lost") == 1


def test_a_spot_node_is_given_notice_and_goes(cluster, tiny_model_dir, qa_file, tmp_path, alone):
    run = tmp_path / "run"
    with started(cluster, tiny_model_dir, qa_file, run) as job:
        leaving = cluster.worker_nodes.copy().pop()
        notice = [Path(sys.executable).with_name("ray"), "drain-node", "--address", cluster.address]
        notice += ["--node-id", leaving.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        notice += ["--reason-message", "the cloud wants it back", "--deadline-remaining-seconds", "5"]
        subprocess.run(notice, check=True, capture_output=True)
        time.sleep(5)
        cluster.remove_node(leaving, allow_graceful=False)
        job.until(lambda: "is gone (" in job.said)
    assert scores(run).equals(alone)
    nothing_twice(run)


def test_a_node_joins(cluster, tiny_model_dir, qa_file, tmp_path):
    """Asked for six actors, four find room; the others start on the node that comes late."""
    run, single = tmp_path / "run", tmp_path / "alone"
    with started(cluster, tiny_model_dir, qa_file, run, actors=6, draws=3000) as job:
        assert "room for 4 of 6 of 1 CPU each so far; the others start when nodes join" in job.said
        cluster.add_node(num_cpus=3)
        job.until(lambda: "has joined and is used" in job.said)
    assert len(workers(run)) == 6
    nothing_twice(run, draws=3000)
    single.mkdir()
    flags = scoring(tiny_model_dir, qa_file, single, "--ray.actors", "1", draws=3000)
    with driver("score", flags, single / "log", cluster.address) as job:
        job.ends()
    assert scores(run).equals(scores(single))


def test_workers_from_zero(cluster, tiny_model_dir, qa_file, tmp_path, alone):
    """No node at all has room when the job starts."""
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)
    run = tmp_path / "run"
    run.mkdir()
    flags = scoring(tiny_model_dir, qa_file, run, "--ray.actors", "2")
    with driver("score", flags, run / "log", cluster.address) as job:
        job.until(lambda: "room for 0 of 2" in job.said)
        cluster.add_node(num_cpus=3)
        job.ends()
    assert scores(run).equals(alone)


def test_no_node_comes(cluster, tiny_model_dir, qa_file, tmp_path):
    flags = scoring(tiny_model_dir, qa_file, tmp_path / "run", "--ray.actors", "1", "--ray.cpus_per_process", "64")
    with driver("score", [*flags, "--ray.start_timeout", "3"], tmp_path / "log", cluster.address) as job:
        job.ends(code=1)
        assert "ray.start_timeout: no room for 1 of 64 CPU each within 3 s" in job.said


def test_the_driver_is_killed_and_the_job_submitted_again(cluster, tiny_model_dir, qa_file, tmp_path, alone):
    run = tmp_path / "run"
    run.mkdir()
    flags = scoring(tiny_model_dir, qa_file, run, "--ray.actors", "3")
    with driver("score", flags, run / "log", cluster.address) as job:
        job.until(lambda: len(units(run)) >= 3)
        job.kill()
    before = units(run)
    with driver("score", flags, run / "log", cluster.address) as job:
        job.ends()
    assert before.items() < units(run).items()
    assert scores(run).equals(alone)
    nothing_twice(run)


def test_an_actor_is_killed_by_the_kernel_for_memory(cluster, tiny_model_dir, qa_file, tmp_path, alone):
    """In a control group of its own, whose limit it passes with its next allocation."""
    group = Path("/sys/fs/cgroup/memory") / f"mrd_ray-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as problem:
        pytest.skip(f"no control group for memory can be made here: {problem}")
    run = tmp_path / "run"
    try:
        with started(cluster, tiny_model_dir, qa_file, run, "--ray.stall_after", "60") as job:
            victim = actors()[0]
            (group / "cgroup.procs").write_text(str(victim.pid))
            (group / "memory.limit_in_bytes").write_text("4096")  # one page
            job.until(lambda: not victim.is_running() or victim.status() == "zombie")
            job.until(lambda: "died and was restarted" in job.said)
            counts = dict(line.split() for line in (group / "memory.oom_control").read_text().splitlines())
            assert int(counts["oom_kill"]) == 1
    finally:
        for process in (group / "cgroup.procs").read_text().split():
            os.kill(int(process), signal.SIGKILL)
        time.sleep(1)
        group.rmdir()
    assert scores(run).equals(alone)
    nothing_twice(run)


@pytest.fixture
def hub(tiny_model_dir, tmp_path, monkeypatch):
    """A cache of the hub with a model in it, and one that is empty, for nodes that cannot reach the hub."""
    full, empty = tmp_path / "full", tmp_path / "empty"
    repository = full / "hub" / "models--our--model"
    shutil.copytree(tiny_model_dir, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    empty.mkdir()
    for name, value in {"HF_HOME": full, "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes.add_node(num_cpus=2, env_vars={"HF_HOME": str(empty)})
    nodes.add_node(num_cpus=2)
    yield nodes
    nodes.shutdown()


def test_a_node_that_cannot_load_the_model_is_set_aside(hub, qa_file, tmp_path, alone):
    run = tmp_path / "run"
    with started(hub, Path("our/model"), qa_file, run) as job:
        job.until(lambda: "is set aside, and its units run elsewhere: model.path: our/model is neither" in job.said)
    assert scores(run).equals(alone)
    assert len(workers(run)) == 2
    nothing_twice(run)
    assert [event["event"] for event in events(run)].count("node_set_aside") == 1
    assert json.loads((run / "progress.json").read_text())["nodes_set_aside"] == [os.uname().nodename]
    said = subprocess.run([sys.executable, "-m", "mrd_ray", "status", run], check=True, capture_output=True, text=True)
    assert "nodes set aside" in said.stdout


def test_so_many_bad_nodes_end_a_run(hub, qa_file, tmp_path):
    flags = scoring(Path("our/model"), qa_file, tmp_path / "run", "--ray.actors", "3", "--ray.max_bad_nodes", "0")
    with driver("score", flags, tmp_path / "log", hub.address) as job:
        job.ends(code=1)
        assert f"{os.uname().nodename}: model.path: our/model is neither" in job.said
        assert "(more than ray.max_bad_nodes: 0 set aside)" in job.said
