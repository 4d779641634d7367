"""What operators see: metrics as scraped, events, a sign of life, and `mrd-ray status` from the directory alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from ray import cloudpickle

from mrd_ray import UserError, score
from mrd_ray.cli.main import main
from mrd_ray.config import ModelSettings, RaySettings
from mrd_ray.runs import journal
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.runs.journal import Journal
from mrd_ray.runs.status import status
from mrd_ray.workers import lookout
from mrd_ray.workers.lookout import Lookout
from mrd_ray.workers.pool import Pool
from mrd_ray.workers.run_units import run_units

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def scoring(tiny_model_dir: Path, qa_file: Path, run: Path):
    from mrd_ray import DataSettings, RaySettings, RunSettings, ScoreConfig, ScoringSettings

    return ScoreConfig(
        model=ModelSettings(path=str(tiny_model_dir)),
        data=DataSettings(path=str(qa_file)),
        run=RunSettings(dir=str(run)),
        scoring=ScoringSettings(num_draws=12, micro_batch_tokens=64),
        ray=RaySettings(actors=1),
    )


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / journal.EVENTS).read_text().splitlines()]


def scraped(run_id: str, **expected: float | None) -> None:
    """Wait until Prometheus would get these series of a run from this machine, with these values where one is given.

    Workers send what they last set every few seconds, so an earlier value is scraped until then.
    """
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    found: dict[str, float] = {}
    for _ in range(60):
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as page:
            text = page.read().decode()
        found |= {
            line.split("{")[0].removeprefix("ray_mrd_ray_"): float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith("ray_mrd_ray_") and run_id in line
        }
        if all(name in found and value in (None, found[name]) for name, value in expected.items()):
            return
        time.sleep(1)
    raise AssertionError(f"expected {expected}, scraped {found}")


@pytest.fixture(scope="module")
def finished(ray_cluster, tiny_model_dir, qa_file, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished")
    score(scoring(tiny_model_dir, qa_file, run))
    return run


def test_metrics_are_scraped_and_carry_the_run(finished):
    run_id = json.loads((finished / "manifest.json").read_text())["run_id"]
    units = len(list((finished / "units").iterdir()))
    speeds = dict.fromkeys(["samples_draws_per_second", "tokens_per_second", "actor_device_memory_bytes"])
    scraped(run_id, units_done=units, units_left=0, run_heartbeat=1, run_ended_total=1, **speeds)


def test_events_name_run_unit_and_worker(finished):
    found = lines(finished)
    assert [found[0]["event"], found[-1]["event"]] == ["started", "done"]
    assert len({line["run"] for line in found}) == 1
    of_units = [line for line in found if line["event"] == "unit_done"]
    assert {f"{line['unit']}.parquet" for line in of_units} == {file.name for file in (finished / "units").iterdir()}
    assert all(line["worker"] and line["seconds"] >= 0 for line in of_units)


def test_status_of_a_finished_run(finished, capsys):
    assert main(["status", str(finished)]) == 0
    said = capsys.readouterr().out
    assert "done" in said
    assert "12, 0 with an error" in said
    assert main(["status", str(finished), "--as_json", "true"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["state"], found["units_left"], found["silent"]) == ("done", 0, None)


def test_status_of_a_failed_and_of_a_dead_run(tmp_path, monkeypatch):
    run = RunDirectory(str(tmp_path))
    run.claim({"a": 1}, ModelSettings(path="x"))
    with pytest.raises(UserError), Journal(run, "score"):
        raise UserError("data.path: no such thing")
    (found,) = status(str(tmp_path))
    assert (found.state, found.progress.message) == ("failed", "data.path: no such thing")
    with pytest.raises(KeyboardInterrupt), Journal(run, "score"):
        raise KeyboardInterrupt
    assert status(str(tmp_path))[0].state == "interrupted"
    code = f"""
