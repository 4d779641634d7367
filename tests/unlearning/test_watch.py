"""What the driver says of workers that it knows by their log alone."""

import json
import time

import pytest

from mrd_ray.config import RunSettings
from mrd_ray.runs import journal
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.runs.journal import Journal
from mrd_ray.unlearning import log
from mrd_ray.unlearning.watch import Watch


@pytest.fixture
def run(ray_cluster, tmp_path) -> RunDirectory:
    run = RunDirectory(str(tmp_path))
    run.claim({"a": 1}, RunSettings(dir=str(tmp_path)))
    return run


def write(run: RunDirectory, steps: int, start: int | None = None) -> None:
    """As rank 0 does: the lines of a checkpoint, then that it has begun; later lines alone."""
    lines = [
        {"step": i, "of": 9, "event": "step", "forget_loss": 1.0, "retain_loss": None} for i in range(1, steps + 1)
    ]
    run.write(log.NAME, "".join(json.dumps(line) + "\n" for line in lines).encode())
    if start is not None:
        run.write(log.START, json.dumps({"node": "node-7", "pid": start}).encode())


def events(record: Journal) -> list[tuple[str, int | None]]:
    found = [json.loads(line) for line in record._events]
    return [(event["event"], event.get("step")) for event in found if event["event"] in ("going_on", "stall")]


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_start_from_a_checkpoint_is_said_whatever_the_log_lost(run):
    with Journal(run, "unlearn") as record, Watch(run, 9, record, stall_after=60.0):
        write(run, 2, start=1)
        until(lambda: record._progress.step == 2)
        assert events(record) == []
        write(run, 5)
        until(lambda: record._progress.step == 5)
        write(run, 4, start=2)  # the checkpoint was of step 4
        until(lambda: events(record) == [("going_on", 4)])
        write(run, 6)
        until(lambda: record._progress.step == 6)
        write(run, 6, start=3)  # of the last step
        until(lambda: events(record) == [("going_on", 4), ("going_on", 6)])


def test_a_run_that_is_started_again_goes_on(run):
    write(run, 3, start=1)
    with Journal(run, "unlearn") as record, Watch(run, 9, record, stall_after=60.0):
        time.sleep(1.5)
        assert record._progress.step is None  # those are of the start before
        write(run, 3, start=2)
        until(lambda: events(record) == [("going_on", 3)])
        write(run, 4)
        until(lambda: record._progress.step == 4)


def test_a_moments_failure_to_read_is_not_the_end_of_watching(run):
    with Journal(run, "unlearn") as record, Watch(run, 9, record, stall_after=60.0):
        write(run, 1, start=1)
        until(lambda: record._progress.step == 1)
        run.write(log.NAME, b'{"step": ')
        time.sleep(1.5)
        write(run, 2)
        until(lambda: record._progress.step == 2)


def test_a_stall_is_said_once_and_again_after_news(run, monkeypatch):
    with Journal(run, "unlearn") as record, Watch(run, 9, record, stall_after=1.5):
        until(lambda: len(events(record)) == 1)
        time.sleep(2.5)
        assert events(record) == [("stall", None)]
        write(run, 1, start=1)
        until(lambda: len(events(record)) == 2)
    said = [json.loads(line) for line in run.read(journal.EVENTS).splitlines()]
    stalls = [event["message"] for event in said if event["event"] == "stall"]
    assert "nothing since step 0" in stalls[0]
    assert "(rank 0 is on no node yet)" in stalls[0]
    assert "nothing since step 1" in stalls[1]
    assert "(rank 0 is on node-7)" in stalls[1]
