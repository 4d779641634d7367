"""What scoring costs: against Algorithm 1 as written, against the best single process, and as actors are added.

Only ratios within one run on one machine mean anything; run it on a machine that does nothing else. CPU, Linux.
"""

import collections
import itertools
import json
import multiprocessing
import os
import platform
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
Row = tuple[str, float, float | None, str]  # what, value, the least it should be, detail
PACKAGES = ("mrd-ray", "ray", "torch", "transformers", "numpy", "pyarrow")
LONG_UNIT = 30.0  # seconds; shorter units would flatter or damn the engine by chance
PAPER_DRAWS = 200
MIB = 2**20


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
    raw: Raw = {
        "configuration": dict(locals()),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
    file = Path(out) / time.strftime("scoring-%Y%m%d-%H%M%S.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    torch.set_num_threads(1)

    def keep(part: Part, name: str, found: Any) -> None:
        raw.setdefault(part, {})[name] = found
        file.write_text(json.dumps(raw, indent=1))
        console.log(f"{part}: {name}")

    if "noise" in parts:
        keep("noise", "seconds per normal", noise_seconds())
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
    table = Table(
        "what", "value", "target", "detail", title=f"Scoring on {raw['hardware']['cpu']}", title_justify="left"
    )
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
    """Bytes of one case, in a process of its own."""
    before, path = _resident("VmRSS"), Path(folder) / str(vocabulary)
    task = Task(ModelConfig(path=str(path)), models.files_digest(path), sigma=1e-5, seed=0, threads=1, on_gpu=False)
    actor = ScoringActor(task)
    loaded = _resident("VmHWM")
    ids = np.random.default_rng(0).integers(vocabulary, size=(32, 128)).tolist()
    scored = [False] + [True] * 127
    samples = [{"micro_batch": 0, "sample_id": str(i), "token_ids": x, "scored": scored} for i, x in enumerate(ids)]
    unit = {"unit_id": "benchmark", "first_draw": 0, "stop_draw": draws, "samples": samples}
    (result,) = actor(pa.Table.from_pylist([unit], UNIT_SCHEMA)).to_pylist()
    peak = _resident("VmHWM")
    if result["fatal"] or any(sample["error"] for sample in result["samples"]):
        raise RuntimeError(f"the unit failed: {result}")
    weights = sum(tensor.nbytes for tensor in actor._replica.base.values())
    return {
        "vocabulary": vocabulary, "draws": draws, "weights": weights,
        "before": before, "peak when loaded": loaded, "peak": peak,
    }  # fmt: skip


def _resident(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes now, or at most so far. Not getrusage: its ru_maxrss begins with that of the process that spawned us."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def summary(raw: Raw) -> list[Row]:
    """Medians and ratios of the raw timings: the rows of the table."""
    rows: list[Row] = []
    for way, seconds in raw.get("noise", {}).get("seconds per normal", {}).items():
        detail = f"M normals/s on one core, median of {len(seconds)}; best {1e-6 / min(seconds):.4g}"
        rows.append((way, 1e-6 / median(seconds), None, detail))
    for case in raw.get("memory", {}).get("cases", []):
        detail = (
            f"MiB at peak over {case['before'] / MIB:.0f} before loading, less 2 x {case['weights'] / MIB:.0f} weights"
        )
        over = (case["peak"] - case["before"] - 2 * case["weights"]) / MIB
        rows.append((f"memory, vocabulary {case['vocabulary']:,}, K = {case['draws']}", over, None, detail))

    settings, naive, ideal, one, two = raw["configuration"], None, None, None, None
    if "naive" in raw:
        naive = _naive_costs(raw)
        rows.append(("naive, s per sample x draw", naive["draw"], None, naive["detail"]))
    if "ideal" in raw:
        halves = [raw["ideal"][half] for half in ("first half", "second half")]
        per_draw = [draw["perturb"] + draw["forward"] for half in halves for draw in half]
        ideal = raw["ideal"]["theta"] + sum(per_draw)
        detail = f"theta {raw['ideal']['theta']:.3g} s; s per draw of all samples {_spread(per_draw)}"
        rows.append((f"ideal, s for K = {len(per_draw)}", ideal, None, detail))
    if "engine" in raw:
        one, two = (_engine_costs(raw["engine"][actors]) for actors in "12")
        rows += [(f"engine, {name}, s for K = {cost['draws']}", cost["busy"], None, cost["detail"])
                 for name, cost in (("1 actor", one), ("2 actors", two))]  # fmt: skip
        detail = f"sample-draws/s {two['throughput']:.3g} over {one['throughput']:.3g}, as the actors time their units"
        rows.append(("two actors / one", two["throughput"] / one["throughput"], 1.9, detail))
        detail = "the same by the wall clock, starting Ray, loading and writing included (short runs suffer)"
        rows.append(("", two["wall throughput"] / one["wall throughput"], None, detail))
        rows.append(("", two["per draw"] / one["per draw"], None, "s of a draw beside another actor / alone"))
    if ideal is not None and one is not None:
        rows.append(("ideal / engine", ideal / one["busy"], 0.95, "same samples and draws, time inside units"))
        rows.append(("", ideal / one["span"], None, "the same, from first unit's start to last one's end, so with Ray"))
        mine = [fmean(draw["abs_delta"][i] for half in halves for draw in half) for i in raw["engine"]["1"]["mean_abs"]]
        off = max(abs(a / b - 1) for a, b in zip(mine, raw["engine"]["1"]["mean_abs"].values(), strict=True))
        rows.append(("", off, None, "largest relative difference between their scores"))
    if naive is not None and one is not None:
        for draws in (settings["draws"], PAPER_DRAWS):  # both sides bear their pass over the unperturbed model
            theirs = naive["theta"] / draws + naive["draw"]
            ours = (one["theta"] / draws + one["per draw"]) / raw["work"]["samples"]
            detail = f"per sample x draw at K = {draws}: {theirs:.3g} s over {ours:.3g} s"
            rows.append(("naive / engine", theirs / ours, 6.0, detail))
    return rows


def _naive_costs(raw: Raw) -> Raw:
    """Seconds per sample: of the unperturbed forward, and of a draw."""
    runs = [run for half in ("first half", "second half") for run in raw["naive"][half]]
    mean_tokens = raw["work"]["tokens"] / raw["work"]["samples"]
    # over all samples this changes nothing; over some, perturbing costs each sample the same and a forward by tokens
    scale = mean_tokens / fmean(run["tokens"] for run in runs)
    weights = [p + r for run in runs for p, r in zip(run["perturb"], run["restore"], strict=True)]
    forwards = [seconds for run in runs for seconds in run["forward"]]
    detail = f"K = {len(runs[0]['forward'])}; perturb and restore {_spread(weights)}, forward {_spread(forwards)}"
    if len(runs) < raw["work"]["samples"]:
        detail = f"[yellow]EXTRAPOLATED by tokens from {len(runs)} of {raw['work']['samples']} samples[/]; {detail}"
    return {"theta": scale * fmean(r["theta"] for r in runs), "draw": fmean(weights) + scale * fmean(forwards),
            "detail": detail}  # fmt: skip


def _engine_costs(run: Raw) -> Raw:
    """What the units of one engine run say; `theta` and `per draw` are seconds for all samples on one actor."""
    units, draws = run["units"], run["draws"]
    workers = {unit["worker"]: 0.0 for unit in units}
    for unit in units:
        workers[unit["worker"]] += unit["seconds"]
    busy, seconds = max(workers.values()), [unit["seconds"] for unit in units]
    steady = [unit for unit in units if not unit["with_theta"]] or units
    per_draw = sum(u["seconds"] for u in steady) / sum(u["token_draws"] for u in steady)
    per_draw *= sum(unit["token_draws"] for unit in units) / draws
    long = sum(second >= LONG_UNIT for second in seconds)
    colour = "green" if long == len(units) else "red"
    detail = f"{len(units)} units of {_spread(seconds)} s, [{colour}]{long} of {len(units)} >= {LONG_UNIT:g} s[/]; "
    detail += f"wall clock {run['wall']:.4g} s with start-up; {len(workers)} actor(s) took part"
    return {
        "draws": draws, "busy": busy, "per draw": per_draw, "theta": sum(seconds) - per_draw * draws, "detail": detail,
        "span": max(u["finished"] for u in units) - min(u["finished"] - u["seconds"] for u in units),
        "throughput": run["samples"] * draws / busy, "wall throughput": run["samples"] * draws / run["wall"],
    }  # fmt: skip


def _spread(seconds: list[float]) -> str:
    return f"{min(seconds):.3g} .. {median(seconds):.3g} .. {max(seconds):.3g}"


def hardware() -> Raw:
    """The machine, and how busy it was before we began."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "load average": os.getloadavg(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "platform": platform.platform(),
    }  # fmt: skip


if __name__ == "__main__":
    auto_cli(main)