import time
from mrd_ray.runs.journal import Journal
from mrd_ray.runs.directory import RunDirectory
with Journal(RunDirectory({str(tmp_path)!r}), "score"):
    print("on", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert status(str(tmp_path))[0].state == "running"
        process.send_signal(signal.SIGKILL)
    assert status(str(tmp_path))[0].state == "running"  # it cannot be told yet
    monkeypatch.setattr("mrd_ray.runs.hold.SILENT", 0.0)
    assert status(str(tmp_path))[0].state == "silent"
    assert [line["event"] for line in lines(tmp_path)] == ["started", "failed", "started", "interrupted", "started"]


def test_events_of_earlier_starts_stay_but_for_damaged_ones(tmp_path):
    run = RunDirectory(str(tmp_path))
    run.claim({"a": 1}, ModelSettings(path="x"))
    with Journal(run, "score") as first:
        first.event("said", "a line\u2028of two\u0085or three")
    whole = (tmp_path / journal.EVENTS).read_bytes()
    (tmp_path / journal.EVENTS).write_bytes(whole + whole[:40])
    with Journal(run, "score"):
        pass
    assert (tmp_path / journal.EVENTS).read_bytes().startswith(whole)
    assert [event.event for event in status(str(tmp_path))[0].events] == ["started", "said", "done", "started", "done"]


def test_many_events_are_not_written_with_every_beat(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "BEAT", 0.05)
    monkeypatch.setattr(journal, "_OFTEN", 100)
    run = RunDirectory(str(tmp_path))
    run.claim({"a": 1}, ModelSettings(path="x"))
    with Journal(run, "score") as record:
        record.event("long", "x" * 20_000)
        while "long" not in (tmp_path / journal.EVENTS).read_text():
            time.sleep(0.05)
        record.event("later")
        beat = json.loads((tmp_path / journal.PROGRESS).read_text())["time"]
        while json.loads((tmp_path / journal.PROGRESS).read_text())["time"] == beat:
            time.sleep(0.05)
        assert "later" not in (tmp_path / journal.EVENTS).read_text()
    assert [line["event"] for line in lines(tmp_path)] == ["started", "long", "later", "done"]


@pytest.mark.parametrize(
    "field",
    ['"started": 1e300', '"started": -1', '"units_left": 1' + "0" * 40, '"node": 3', '"tokens_per_second": 1e999'],
)
def test_status_of_figures_beyond_all_measure(finished, tmp_path, field, capsys):
    for file in ("manifest.json", journal.PROGRESS, journal.EVENTS):
        (tmp_path / file).write_bytes((finished / file).read_bytes())
    name = field.split(":")[0]
    changed = re.sub(f"{name}: [^,\n]*", field, (tmp_path / journal.PROGRESS).read_text())
    assert field in changed
    (tmp_path / journal.PROGRESS).write_text(changed)
    assert main(["status", str(tmp_path)]) == 1
    assert "damaged" in capsys.readouterr().err


def test_status_of_a_run_that_talks_to_the_terminal(finished, tmp_path, capsys):
    for file in ("manifest.json", journal.PROGRESS, journal.EVENTS):
        (tmp_path / file).write_bytes((finished / file).read_bytes())
    found = json.loads((tmp_path / journal.PROGRESS).read_text())
    (tmp_path / journal.PROGRESS).write_text(json.dumps(found | {"state": "failed", "message": "\x1b]0;mine\x07 gone"}))
    assert main(["status", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "gone" in said
    assert "\x1b]0" not in said


@pytest.mark.parametrize("name", [journal.PROGRESS, journal.EVENTS])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"state": 1}', b"\xff", b"null"])
def test_status_of_damaged_files(finished, tmp_path, name, content, capsys):
    for file in ("manifest.json", journal.PROGRESS, journal.EVENTS):
        (tmp_path / file).write_bytes((finished / file).read_bytes())
    (tmp_path / name).write_bytes(content)
    code = main(["status", str(tmp_path)])
    assert code == (0 if (name, content) == (journal.EVENTS, b"") else 1)
    assert code == 0 or "damaged" in capsys.readouterr().err


def test_status_of_no_run(tmp_path, capsys):
    assert main(["status", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none").exists()
    assert "not a run directory" in capsys.readouterr().err
    assert main(["status", "sieben://none"]) == 1
    assert "cannot open sieben://none" in capsys.readouterr().err


def test_a_stall_names_unit_and_worker(ray_cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lookout, "_LOOK_EVERY", 0.2)
    run = RunDirectory(str(tmp_path))
    run.claim({"a": 1}, ModelSettings(path="x"))
    said = ""

    def until(words):
        nonlocal said
        for _ in range(600):
            said += capsys.readouterr().err
            if words in said:
                return
            time.sleep(0.1)
        raise AssertionError(f"{words!r} was not said, but {said!r}")

    with Journal(run, "score") as record, Lookout(record, stall_after=0.5) as watched:
        until("no actor has started")
        board = watched.board
        board.started.remote("actor-1", "its node", "node-7:4711")
        until("the start of an actor has been running on node-7:4711 for")
        board.ready.remote("actor-1")
        board.begins.remote("actor-1", "0-0-4-0-12")
        until("unit 0-0-4-0-12 has been running on node-7:4711 for")
        board.started.remote("actor-1", "its node", "node-7:4712")  # it was restarted while at the unit
        until("an actor died and was restarted (1 so far)")
    assert said.count("no actor has started") == 1
    assert said.count("unit 0-0-4-0-12 has been running on node-7:4711 for") == 1
    (found,) = status(str(tmp_path))
    assert (found.progress.actor_restarts, found.progress.units_failed) == (1, 1)
    assert any(event.event == "stall" and "0-0-4-0-12" in event.message for event in found.events)


def test_where_actors_end_again_and_again_the_board_gives_up_unless_their_nodes_went(ray_cluster):
    for node, given_up in ((ray.get_runtime_context().get_node_id(), True), ("a node that is gone", False)):
        board = lookout.Board()
        for _ in range(lookout._ENDS):
            assert board.started("a", node, "n:1") is None
            board.ready("a")
            assert board.begins("a", "u") is None
        assert board.started("b", node, "n:2") is None
        board.ready("b")
        why = board.started("a", node, "n:3") or board.begins("b", "u")
        assert (why is not None) == given_up
        assert (board.look()["given up"] is not None) == given_up
        if given_up:
            assert "actors working on unit u died 5 times (n:2 would" in why
        board = lookout.Board()  # that was lost, with all it knew
        assert board.begins("a", "u") is None
        assert board.started("a", node, "n:1") is None
        board = lookout.Board()
        whys = [board.started("a", node, "n:1") for _ in range(lookout._ENDS + 1)]
        assert [why is not None for why in whys] == [False] * lookout._ENDS + [given_up]


class EndsAtTheSecond:
    """An actor whose process ends at one of its units."""

    def __init__(self, task) -> None:
        pass

    def __call__(self, unit_id, block):
        if unit_id == "second":
            os._exit(1)
        return pa.table({"unit_id": [unit_id]})


class EndsAtOnce:
    """An actor whose process ends as it starts."""

    def __init__(self, task) -> None:
        os._exit(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("actor", "words"),
    [
        (EndsAtTheSecond, "actors working on unit second died 5 times"),
        (EndsAtOnce, "an actor died 5 times while starting"),
    ],
)
def test_a_run_whose_actors_end_again_and_again_ends(ray_cluster, tmp_path, actor, words):
    run = RunDirectory(str(tmp_path))
    run.claim({"a": 1}, ModelSettings(path="x"))
    units = {"first": 0, "second": 0, "third": 0}
    with Journal(run, "score") as journal, pytest.raises(UserError, match=words):
        list(run_units(units, [pa.table({"x": [1]})], actor, None, Pool(1, 1.0, 0.0), journal, RaySettings()))


def test_a_failed_run_keeps_its_traceback_without_credentials(tmp_path):
    """And a run that had no failure has none."""
    run = RunDirectory(str(tmp_path))
    run.claim({}, ModelSettings(path="m"))
    with Journal(run, "score"):
        pass
    assert not (tmp_path / "traceback.txt").exists()

    def fail() -> None:
        try:
            raise KeyError("layer")
        except KeyError:
            raise OSError("cannot read https://bucket/x?X-Amz-Signature=secret today") from None

    with pytest.raises(OSError, match="secret") as failed, Journal(run, "score"):
        fail()
    kept = (tmp_path / "traceback.txt").read_text()
    assert "KeyError: 'layer'" in kept
    assert "OSError: cannot read https://bucket/x?X-Amz-Signature=*** today" in kept
    assert "secret" not in kept
    assert f"The traceback is in {tmp_path / 'traceback.txt'}" in failed.value.__notes__
