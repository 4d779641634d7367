"""Cells are computed once, whatever happens between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray import cloudpickle

from jobs.paper import sweep
from mrd_ray.errors import UserError
from mrd_ray.runs.directory import RunDirectory

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it


def count(cell):
    """Leave a mark for each call, and square."""
    folder, number = cell
    (Path(folder) / f"call-{time.time_ns()}-{os.getpid()}").touch()
    if number < 0:
        raise UserError(f"number: {number} is negative")
    return {"square": number**2}


@pytest.fixture
def calls(tmp_path):
    folder = tmp_path / "calls"
    folder.mkdir()
    return folder


def test_cells_that_are_done_are_not_computed_again(tmp_path, calls):
    run = RunDirectory(str(tmp_path / "run"))
    cells = {f"cell-{i}": (str(calls), i) for i in range(5)}
    first = sweep.work_off(run, "Counting", count, dict(list(cells.items())[:3]), at_once=1)
    assert len(list(calls.iterdir())) == 3
    found = sweep.work_off(run, "Counting", count, cells)
    assert len(list(calls.iterdir())) == 5
    assert list(found) == list(cells)
    assert found == {name: {"square": i**2} for i, name in enumerate(cells)}
    assert first.items() <= found.items()


def test_what_is_wrong_with_a_cell_is_said_with_its_name(tmp_path, calls):
    run = RunDirectory(str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"^bad: number: -1 is negative$"):
        sweep.work_off(run, "Counting", count, {"good": (str(calls), 2), "bad": (str(calls), -1)}, at_once=1)
    assert run.names("cells") == ["good.json"]


SLOW = """
import sys, time
import ray
from jobs.paper import sweep
from mrd_ray.runs.directory import RunDirectory

def work(cell):
    time.sleep(1.0)
    return {"at": time.time(), "cell": cell}

ray.init(address=sys.argv[2], logging_level="ERROR", log_to_driver=False)
sweep.work_off(RunDirectory(sys.argv[1]), "Sleeping", work, {f"cell-{i}": i for i in range(6)}, at_once=1)
"""


@pytest.mark.slow
def test_a_killed_driver_loses_nothing(tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path / "run"), os.environ["RAY_ADDRESS"]]
    run = RunDirectory(str(tmp_path / "run"))
    driver = subprocess.Popen(command)
    deadline = time.monotonic() + 90
    while len(run.names("cells")) < 2:
        assert time.monotonic() < deadline
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {name: run.read(f"cells/{name}") for name in run.names("cells")}
    assert 2 <= len(before) < 6
    subprocess.run(command, check=True, timeout=90)
    assert [json.loads(run.read(f"cells/cell-{i}.json"))["cell"] for i in range(6)] == list(range(6))
    assert before.items() <= {name: run.read(f"cells/{name}") for name in run.names("cells")}.items()
