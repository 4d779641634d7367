"""Drivers as processes of their own, as jobs are, and what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
DRAWS = 2000  # so many that a run is still at work when a node that was given notice is gone


class Driver:
    """`mrd-ray COMMAND FLAGS`, or another line, with its output in a file."""

    def __init__(self, line: list[str], log: Path, environment: dict[str, str]) -> None:
        self._log = log
        self._file = log.open("ab")
        self.process = subprocess.Popen(
            line, stdout=self._file, stderr=subprocess.STDOUT, env=os.environ | environment, cwd=ROOT
        )

    @classmethod
    def of(cls, command: str, flags: list[str], log: Path, address: str) -> "Driver":
        return cls([sys.executable, "-m", "mrd_ray", command, *flags], log, {"RAY_ADDRESS": address})

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait until it is so, while the driver lives."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the driver ended: {self.said}"
            assert time.monotonic() < deadline, self.said
            time.sleep(0.1)

    def ends(self, code: int = 0, seconds: float = 240) -> None:
        """Wait for the end, which must have this exit code."""
        try:
            assert self.process.wait(seconds) == code, self.said
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {self.said}") from None

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def driver(command: str, flags: list[str], log: Path, address: str) -> Iterator[Driver]:
    """One that does not outlive the block."""
    started = Driver.of(command, flags, log, address)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.kill()


def scoring(model: Path, data: Path, run: Path, *more: str, draws: int = DRAWS) -> list[str]:
    """Flags of seconds of work in many units."""
    return [
        *("--model.path", str(model), "--data.path", str(data), "--run.dir", str(run)),
        *("--scoring.num_draws", str(draws), "--scoring.micro_batch_tokens", "64", *more),
    ]


def units(run: Path) -> dict[str, int]:
    """The finished units, and when each was written."""
    return {file.name: file.stat().st_mtime_ns for file in (run / "units").glob("*.parquet")}


def workers(run: Path) -> set[str]:
    """The processes that worked units off."""
    return {pq.read_table(file)["worker"][0].as_py() for file in (run / "units").glob("*.parquet")}


def scores(run: Path):
    return pq.read_table(run / "scores.parquet")


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def nothing_twice(run: Path, draws: int = DRAWS) -> None:
    """Every sample has each draw once."""
    counted: dict[str, int] = {}
    for file in (run / "units").glob("*.parquet"):
        for sample in pq.read_table(file)["samples"][0].as_py():
            counted[sample["sample_id"]] = counted.get(sample["sample_id"], 0) + sample["num_draws"]
    assert set(counted.values()) == {draws}
    assert len(counted) == len(scores(run))


def forget_address(address: str) -> None:
    """`ray start` leaves a note of its cluster, which later drivers on this machine would try to join."""
    note = Path("/tmp/ray/ray_current_cluster")
    if note.is_file() and note.read_text(encoding="utf-8").strip() == address:
        note.unlink()


def actors() -> list[psutil.Process]:
    """Of Ray Data, on this machine."""
    return [p for p in psutil.process_iter(["cmdline"]) if "MapWorker" in " ".join(p.info["cmdline"] or [])]
