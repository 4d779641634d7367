"""Compares normals from the keyed generator with torch's own stream, on one core."""

import collections
import itertools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import stopwatch
from benchmarks.figures import Figure, Results, ratios
from mrd_ray.mrd import noise


def main(out: str = "benchmarks/results", repeats: int = 30, size: int = 1 << 24) -> None:
    """Benchmark the noise on one core, into warm memory; the ways take turns.

    Args:
        out: folder of the JSON file.
        repeats: of each way.
        size: normals per repetition.
    """
    results = Results("noise", locals(), out)
    torch.set_num_threads(1)
    z, base = torch.zeros(size), torch.zeros(size)
    ways: dict[str, Callable[[], Any]] = {
        "chunk by chunk": lambda: collections.deque(noise._chunks(0, "benchmark", 0, size), maxlen=0),
        "base + sigma z": lambda: noise.add_noise(z, base, 1.0, 0, "benchmark"),
        "torch.randn": lambda: torch.randn(size, out=z),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _, (way, run) in itertools.product(range(repeats + 1), ways.items()):
        lap = stopwatch()
        run()
        seconds[way].append(lap())
    seconds = {way: timed[1:] for way, timed in seconds.items()}  # the first one is the warm-up
    results.keep("seconds", seconds)
    figures = [Figure.of(way, [size / 1e6 / s for s in timed], "M normals/s") for way, timed in seconds.items()]
    for way in ("chunk by chunk", "base + sigma z"):
        speed = ratios(seconds["torch.randn"], seconds[way])
        figures.append(Figure.of(f"{way} / torch.randn, speed", speed, at_least=0.9))
    results.show(figures)
