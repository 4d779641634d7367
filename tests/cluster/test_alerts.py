"""The alerts, by promtool, on series as they were scraped from real runs: stalled, killed and finished ones.

A run is scraped for a minute or so. What is there at the end is taken to stay as it is for hours, and what had vanished
to stay away.
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import ray
import yaml
from drivers import driver, events, scoring

ALERTS = Path(__file__).parents[2] / "cluster" / "monitoring" / "alerts.yaml"
EVERY = 5  # seconds between scrapes
FORGOTTEN = 45  # seconds: Ray sends every 10, and drops a gauge after 20
MINUTES = (1, 5, 12, 20, 35, 50, 90, 180)
RULES = {rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
slow = [pytest.mark.slow, pytest.mark.timeout(900)]


def promtool(*words: str) -> tuple[int, str]:
    binary = shutil.which("promtool")
    if binary is None:  # of Debian's package prometheus
        (pytest.fail if os.environ.get("MRD_RAY_REQUIRE_PROMTOOL") else pytest.skip)("promtool is not installed")
    ran = subprocess.run([binary, *words], capture_output=True, text=True)
    return ran.returncode, ran.stdout + ran.stderr


class Scrapes:
    """What Prometheus would get of a run from this machine."""

    def __init__(self) -> None:
        (node,) = [node for node in ray.nodes() if node["Alive"]]
        self._url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
        self._taken: list[dict[str, float]] = []

    def take(self) -> dict[str, float]:
        """One more, by series: those of mrd_ray, as the page names them."""
        with urllib.request.urlopen(self._url, timeout=30) as page:
            lines = [line.rsplit(" ", 1) for line in page.read().decode().splitlines() if line.startswith("ray_mrd_")]
        self._taken.append({series: float(value) for series, value in lines})
        time.sleep(EVERY)
        return self._taken[-1]

    def go_on(self, seconds: float) -> None:
        for _ in range(int(seconds / EVERY)):
            self.take()

    def fired(self, run_id: str, folder: Path) -> dict[str, set[int]]:
        """At which of MINUTES after the last scrape each alert about a run fires.

        promtool tells it in how its test of no alert at all fails.
        """
        series = sorted({name for scrape in self._taken for name in scrape if run_id in name})
        scraped = len(self._taken) * EVERY
        tests = {
            "rule_files": [str(ALERTS)],
            "evaluation_interval": "15s",
            "tests": [
                {
                    "interval": f"{EVERY}s",
                    "input_series": [{"series": name, "values": self._values(name)} for name in series],
                    "alert_rule_test": [{"eval_time": f"{scraped + minute * 60}s", "alertname": name}],
                }
                for name, minute in itertools.product(RULES, MINUTES)
            ],
        }
        found: dict[str, set[int]] = {}
        for (name, minute), test in zip(itertools.product(RULES, MINUTES), tests["tests"], strict=True):
            file = folder / "tests.yaml"
            file.write_text(yaml.safe_dump(tests | {"tests": [test]}))
            code, said = promtool("test", "rules", str(file))
            if code:
                assert re.search(rf'exp:\[\s*\],\s*got:\[.*alertname="{name}", run="{run_id}"', said, re.DOTALL), said
                found.setdefault(name, set()).add(minute)
        return found

    def _values(self, name: str) -> str:
        values = [scrape.get(name) for scrape in self._taken]
        words = [
            repr(value) if value is not None else "stale" if i and values[i - 1] is not None else "_"
            for i, value in enumerate(values)
        ]
        hours = (max(MINUTES) + 10) * 60 // EVERY
        return " ".join([*words, f"_x{hours}" if values[-1] is None else f"{values[-1]!r}+0x{hours}"])


def flags_of(command: str, model: Path, data: Path, run: Path, long: bool) -> list[str]:
    if command == "score":
        return scoring(model, data, run, "--ray.actors", "1", draws=3000 if long else 50)
    return [
        *("--model.path", str(model), "--data.path", str(data), "--run.dir", str(run), "--unlearning.method", "ga"),
        *("--unlearning.steps", "100000" if long else "20", "--unlearning.batch_size", "4"),
        *("--unlearning.learning_rate", "1e-7", "--stopping.evaluate_every", "10000", "--stopping.forgotten", "never"),
        *("--stopping.extraction_n", "0", "--ray.workers", "1"),
    ]


def at_work(command: str, run: Path) -> int | None:
    """The process that makes the results, once it has made some."""
    with suppress(OSError, ValueError):
        if command == "unlearn":
            begun = len((run / "metrics.jsonl").read_bytes().splitlines()) > 3
            return json.loads((run / "start.json").read_text())["pid"] if begun else None
        for event in events(run):
            if event["event"] == "unit_done":
                return int(event["worker"].split(":")[1])
    return None


def run_id(run: Path) -> str:
    return json.loads((run / "manifest.json").read_text())["run_id"]


def test_rules_are_sound():
    code, said = promtool("check", "rules", str(ALERTS))
    assert code == 0, said
    assert f"SUCCESS: {len(RULES)} rules found" in said


@pytest.mark.parametrize("command", ["score", "unlearn"])
class TestAlerts:
    pytestmark = slow

    def test_of_a_stopped_actor_and_of_a_killed_driver(self, command, ray_cluster, tiny_model_dir, qa_file, tmp_path):
        run, scrapes = tmp_path / "run", Scrapes()
        flags = flags_of(command, tiny_model_dir, qa_file, run, long=True)
        with driver(command, flags, tmp_path / "log", os.environ["RAY_ADDRESS"]) as started:
            started.until(lambda: scrapes.take() and at_work(command, run) is not None, 240)
            pid = at_work(command, run)
            os.kill(pid, signal.SIGSTOP)
            try:
                scrapes.go_on(FORGOTTEN)
                fired = scrapes.fired(run_id(run), tmp_path)
                assert started.process.poll() is None
                started.kill()
            finally:
                os.kill(pid, signal.SIGCONT)
        alert, after = {"score": ("MrdRayRunStalled", 20), "unlearn": ("MrdRayUnlearningStalled", 35)}[command]
        stalled = {minute for minute in MINUTES if minute >= after}
        assert fired == {alert: stalled}
        scrapes.go_on(FORGOTTEN)
        assert scrapes.fired(run_id(run), tmp_path) == {"MrdRayDriverGone": {5, 12, 20, 35, 50}}

    def test_of_a_run_that_ends_well(self, command, ray_cluster, tiny_model_dir, qa_file, tmp_path):
        run, scrapes = tmp_path / "run", Scrapes()
        flags = flags_of(command, tiny_model_dir, qa_file, run, long=False)
        with driver(command, flags, tmp_path / "log", os.environ["RAY_ADDRESS"]) as started:
            while started.process.poll() is None:
                scrapes.take()
            started.ends()
        scrapes.go_on(FORGOTTEN)
        assert scrapes.fired(run_id(run), tmp_path) == {}
        last = [name for name in scrapes.take() if run_id(run) in name]
        assert not any("heartbeat" in name or "units" in name for name in last)
        assert any(name.startswith("ray_mrd_ray_run_ended_total{") and 'state="done"' in name for name in last)
