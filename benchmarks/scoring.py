"""What scoring costs: against Algorithm 1 as written, against the best single process, and as actors are added.

Only ratios within one run on one machine mean anything; run it on a machine that does nothing else. CPU, Linux.
"""

import collections
import itertools
import json
import multiprocessing
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from mrd_ray import DataConfig, ModelConfig, RayConfig, RunConfig, ScoreConfig, ScoringConfig, models, score
from mrd_ray.data import samples as samples_table
from mrd_ray.mrd import noise
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import delta, draw_seed
from mrd_ray.mrd.perturb import Replica
from mrd_ray.scoring import plan
from mrd_ray.scoring.actor import UNIT_SCHEMA, ScoringActor, Task
from mrd_ray.scoring.score import lengths

Part = Literal["noise", "memory", "naive", "ideal", "engine"]
Raw = dict[str, Any]
PACKAGES = ("mrd-ray", "ray", "torch", "transformers", "numpy", "pyarrow")
LONG_UNIT = 30.0  # seconds; shorter units would flatter or damn the engine by chance
PAPER_DRAWS = 200


def main(
    model: str,
    data: str,
    out: str = "benchmarks/results",
    parts: tuple[Part, ...] = ("noise", "memory", "naive", "ideal", "engine"),
    max_samples: int = 200,
    draws: int = 4,
    naive_draws: int = 1,
    naive_samples: int | None = None,
    micro_batch_tokens: int = 4096,
    sigma: float = 1e-5,
) -> None:
    """Benchmark Monte Carlo scoring on this machine, one thread per process; print a table, write one JSON file.

    Example: python benchmarks/scoring.py --model DIR --data ../shared/data/tofu/forget10.json --parts '[ideal, engine]'

    Args:
        model: directory or hub id; the demo keeps one under ~/.cache/mrd_ray.
        data: forget set, for example TOFU's ../shared/data/tofu/forget10.json.
        out: folder of the JSON file.
        parts: noise, memory, naive, ideal, engine; a ratio is given if both its sides are run.
        max_samples: rows of the forget set. Below some 7,000 tokens in all, units are shorter than 30 s.
        draws: K of `ideal` and of the engine with one actor. Two actors make 2 K, so that each actor has the same
            work, its pass over the unperturbed model included; with the same K that pass would hide the scaling.
        naive_draws: K of `naive`, whose cost is linear in K.
        naive_samples: run `naive` on so many samples only, evenly spaced by length, and extrapolate by tokens.
        micro_batch_tokens: tokens per forward, padding included.
        sigma: standard deviation of the parameter noise.
    """
    raw: Raw = {"configuration": dict(locals()), "hardware": hardware(), "versions": versions()}
    file = Path(out) / time.strftime("scoring-%Y%m%d-%H%M%S.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    torch.set_num_threads(1)

    def keep(part: Part, name: str, found: Any) -> None:
        raw.setdefault(part, {})[name] = found
        file.write_text(json.dumps(raw, indent=1))
        console.log(f"{part}: {name}")

    if "noise" in parts:
        keep("noise", "seconds per repeat", noise_seconds())
    if "memory" in parts:
        keep("memory", "cases", memory_cases())
    if {"naive", "ideal", "engine"} & set(parts):
        config = ScoreConfig(
            model=ModelConfig(path=model),
            data=DataConfig(path=data, max_samples=max_samples),
            run=RunConfig(dir="unused"),
            scoring=ScoringConfig(sigma=sigma, num_draws=draws, micro_batch_tokens=micro_batch_tokens),
        )
        work = Work(config)
        raw["work"] = work.description()
        chosen = work.evenly_spaced(naive_samples)
        # the two sides of a ratio take turns, so that a machine that drifts shows as spread and not as a result
        if "naive" in parts:
            keep("naive", "first half", [work.naive(i, naive_draws) for i in chosen[0::2]])
        if "ideal" in parts:
            keep("ideal", "theta", work.ideal_theta())
            keep("ideal", "first half", [work.ideal_draw(k) for k in range(draws // 2)])
        if "engine" in parts:
            keep("engine", "1", engine(config, work, 1, draws))
        if "ideal" in parts:
            keep("ideal", "second half", [work.ideal_draw(k) for k in range(draws // 2, draws)])
        if "engine" in parts:
            keep("engine", "2", engine(config, work, 2, 2 * draws))
        if "naive" in parts:
            keep("naive", "second half", [work.naive(i, naive_draws) for i in chosen[1::2]])

    rows = summary(raw)
    raw["summary"] = [{"what": what, "value": value, "target": target, "detail": detail}
                      for what, value, target, detail in rows]  # fmt: skip
    file.write_text(json.dumps(raw, indent=1))
    table = Table("what", "value", "target", "detail", title=f"Scoring on {raw['hardware']['cpu']}", title_justify="left")
    for what, value, target, detail in rows:
        met = "" if target is None else f"[{'green' if value >= target else 'red'}]>= {target:g}"
        table.add_row(what, f"{value:.4g}", met, detail)
    console.print(table)
    console.print(f"Timings and configuration: {file}", soft_wrap=True)


class Work:
    """The samples in the engine's micro-batches, and one replica of the model in this process."""

    def __init__(self, config: ScoreConfig) -> None:
        path = models.directory(config.model)
        limit = models.context_length(models.load_config(path))
        table = samples_table.build(config.data, models.load_tokenizer(config.model), limit)
        self.layout = plan.layout(lengths(table), config.scoring.micro_batch_tokens)
        self.samples = table.to_pylist()
        self.num_samples = len(self.layout.order)  # those that can be scored
        self._config = config.scoring
        model = models.load_model(path, config.model.dtype, torch.device("cpu"))
        self._model, self._replica, self._likelihood = model, Replica(model), Likelihood(model)
        self._batches = [
            MicroBatch.collate([s["token_ids"] for s in members], [s["scored"] for s in members], torch.device("cpu"))
            for i in range(len(self.layout))
            if (members := [self.samples[j] for j in self.layout.samples(i)])
        ]

    def description(self) -> Raw:
        """What is scored, in numbers."""
        return {
            "samples": self.num_samples,
            "tokens": sum(len(self.samples[i]["token_ids"]) for i in self.layout.order),
            "padded tokens": int(self.layout.padded_tokens.sum()),
            "micro-batches": len(self.layout),
            "parameters": sum(weights.numel() for weights in self._replica.base.values()),
        }

    def evenly_spaced(self, count: int | None) -> list[int]:
        """Indices of so many samples, from the shortest to the longest; of all of them if None."""
        picked = np.linspace(0, self.num_samples - 1, min(count or self.num_samples, self.num_samples))
        return [int(i) for i in self.layout.order[picked.round().astype(int)]]

    @torch.no_grad()
    def naive(self, index: int, draws: int) -> Raw:
        """Algorithm 1 for one sample, line by line, as one would first write it. Times in seconds."""
        self._replica.restore()
        ids, scored = (torch.tensor(self.samples[index][column]) for column in ("token_ids", "scored"))
        spent: Raw = {"tokens": len(ids), "perturb": [], "forward": [], "restore": [], "deltas": []}
        clock = stopwatch()
        p = _log_probs(self._model, ids)[scored[1:]]
        spent["theta"] = clock()
        for _ in range(draws):
            for parameter in self._model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=self._config.sigma)
            spent["perturb"].append(clock())
            perturbed = _log_probs(self._model, ids)[scored[1:]]
            spent["deltas"].append(repr(((p - perturbed) / p).sum().item()))  # text: it is 0/0 on memorised tokens
            spent["forward"].append(clock())
            for name, parameter in self._model.named_parameters():
                parameter.copy_(self._replica.base[name])
            spent["restore"].append(clock())
        return spent

    def ideal_theta(self) -> float:
        """Seconds of the pass over the unperturbed model, for all samples."""
        clock = stopwatch()
        self._replica.restore()
        self._theta = [self._likelihood.log_neg_log_probs(batch) for batch in self._batches]
        return clock()

    def ideal_draw(self, k: int) -> Raw:
        """Seconds of one draw for all samples, with one perturbation, and |Delta_k| by sample_id."""
        clock = stopwatch()
        self._replica.perturb(self._config.sigma, draw_seed(self._config.seed, k))
        perturb = clock()
        deltas = [
            delta(theta, self._likelihood.log_neg_log_probs(batch), batch.scored)
            for theta, batch in zip(self._theta, self._batches, strict=True)
        ]
        ids = [self.samples[i]["sample_id"] for i in self.layout.order]
        by_sample = dict(zip(ids, torch.cat(deltas).abs().tolist(), strict=True))
        return {"perturb": perturb, "forward": clock(), "abs_delta": by_sample}


def _log_probs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(ids[None]).logits.log_softmax(-1)[0, :-1].gather(1, ids[1:, None])[:, 0]
    return found


def stopwatch() -> Callable[[], float]:
    """A function that gives the seconds since it was last called."""
    last = time.perf_counter()

    def lap() -> float:
        nonlocal last
        before, last = last, time.perf_counter()
        return last - before

    return lap


def engine(config: ScoreConfig, work: Work, actors: int, draws: int) -> Raw:
    """`mrd-ray score` through Ray in a fresh run directory: the wall clock, and every unit as its actor timed it."""
    with tempfile.TemporaryDirectory() as folder:
        pool = RayConfig(actors=actors, cpus_per_actor=1, gpus_per_actor=0)
        scoring = config.scoring.model_copy(update={"num_draws": draws})
        clock = stopwatch()
        finished = score(
            config.model_copy(update={"run": RunConfig(dir=folder), "scoring": scoring, "ray": pool}, deep=True)
        )
        wall = clock()
        units = []
        for name in finished.run.names("units"):
            (row,) = finished.run.read_table(f"units/{name}").select(["unit_id", "worker", "seconds"]).to_pylist()
            unit = plan.Unit.of_id(row["unit_id"])
            row["first_micro_batch"], row["draws"] = unit.first_micro_batch, unit.stop_draw - unit.first_draw
            tokens = work.layout.padded_tokens[unit.first_micro_batch : unit.stop_micro_batch].sum()
            row["token_draws"] = int(tokens) * row["draws"]
            row["finished"] = Path(finished.run.path(f"units/{name}")).stat().st_mtime
            units.append(row)
    units.sort(key=lambda unit: unit["finished"])
    at_work_on: dict[str, int] = {}
    for unit in units:  # an actor that turns to other samples first runs them through the unperturbed model
        unit["with_theta"] = at_work_on.get(unit["worker"]) != unit["first_micro_batch"]
        at_work_on[unit["worker"]] = unit["first_micro_batch"]
    mean_abs = {row["sample_id"]: row["mean_abs"] for row in finished.scores.to_pylist() if row["error"] is None}
    return {"wall": wall, "draws": draws, "samples": len(mean_abs), "units": units, "mean_abs": mean_abs}


def noise_seconds(repeats: int = 30, size: int = 1 << 24) -> dict[str, list[float]]:
    """Seconds for `size` normals on one core, by way of making them, in warm memory; the ways take turns."""
    out, base = torch.zeros(size), torch.zeros(size)
    ways: dict[str, Callable[[], Any]] = {
        "noise, generated": lambda: collections.deque(noise._chunks(0, "benchmark", 0, size), maxlen=0),
        "noise, base + sigma z": lambda: noise.add_noise(out, base, 1.0, 0, "benchmark"),
        "torch.randn": lambda: torch.randn(size, out=out),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(-1, repeats):
        for way, run in ways.items():
            clock = stopwatch()
            run()
            if repeat >= 0:
                seconds[way].append(clock() / size)
    return seconds


def memory_cases() -> list[Raw]:
    """Peak memory of an actor over one unit, for few and many draws and for a small and a large vocabulary."""
    cases = list(itertools.product((8192, 131072), (2, 20)))
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in {vocabulary for vocabulary, _ in cases}:
            shape = LlamaConfig(
                vocab_size=vocabulary, hidden_size=128, intermediate_size=512, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
            )  # fmt: skip
            LlamaForCausalLM(shape).save_pretrained(f"{folder}/{vocabulary}")
        spawn = multiprocessing.get_context("spawn")
        # a process each, for a peak cannot be reset; two at once, since it is not time that is measured
        with ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as processes:
            return list(processes.map(_memory_case, itertools.repeat(folder), *zip(*cases, strict=True)))


def _memory_case(folder: str, vocabulary: int, draws: int) -> Raw:
    before = _resident("VmRSS")
    path = Path(folder) / str(vocabulary)
    actor = ScoringActor(Task(ModelConfig(path=str(path)), models.files_digest(path), 1e-5, 0, 1, False))
    loaded = _resident("VmHWM")
    tokens = random.Random(0)
    samples = [
        {"micro_batch": 0, "sample_id": str(i), "token_ids": tokens.choices(range(vocabulary), k=128),
         "scored": [False] + [True] * 127} for i in range(32)
    ]  # fmt: skip
    unit = {"unit_id": "benchmark", "first_draw": 0, "stop_draw": draws, "samples": samples}
    (result,) = actor(pa.Table.from_pylist([unit], UNIT_SCHEMA)).to_pylist()
    if result["fatal"] or any(sample["error"] for sample in result["samples"]):
        raise RuntimeError(f"the unit failed: {result}")
    weights = LlamaForCausalLM.from_pretrained(path).num_parameters() * 4
    found = {"vocabulary": vocabulary, "draws": draws, "tokens": 32 * 128, "weights": weights}
    return found | {"before": before, "peak when loaded": loaded, "peak": 0}


def _resident(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes now, or at most so far. Not getrusage: its ru_maxrss begins with that of the process that spawned us."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    auto_cli(main)
