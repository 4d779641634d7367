"""A long scoring run whose actors are killed one after another: does it lose or double a row, does memory grow?"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
from common import Raw, machine
from jsonargparse import auto_cli
from rich.console import Console

_LOOK_EVERY, _WARM_UP = 5.0, 120.0  # seconds
_BOUND = 5.0  # MiB per minute that the driver may grow by after warming up, and an actor from start to start
_WHO = ["the miller", "a ferryman", "her sister", "the old king", "a red fox", "the baker", "my uncle", "the nurse"]
_DID = ["sold", "hid", "lost", "painted", "wanted", "carried", "broke", "found", "washed", "forgot"]
_WHAT = ["a blue hat", "two eggs", "the key", "a wooden boat", "seven bells", "the letter", "a pear", "his coat"]
_WHERE = ["by the river", "at noon", "in the tower", "behind the mill", "on the salt road", "before winter"]


def main(
    model: str,
    samples: int = 20_000,
    draws: int = 70,
    minutes: float = 20.0,
    kill_every: float = 60.0,
    actors: int = 2,
    out: str = "benchmarks/results",
) -> None:
    """Run it, print what was found, write soak.json; exit code 1 if a row is lost or doubled, or memory grows.

    Args:
        model: directory of a small model.
        draws: K; so many that the run takes the minutes below.
        minutes: actors are killed for so long, and the run must last.
        kill_every: seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = _soak(Path(folder), model, samples, draws, minutes * 60, kill_every, actors)
    Console().print_json(json.dumps(found))
    Path(out, "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if found["passed"] else 1)


def _soak(folder: Path, model: str, samples: int, draws: int, seconds: float, kill_every: float, actors: int) -> Raw:
    data, run = folder / "short.jsonl", folder / "run"
    data.write_text("".join(json.dumps({"id": f"s{i:06d}", "text": text}) + "\n" for i, text in _texts(samples)))
    settings = ["--model.path", model, "--data.path", str(data), "--run.dir", str(run)]
    settings += ["--scoring.num_draws", str(draws), "--ray.actors", str(actors)]
    started, kills, killed_at = time.monotonic(), 0, time.monotonic()
    memory: dict[str, list[tuple[float, float]]] = {"driver": [], "actors": []}
    driver = subprocess.Popen([sys.executable, "-m", "mrd_ray", "score", *settings])
    while driver.poll() is None:
        time.sleep(_LOOK_EVERY)
        now = time.monotonic()
        processes = _actors(driver.pid)
        memory["driver"].append((now - started, _mib(driver.pid)))
        memory["actors"].append((now - started, max((_mib(process.pid) for process in processes), default=0.0)))
        if now - started < seconds and now - killed_at >= kill_every and processes:
            os.kill(random.Random(kills).choice(processes).pid, signal.SIGKILL)
            kills, killed_at = kills + 1, now
    took = time.monotonic() - started
    rows = _rows(run, samples, draws)
    growth = {name: _growth(points) for name, points in memory.items()}
    progress = json.loads((run / "progress.json").read_text())
    return {
        "passed": driver.returncode == 0 and not rows["lost"] and not rows["doubled"] and took >= seconds
        and all(value < _BOUND for value in growth.values()),
        "exit code": driver.returncode, "seconds": round(took), "actors killed": kills,
        "restarts seen by the run": progress["actor_restarts"], "units made again": progress["units_failed"],
        "samples": samples, "draws": draws, "rows": rows, "bound on growth, MiB/min": _BOUND,
        "growth after two minutes, MiB/min": growth,
        "most memory, MiB": {name: max(value for _, value in points) for name, points in memory.items()},
        **machine(),
    }  # fmt: skip


def _texts(samples: int) -> list[tuple[int, str]]:
    every = [
        f"Once {who} {did} {what} {where}." for who, did, what, where in itertools.product(_WHO, _DID, _WHAT, _WHERE)
    ]
    return [(i, f"{every[i % len(every)]} It was day {i}.") for i in range(samples)]


def _actors(driver: int) -> list[psutil.Process]:
    """Ray Data's, of the driver's own Ray."""
    own = psutil.Process(driver).children(recursive=True) if psutil.pid_exists(driver) else []
    found = []
    for process in own:
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _mib(pid: int) -> float:
    try:
        return float(psutil.Process(pid).memory_info().rss) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def _growth(points: list[tuple[float, float]]) -> float:
    """Slope of a line through what follows the warm-up, in MiB per minute; nan where nothing does."""
    times, values = np.array([point for point in points if point[0] > _WARM_UP and point[1]]).reshape(-1, 2).T
    return float(np.polyfit(times / 60, values, 1)[0]) if len(times) > 1 else float("nan")


def _rows(run: Path, samples: int, draws: int) -> Raw:
    """Of scores.parquet, and of the draws in all units."""
    scores = pq.read_table(run / "scores.parquet")
    counted: dict[str, int] = {}
    for file in (run / "units").glob("*.parquet"):
        for sample in pq.read_table(file)["samples"][0].as_py():
            counted[sample["sample_id"]] = counted.get(sample["sample_id"], 0) + sample["num_draws"]
    return {
        "scored": scores["error"].null_count,
        "lost": samples - len(set(scores["sample_id"].to_pylist())) + sum(n < draws for n in counted.values()),
        "doubled": len(scores) - len(set(scores["sample_id"].to_pylist())) + sum(n > draws for n in counted.values()),
    }


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
