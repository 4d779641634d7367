"""What scoring costs: against Algorithm 1 as written, against the best single process, and with a second actor.

Only ratios within one run mean anything, on a machine that does nothing else meanwhile. For CPUs, on Linux.
"""

import collections
import itertools
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from common import Batches, Raw, machine, resident, stopwatch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from mrd_ray import ModelConfig, ScoreConfig, ScoringConfig, models, score
from mrd_ray.mrd import noise
from mrd_ray.mrd.likelihood import Likelihood
from mrd_ray.mrd.monte_carlo import delta, draw_seed
from mrd_ray.mrd.perturb import Replica
from mrd_ray.scoring import plan
from mrd_ray.scoring.actor import RESULT_SCHEMA, ScoringActor, Task

Part = Literal["noise", "memory", "naive", "ideal", "engine"]
Row = tuple[str, float, float | None, str]  # what, value, the least it should be, detail
LONG_UNIT = 30.0  # seconds; a shorter unit says little about those of a real run
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
    micro_batch_tokens: int = 512,
    sigma: float = 1e-5,
) -> None:
    """Benchmark Monte Carlo scoring here, one thread per process; print a table and write one JSON file.

    Example: python benchmarks/scoring.py --model DIR --data ../shared/data/tofu/forget10.json --parts '[ideal, engine]'

    Args:
        model: directory or hub id; the demo keeps one under ~/.cache/mrd_ray.
        data: forget set, for example TOFU's ../shared/data/tofu/forget10.json.
        out: folder of the JSON file.
        parts: which of noise, memory, naive, ideal and engine; a ratio is given if both its sides are run.
        max_samples: rows of the forget set. They should take over 30 s to run through the model once.
        draws: K of `ideal` and of the engine with one actor. Two actors do 2 K, so that each actor has as much to do,
            its pass over the unperturbed model included; with K that pass would hide how draws scale.
        naive_draws: K of `naive`, whose cost is linear in K.
        naive_samples: run `naive` on so many samples only, evenly spaced by length, and extrapolate by tokens.
        micro_batch_tokens: tokens per forward, padding included.
        sigma: standard deviation of the parameter noise.
    """
    raw: Raw = {"configuration": dict(locals()), "machine": machine()}
    file = Path(out) / time.strftime("scoring-%Y%m%d-%H%M%S.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    console = Console() if sys.stdout.isatty() else Console(width=150)  # a log has no width of its own
    torch.set_num_threads(1)

    def keep(part: str, name: str, found: Any) -> None:
        raw.setdefault(part, {})[name] = found
        file.write_text(json.dumps(raw, indent=1))
        console.log(f"{part}: {name}")

    if "noise" in parts:
        keep("noise", "seconds per normal", noise_seconds())
    if "memory" in parts:
        keep("memory", "cases", memory_cases())
    if {"naive", "ideal", "engine"} & set(parts):
        scoring = {"sigma": sigma, "num_draws": draws, "micro_batch_tokens": micro_batch_tokens}
        config = {"model": {"path": model}, "data": {"path": data, "max_samples": max_samples}, "scoring": scoring}
        work = Work(ScoreConfig.model_validate(config | {"run": {"dir": "unused"}}))
        keep("work", "size", work.size)
        # the sides of a ratio take turns, so that a machine that drifts shows as spread and not as a result
        if "naive" in parts:
            count = min(naive_samples or len(work.order), len(work.order))
            chosen = [work.order[round(i)] for i in np.linspace(0, len(work.order) - 1, count)]  # of all lengths
            keep("naive", "first half", [work.naive(i, naive_draws) for i in chosen[0::2]])
        if "ideal" in parts:
            keep("ideal", "theta", work.ideal_theta())
            keep("ideal", "first half", [work.ideal_draw(k) for k in range(draws // 2)])
        if "engine" in parts:
            keep("engine", "1 actor", engine(config, work, 1, draws))
        if "ideal" in parts:
            keep("ideal", "second half", [work.ideal_draw(k) for k in range(draws // 2, draws)])
        if "engine" in parts:
            keep("engine", "2 actors", engine(config, work, 2, 2 * draws))
        if "naive" in parts:
            keep("naive", "second half", [work.naive(i, naive_draws) for i in chosen[1::2]])

    table = Table("what", "value", "target", "detail", title=f"Scoring on {raw['machine']['cpu']}")
    rows = summary(raw)
    for what, value, target, detail in rows:
        met = "" if target is None else f"[{'green' if value >= target else 'red'}]>= {target:g}"
        table.add_row(what, f"{value:.4g}", met, detail)
    keep("summary", "rows (what, value, target, detail)", rows)
    console.print(table)
    console.print(f"Timings and configuration: {file}", soft_wrap=True)


class Work(Batches):
    """Ways to score the samples in this process, on one replica. Times in seconds."""

    def __init__(self, config: ScoreConfig) -> None:
        super().__init__(config)
        self._scoring = config.scoring
        self._replica, self._likelihood = Replica(self.model), Likelihood(self.model)

    @torch.no_grad()
    def naive(self, index: int, draws: int) -> Raw:
        """Algorithm 1 for one sample, line by line, as one would first write it."""
        self._replica.restore()
        ids, scored = torch.tensor(self.rows[index]["token_ids"]), torch.tensor(self.rows[index]["scored"])
        spent: Raw = {"tokens": len(ids), "weights": [], "forward": [], "delta": []}
        lap = stopwatch()
        p = _log_probs(self.model, ids)[scored[1:]]
        spent["theta"] = lap()
        for _ in range(draws):
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=self._scoring.sigma)
            noising = lap()
            moved = ((p - _log_probs(self.model, ids)[scored[1:]]) / p).sum().item()
            spent["forward"].append(lap())
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self._replica.base[name])
            spent["weights"].append(noising + lap())
            spent["delta"].append(str(moved))  # text, since it is 0/0 on memorised tokens, and JSON has no NaN
        return spent

    def ideal_theta(self) -> float:
        """The pass of all samples over the unperturbed model."""
        lap = stopwatch()
        self._replica.restore()
        self._theta = [self._likelihood.log_neg_log_probs(batch) for batch in self.batches]
        return lap()

    def ideal_draw(self, k: int) -> Raw:
        """Draw k for all samples: one perturbation, the forwards, and nothing else."""
        lap = stopwatch()
        self._replica.perturb(self._scoring.sigma, draw_seed(self._scoring.seed, k))
        perturb = lap()
        deltas = [
            delta(theta, self._likelihood.log_neg_log_probs(batch), batch.scored)
            for theta, batch in zip(self._theta, self.batches, strict=True)
        ]
        return {"perturb": perturb, "forward": lap(), "deltas": torch.cat(deltas).tolist()}


def _log_probs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(ids[None]).logits.log_softmax(-1)[0, :-1].gather(1, ids[1:, None])[:, 0]
    return found


def engine(config: Raw, work: Work, actors: int, draws: int) -> Raw:
    """`mrd-ray score` in a fresh run directory: its wall-clock time, and every unit as its actor timed it."""
    with tempfile.TemporaryDirectory() as folder:
        pool = {"actors": actors, "cpus_per_actor": 1, "gpus_per_actor": 0}
        scoring = config["scoring"] | {"num_draws": draws}
        lap = stopwatch()
        finished = score(ScoreConfig.model_validate(config | {"run": {"dir": folder}, "scoring": scoring, "ray": pool}))
        wall = lap()
        units = []
        for name in finished.run.names("units"):
            (row,) = (
                finished.run.read_table(f"units/{name}", RESULT_SCHEMA)
                .select(["unit_id", "worker", "seconds"])
                .to_pylist()
            )
            unit = plan.Unit.of_id(row["unit_id"])
            tokens = int(work.layout.padded_tokens[unit.first_micro_batch : unit.stop_micro_batch].sum())
            written = Path(finished.run.path(f"units/{name}")).stat().st_mtime
            units.append(row | vars(unit) | {"work": tokens * (unit.stop_draw - unit.first_draw), "written": written})
    units.sort(key=lambda unit: unit["written"])
    held: dict[str, int] = {}
    for unit in units:  # an actor that turns to other samples first runs them through the unperturbed model
        unit["with_theta"] = held.get(unit["worker"]) != unit["first_micro_batch"]
        held[unit["worker"]] = unit["first_micro_batch"]
    scores = {row["sample_id"]: row["mean_abs"] for row in finished.scores.to_pylist()}
    mean_abs = [scores[work.rows[i]["sample_id"]] for i in work.order]
    return {"wall": wall, "draws": draws, "units": units, "mean_abs": mean_abs}


def noise_seconds(repeats: int = 30, size: int = 1 << 24) -> dict[str, list[float]]:
    """Seconds per normal on one core, by way of making them, into warm memory; the ways take turns."""
    out, base = torch.zeros(size), torch.zeros(size)
    ways: dict[str, Callable[[], Any]] = {
        "noise, made chunk by chunk": lambda: collections.deque(noise._chunks(0, "benchmark", 0, size), maxlen=0),
        "noise, base + sigma z": lambda: noise.add_noise(out, base, 1.0, 0, "benchmark"),
        "torch.randn": lambda: torch.randn(size, out=out),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _, (way, run) in itertools.product(range(repeats + 1), ways.items()):
        lap = stopwatch()
        run()
        seconds[way].append(lap() / size)
    return {way: timed[1:] for way, timed in seconds.items()}  # the first was the warm-up


def memory_cases() -> list[Raw]:
    """Memory of an actor over one unit, for few and many draws and for a small and a large vocabulary."""
    vocabularies, draws = (131072, 8192), (20, 2)
    shape: Raw = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in vocabularies:
            llama = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **shape)
            LlamaForCausalLM(llama).save_pretrained(f"{folder}/{vocabulary}")
        # a fresh process each, for a peak cannot be undone; two at once, since nothing here is timed
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as processes:
            cases = [processes.submit(_memory_case, folder, v, k) for v in vocabularies for k in draws]  # longest first
            return [case.result() for case in cases]


def _memory_case(folder: str, vocabulary: int, draws: int) -> Raw:
    found: Raw = {"vocabulary": vocabulary, "draws": draws, "before": resident("VmRSS")}
    model = ModelConfig.model_validate({"path": str(Path(folder) / str(vocabulary))})
    ids = np.random.default_rng(0).integers(vocabulary, size=(32, 128)).tolist()
    scored = [False] + [True] * 127
    samples = [{"micro_batch": 0, "sample_id": str(i), "token_ids": x, "scored": scored} for i, x in enumerate(ids)]
    actor = ScoringActor(Task(model, ScoringConfig(), models.files_digest(model), 1, False, samples[:1]))
    found["peak when loaded"] = resident("VmHWM")
    (result,) = actor(plan.Unit(0, 0, 1, 0, draws).unit_id, pa.Table.from_pylist(samples)).to_pylist()
    found["peak"] = resident("VmHWM")
    if result["fatal"] or any(sample["error"] for sample in result["samples"]):
        raise RuntimeError(f"the unit failed: {result}")
    return found | {"weights": (Path(model.path) / "model.safetensors").stat().st_size}


def summary(raw: Raw) -> list[Row]:
    """What the raw timings come to."""
    rows: list[Row] = []
    for way, seconds in raw.get("noise", {}).get("seconds per normal", {}).items():
        detail = f"M normals/s on one core, median of {len(seconds)}; best {1e-6 / min(seconds):.4g}"
        rows.append((way, 1e-6 / median(seconds), None, detail))
    for case in raw.get("memory", {}).get("cases", []):
        weights = case["weights"] / 2**20
        detail = f"MiB at peak, less {case['before']:.0f} before loading and 2 x {weights:.0f} of weights"
        over = case["peak"] - case["before"] - 2 * weights
        rows.append((f"memory, vocabulary {case['vocabulary']:,}, K = {case['draws']}", over, None, detail))
    naive, ideal, one, two = None, None, None, None
    if "naive" in raw:
        naive = _naive_costs(raw["naive"]["first half"] + raw["naive"]["second half"], raw["work"]["size"])
        rows.append(("naive, s per sample x draw", naive["draw"], None, naive["detail"]))
    if "ideal" in raw:
        passes = raw["ideal"]["first half"] + raw["ideal"]["second half"]
        per_draw = [found["perturb"] + found["forward"] for found in passes]
        ideal = raw["ideal"]["theta"] + sum(per_draw)
        detail = f"unperturbed {raw['ideal']['theta']:.3g} s, then per draw {_spread(per_draw)}"
        rows.append((f"ideal, s for K = {len(passes)}", ideal, None, detail))
    if "engine" in raw:
        one, two = (_engine_costs(raw["engine"][pool]) for pool in ("1 actor", "2 actors"))
        rows.append((f"engine, 1 actor, s for K = {one['draws']}", one["busy"], None, one["detail"]))
        rows.append((f"engine, 2 actors, s for K = {two['draws']}", two["busy"], None, two["detail"]))
        for name, target, detail in (
            ("busy", 1.9, "sample-draws per second of the busiest actor's units"),
            ("wall", None, "the same by the wall clock, start-up included"),
        ):
            ratio = (two["draws"] / two[name]) / (one["draws"] / one[name])
            rows.append(("  two actors / one", ratio, target, detail))
        rows.append(("  s of a draw, two / one", two["draw"] / one["draw"], None, "what two actors cost each other"))
    if ideal and one:
        rows.append(("  ideal / engine", ideal / one["busy"], 0.95, "same samples and draws, time inside units"))
        rows.append(
            ("  ideal / engine", ideal / one["span"], None, "and between them, by when their files were written")
        )
        mine = [fmean(map(abs, deltas)) for deltas in zip(*(found["deltas"] for found in passes), strict=True)]
        pairs = zip(mine, raw["engine"]["1 actor"]["mean_abs"], strict=True)
        off = max((abs(a / b - 1) for a, b in pairs if b), default=0.0)
        rows.append(("  ideal - engine", off, None, "largest relative difference of a score"))
    if naive and one:
        for draws in (one["draws"], PAPER_DRAWS):  # each side bears one unperturbed pass for so many draws
            theirs = naive["theta"] / draws + naive["draw"]
            ours = (one["theta"] / draws + one["draw"]) / raw["work"]["size"]["samples"]
            detail = f"K = {draws}: {theirs:.3g} s per sample x draw over {ours:.3g} s"
            rows.append(("  naive / engine", theirs / ours, 6.0, detail))
    return rows


def _naive_costs(runs: list[Raw], size: Raw) -> Raw:
    """Mean seconds per sample: `theta`, its unperturbed forward, and `draw`."""
    # noise costs each sample the same, a forward goes by tokens; with all samples run the scale is 1
    scale = size["tokens"] / size["samples"] / fmean(run["tokens"] for run in runs)
    weights, forward = ([s for run in runs for s in run[what]] for what in ("weights", "forward"))
    detail = f"noise and restore {_spread(weights)}, forward {_spread(forward)}"
    if len(runs) < size["samples"]:
        detail = f"EXTRAPOLATED by tokens from {len(runs)} of {size['samples']} samples; {detail}"
    theta = scale * fmean(run["theta"] for run in runs)
    return {"theta": theta, "draw": fmean(weights) + scale * fmean(forward), "detail": detail}


def _engine_costs(run: Raw) -> Raw:
    """Seconds: `busy`, `span` and `wall` of the run; `theta` and `draw`, of one actor on all samples."""
    units, draws = run["units"], run["draws"]
    seconds = [unit["seconds"] for unit in units]
    workers = {unit["worker"] for unit in units}
    busy = max(sum(unit["seconds"] for unit in units if unit["worker"] == worker) for worker in workers)
    span = max(unit["written"] for unit in units) - min(unit["written"] - unit["seconds"] for unit in units)
    steady = [unit for unit in units if not unit["with_theta"]] or units
    per_work = sum(unit["seconds"] for unit in steady) / sum(unit["work"] for unit in steady)
    draw = per_work * sum(unit["work"] for unit in units) / draws
    long = sum(second >= LONG_UNIT for second in seconds)
    detail = f"{len(units)} units of {_spread(seconds)}, {long} of them >= {LONG_UNIT:g} s, on {len(workers)} actor(s)"
    detail += f"; wall clock {run['wall']:.3g} s, start-up included"
    theta = sum(seconds) - draw * draws
    return {"draws": draws, "busy": busy, "span": span, "wall": run["wall"], "theta": theta, "draw": draw,
            "detail": detail}  # fmt: skip


def _spread(seconds: list[float]) -> str:
    return f"{min(seconds):.3g} .. {median(seconds):.3g} .. {max(seconds):.3g} s"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
