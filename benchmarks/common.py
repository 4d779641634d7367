"""Shared by the benchmarks: samples in the engine's micro-batches, clocks, memory, and facts about the machine."""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from mrd_ray import ScoreConfig
from mrd_ray.data import samples as samples_table
from mrd_ray.data.micro_batches import lay_out, lengths
from mrd_ray.data.tokens import Limits
from mrd_ray.models import load
from mrd_ray.mrd.likelihood import MicroBatch
from mrd_ray.workers.memory import collate

Raw = dict[str, Any]
PAPER_DRAWS = 200


class Batches:
    """A model and its samples: `rows` by sample_id, `order` of those that can be scored, `batches` of `layout`."""

    def __init__(self, config: ScoreConfig, device: str = "cpu") -> None:
        limits = Limits.of(load.skeleton(config.model))
        table = samples_table.build(config.data, load.load_tokenizer(config.model), limits)
        self.layout = lay_out(lengths(table), config.scoring.micro_batch_tokens)
        self.batches = micro_batches(table, config.scoring.micro_batch_tokens, device)
        self.rows = table.to_pylist()
        self.order = self.layout.order.tolist()
        self.model = load.load_model(config.model, torch.device(device))
        self.size = {
            "samples": len(self.order),
            "tokens": sum(len(self.rows[i]["token_ids"]) for i in self.order),
            "padded tokens": int(self.layout.padded_tokens.sum()),
            "micro-batches": len(self.layout),
            "parameters": sum(weights.numel() for weights in self.model.parameters()),
        }


def micro_batches(samples: pa.Table, tokens: int, device: str = "cpu") -> list[MicroBatch]:
    """Make the samples and micro-batches as the engine does."""
    rows, layout = samples.to_pylist(), lay_out(lengths(samples), tokens)
    on = torch.device(device)
    return [collate([rows[i] for i in layout.samples(number)], on) for number in range(len(layout))]


def stopwatch() -> Callable[[], float]:
    """A function that returns the seconds since it was last called, including the GPU's queued work."""
    times: list[float] = []

    def lap() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return times[-1] - times[-2] if times[1:] else 0.0

    lap()
    return lap


def machine() -> Raw:
    """The hardware, its load before the benchmark, and the versions of relevant packages."""
    cpus = [
        line.split(": ")[1]
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if "model name" in line
    ]
    packages = ("mrd-ray", "ray", "torch", "deepspeed", "transformers", "numpy", "pyarrow")
    return {
        "cpu": (cpus or [platform.machine()])[0],
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())],
        "cores": os.cpu_count(),
        "usable cores": len(os.sched_getaffinity(0)),
        "memory bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load average": os.getloadavg(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }


def resident(field: Literal["VmRSS", "VmHWM", "RssAnon"]) -> float:
    """MiB now, the peak so far, or now without mapped files. Not getrusage: its ru_maxrss starts at the parent's."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(field)
    )
    return int(line.split()[1]) / 1024
