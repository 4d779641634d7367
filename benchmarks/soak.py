"""A long scoring run whose actors are killed one after another: is a row lost or doubled, does memory grow?"""

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

from benchmarks.common import Raw
from benchmarks.figures import Figure, Results

_LOOK_EVERY, _WARM_UP = 5.0, 120.0  # seconds
_BOUND = 5.0  # MiB per minute by which the driver and the larger actor may grow after warming up
_SETTLED, _OF_ONE = 30.0, 100.0  # after this many seconds of its life, an actor may grow by this many MiB in total
_WHO = ["the miller", "a ferryman", "her sister", "the old king", "a red fox", "the baker", "my uncle", "the nurse"]
_DID = ["sold", "hid", "lost", "painted", "wanted", "carried", "broke", "found", "washed", "forgot"]
_WHAT = ["a blue hat", "two eggs", "the key", "a wooden boat", "seven bells", "the letter", "a pear", "his coat"]
_WHERE = ["by the river", "at noon", "in the tower", "behind the mill", "on the salt road", "before winter"]


def main(
    model: str,
    samples: int = 20_000,
    draws: int = 55,
    minutes: float = 20.0,
    kill_every: float = 60.0,
    actors: int = 2,
    out: str = "benchmarks/results",
) -> int:
    """Run and kill actors; exit code 1 if a row is lost or doubled, or memory grows.

    Args:
        model: directory of a small model.
        samples: number of invented short texts.
        draws: K; enough for the run to take the minutes below.
        minutes: how long actors are killed; the run must last at least as long.
        kill_every: seconds between kills.
        actors: number of actors, with one CPU each.
        out: folder of the JSON file.
    """
    results = Results("soak", locals(), out)
    with tempfile.TemporaryDirectory() as folder:
        seen = _soak(Path(folder), model, samples, draws, minutes * 60, kill_every, actors)
    results.keep("found", seen)
    results.show(figures := _figures(seen, minutes * 60))
    return 0 if seen["exit code"] == 0 and all(figure.met is not False for figure in figures) else 1


def _figures(raw: Raw, seconds: float) -> list[Figure]:
    rows = raw["rows"]
    detail = f"{raw['restarts']} restarts seen by the run, {raw['lost units']} units made again"
    of_one = f"in {raw['longest life']:.0f} s at most; after its first {_SETTLED:g} s"
    return [
        Figure("duration", raw["seconds"], "s", at_least=seconds),
        Figure("actors killed", raw["actors killed"], detail=detail, at_least=1),
        Figure("rows lost", rows["lost"], detail=f"{rows['scored']:,} scored", at_most=0),
        Figure("rows or draws doubled", rows["doubled"], at_most=0),
        *(
            Figure(f"growth of {who}", slope, "MiB/min", f"after two minutes; {raw['peak MiB'][who]:.0f} MiB at most",
                   at_most=_BOUND)
            for who, slope in raw["growth"].items()
        ),
        Figure("growth of one actor", raw["growth of one"], "MiB", of_one, at_most=_OF_ONE),
    ]  # fmt: skip


def _soak(folder: Path, model: str, samples: int, draws: int, seconds: float, kill_every: float, actors: int) -> Raw:
    data, run = folder / "short.jsonl", folder / "run"
    data.write_text(
        "".join(json.dumps({"id": f"s{i:06d}", "text": text}) + "\n" for i, text in texts(samples)), encoding="utf-8"
    )
    settings = ["--model.path", model, "--data.path", str(data), "--run.dir", str(run)]
    settings += ["--scoring.num_draws", str(draws), "--ray.actors", str(actors)]
    started, kills, killed_at = time.monotonic(), 0, time.monotonic()
    memory: dict[str, list[tuple[float, float]]] = {"driver": [], "actors": []}
    lives: dict[int, list[tuple[float, float]]] = {}  # by process: (time, MiB)
    driver = subprocess.Popen([sys.executable, "-m", "mrd_ray", "score", *settings])
    while driver.poll() is None:
        time.sleep(_LOOK_EVERY)
        now = time.monotonic()
        processes = _actors(driver.pid)
        memory["driver"].append((now - started, _mib(driver.pid)))
        sizes = {process.pid: _mib(process.pid) for process in processes}
        memory["actors"].append((now - started, max(sizes.values(), default=0.0)))
        for pid, size in sizes.items():
            lives.setdefault(pid, []).append((now, size))
        if now - started < seconds and now - killed_at >= kill_every and processes:
            os.kill(random.Random(kills).choice(processes).pid, signal.SIGKILL)
            kills, killed_at = kills + 1, now
    took = time.monotonic() - started
    rows = rows_of(run, samples, draws)
    progress = json.loads((run / "progress.json").read_text(encoding="utf-8"))
    return {
        "exit code": driver.returncode, "seconds": round(took), "actors killed": kills,
        "restarts": progress["actor_restarts"], "lost units": progress["units_failed"], "rows": rows,
        "growth": {name: _growth(points) for name, points in memory.items()},
        "growth of one": max(map(_growth_in_life, lives.values())),
        "longest life": max(life[-1][0] - life[0][0] for life in lives.values()),
        "peak MiB": {name: max(value for _, value in points) for name, points in memory.items()},
    }  # fmt: skip


def texts(samples: int) -> list[tuple[int, str]]:
    """Invented samples that contain their numbers."""
    every = [
        f"Once {who} {did} {what} {where}." for who, did, what, where in itertools.product(_WHO, _DID, _WHAT, _WHERE)
    ]
    return [(i, f"{every[i % len(every)]} It was day {i}.") for i in range(samples)]


def _actors(driver: int) -> list[psutil.Process]:
    """Ray Data's actors in the driver's own Ray."""
    own = psutil.Process(driver).children(recursive=True) if psutil.pid_exists(driver) else []
    alive = []
    for process in own:
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                alive.append(process)
        except psutil.NoSuchProcess:
            continue
    return alive


def _mib(pid: int) -> float:
    try:
        return float(psutil.Process(pid).memory_info().rss) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def _growth(points: list[tuple[float, float]]) -> float:
    """Slope of a line through the values after the warm-up, in MiB per minute; nan if there are none."""
    times, values = np.array([point for point in points if point[0] > _WARM_UP and point[1]]).reshape(-1, 2).T
    return float(np.polyfit(times / 60, values, 1)[0]) if len(times) > 1 else float("nan")


def _growth_in_life(life: list[tuple[float, float]]) -> float:
    """MiB by which a process was larger than after it had settled."""
    settled = [size for moment, size in life if moment - life[0][0] >= _SETTLED and size]
    return max(settled) - settled[0] if settled else 0.0


def rows_of(run: Path, samples: int, draws: int) -> Raw:
    """Rows of scores.parquet, and of draws in all units."""
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
