"""What unlearning costs: steps compared with plain torch, a second worker, refreshes in place, memory by ZeRO stage.

Only ratios within one run are meaningful, on a machine that does nothing else at the time. For CPUs, on Linux.
"""

import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from torch.multiprocessing.spawn import spawn
from transformers import PreTrainedModel

from benchmarks.closed_form import TRAINABLE, ways
from benchmarks.common import Raw, micro_batches, resident, stopwatch
from benchmarks.figures import Figure, Results, ratios
from mrd_ray.config import ScoringSettings, UnlearnConfig
from mrd_ray.data.micro_batches import lengths
from mrd_ray.data.tokens import Limits
from mrd_ray.models import load
from mrd_ray.mrd.likelihood import MicroBatch
from mrd_ray.unlearning import losses, refresh, sets
from mrd_ray.unlearning import model as trained
from mrd_ray.unlearning.engine import Engine, configuration
from mrd_ray.unlearning.loop import Loop, Sets
from mrd_ray.unlearning.sampling import ForgetStream, ShuffledStream, sampling_probabilities
from mrd_ray.unlearning.state import State
from mrd_ray.unlearning.stopping import Knowledge
from mrd_ray.workers.memory import collate
from mrd_ray.workers.ranks import Ranks

Part = Literal["throughput", "workers", "refresh", "memory"]
Stage = Literal[0, 1, 2, 3]
Runs = list[list[Raw]]  # per repeat and worker, what `steps_of` returned
WARM_UP = 2  # steps
FEW_DRAWS = (2, 6)  # the cost of more draws is extrapolated from these
PLAIN = "plain torch"


def main(
    model: str,
    data: str,
    retain: str,
    out: str = "benchmarks/results",
    parts: tuple[Part, ...] = ("throughput", "workers", "refresh", "memory"),
    stages: tuple[Stage, ...] = (0, 1, 2, 3),
    threads: int = 2,
    steps: int = 4,
    repeats: int = 3,
    batch_size: int = 8,
    max_samples: int = 40,
    num_draws: int = 200,
) -> None:
    """Benchmark unlearning with npo here.

    Example: python -m benchmarks unlearning --model DIR --data FILE --retain FILE --parts '[memory]' --stages '[0, 3]'

    Args:
        model: directory or hub id; the demo keeps one under ~/.cache/mrd_ray.
        data: forget set, for example TOFU's ../shared/data/tofu/forget01.json.
        retain: retain set, for example ../shared/data/tofu/retain99.json.
        out: folder of the JSON file.
        parts: throughput (a worker with `threads` threads, compared with plain torch), workers (two with a thread each,
            compared with one), refresh (its cost for a worker with `threads` threads), memory (of each of two workers).
        stages: ZeRO stages to measure.
        threads: of the single worker, and of plain torch.
        steps: optimiser steps to time, after two for the warm-up.
        repeats: how often each way is measured, in fresh processes (except for refreshes); the ways take turns.
        batch_size: an even number of forget samples per step, over all workers; a step has as many retain samples.
        max_samples: rows of the forget set; a refresh scores all of them.
        num_draws: K of a refresh with monte_carlo; over 6, its cost is extrapolated from 2 and 6 draws.
    """
    results = Results("unlearning", locals(), out)
    tree: Raw = {"model": {"path": model}, "data": {"path": data, "max_samples": max_samples}, "run": {"dir": "unused"}}
    tree |= {"retain": {"path": retain}, "stopping": {"extraction_n": 0, "retain_samples": 1}}
    tree |= {"unlearning": {"method": "npo", "weighting": "uniform", "batch_size": batch_size}}
    config = UnlearnConfig.model_validate(tree)
    limits = Limits.of(load.skeleton(config.model))
    of_run = sets.build(config, load.load_tokenizer(config.model), limits, Console(quiet=True))
    (fields,) = Job(config, of_run, 1, threads, steps).run(reference)
    initial = Knowledge(**fields)
    plain = Job(config, of_run, 1, threads, steps, initial, plain=True)
    ours = {f"ZeRO-{stage}": plain.under(stage) for stage in stages}
    results.keep("forget set", {"samples": len(of_run.forget), "tokens": int(lengths(of_run.forget).sum())})

    if "throughput" in parts:
        results.keep("throughput", take_turns({PLAIN: plain} | ours, repeats))
    if "workers" in parts:
        ways = {f"{way}, {pool}": replace(job, workers=workers, threads=1)
                for way, job in ours.items() for workers, pool in ((1, "1 worker"), (2, "2 workers"))}  # fmt: skip
        results.keep("workers", take_turns(ways, repeats))
    if "refresh" in parts:
        draws = FEW_DRAWS if num_draws > max(FEW_DRAWS) else (num_draws,)
        results.keep("refresh", {way: job.run(refreshes, draws, repeats)[0] for way, job in ours.items()})
    if "memory" in parts:  # during the warm-up; plain torch takes as many samples as one of the two workers
        half = replace(plain, config=_with(config, "unlearning", batch_size=batch_size // 2))
        ways = {f"{PLAIN}, half a batch": half}
        ways |= {f"{way}, 2 workers": replace(job, workers=2) for way, job in ours.items()}
        results.keep("memory", take_turns({way: replace(job, threads=1, steps=0) for way, job in ways.items()}, 1))

    results.show(figures(results.raw, f"{threads} thread(s)", num_draws))


def _with(config: UnlearnConfig, group: str, **settings: object) -> UnlearnConfig:
    return config.model_copy(update={group: getattr(config, group).model_copy(update=settings)})


@dataclass(frozen=True)
class Job:
    """Work for separate processes: time `steps` of the engine or of plain torch.

    initial: the evaluation before the first step, which npo needs.
    """

    config: UnlearnConfig
    sets: Sets
    workers: int
    threads: int
    steps: int
    initial: Knowledge | None = None
    plain: bool = False

    def under(self, stage: int) -> "Job":
        """The engine's work with this ZeRO stage."""
        return replace(self, config=_with(self.config, "deepspeed", zero_stage=stage), plain=False)

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Run work(self, ranks, *args) in N fresh processes. Returns what each returns, as plain JSON."""
        with tempfile.TemporaryDirectory() as folder:
            spawn(_process, (folder, work, self, args), nprocs=self.workers)
            return [json.loads(Path(folder, str(rank)).read_text(encoding="utf-8")) for rank in range(self.workers)]


def _process(rank: int, folder: str, work: Callable[..., object], job: Job, args: tuple[object, ...]) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(job.threads)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(job.workers), DS_ACCELERATOR="cpu")
    for module in ("deepspeed", "torch._inductor.compile_fx"):  # as the engine would; the latter takes 40 MiB for ZeRO
        importlib.import_module(module)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=job.workers)
    Path(folder, str(rank)).write_text(json.dumps(work(job, Ranks(rank, job.workers), *args)), encoding="utf-8")
    dist.destroy_process_group()


def take_turns(ways: dict[str, Job], repeats: int) -> dict[str, Runs]:
    """Time the steps of each way N times, in forward and reverse order in turn, so that drift affects all ways."""
    taken: dict[str, Runs] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in list(ways)[:: -1 if repeat % 2 else 1]:
            taken[way].append(ways[way].run(steps_of))
    return taken


def reference(job: Job, ranks: Ranks) -> Raw:
    """What the model knows before any step: the fields of Knowledge."""
    return asdict(_loop(job, ranks, trained.load(job.config, torch.device("cpu"))).evaluate())


def steps_of(job: Job, ranks: Ranks) -> Raw:
    """Each step after the warm-up, with its seconds, and this worker's memory."""
    mebibytes = {"imports": resident("VmRSS")}
    model = trained.load(job.config, torch.device("cpu"))
    weights = sum(4 * parameter.numel() for parameter in model.parameters()) / 2**20
    mebibytes |= {"loaded": resident("VmRSS"), "weights": weights}
    step = _plain_step(job, model) if job.plain else _engine_step(_loop(job, ranks, model))
    steps = []
    for _ in range(WARM_UP + job.steps):
        lap = stopwatch()
        steps.append(step() | {"seconds": lap()})
    mebibytes["peak"] = resident("VmHWM")
    return {"steps": steps[WARM_UP:], "MiB": mebibytes}


def refreshes(job: Job, ranks: Ranks, draws: tuple[int, ...], repeats: int) -> Raw:
    """Seconds of steps, refreshes by each estimator, and plain epochs; they take turns, after one for the warm-up."""
    loop = _loop(job, ranks, trained.load(job.config, torch.device("cpu")))
    plain = ways(trained.load(job.config, torch.device("cpu")))[TRAINABLE]
    batches = micro_batches(loop.sets.forget, ScoringSettings().micro_batch_tokens)
    estimators = {"closed form": ScoringSettings(estimator="closed_form")}
    estimators |= {f"K = {k}": ScoringSettings(estimator="monte_carlo", num_draws=k) for k in draws}
    seconds: dict[str, list[float]] = {}
    turn: list[tuple[str, Callable[[], Any]]] = [("step", _engine_step(loop))] * job.steps
    turn.append(("epoch", lambda: [plain(batch) for batch in batches]))
    for name, scoring in estimators.items():
        turn.append((name, partial(refresh.score_in_place, loop.engine, loop.sets.forget, scoring)))
    for repeat in range(repeats + 1):
        for name, do in turn if repeat else turn[:-1]:  # the largest number of draws needs no warm-up of its own
            lap = stopwatch()
            do()
            if repeat:
                seconds.setdefault(name, []).append(lap())
    return {"seconds": seconds, "draws": draws}


def _loop(job: Job, ranks: Ranks, model: PreTrainedModel) -> Loop:
    engine = Engine(model, job.config, configuration(job.config, ranks.size), ranks)
    nowhere: dict[str, Any] = dict.fromkeys(("log", "keep_scores", "checkpoint"), lambda *_: None)
    return Loop(job.config, job.sets, engine, State(initial=job.initial), **nowhere)


def _engine_step(loop: Loop) -> Callable[[], Raw]:
    """A function that takes an optimiser step and returns its tokens and losses."""

    def step() -> Raw:
        if (problem := loop.take_step()) is not None:
            raise RuntimeError(problem)
        return dict(loop.state.log[-1])

    return step


def _plain_step(job: Job, model: PreTrainedModel) -> Callable[[], Raw]:
    """The same steps in a plain loop with batches that are ready."""
    unlearning, size = job.config.unlearning, job.config.unlearning.batch_size
    assert job.initial is not None
    assert job.sets.retain is not None
    log_prob = torch.tensor(job.initial.log_prob, dtype=torch.float64)
    probabilities = sampling_probabilities(job.sets.forget["sample_id"].to_pylist(), None, unlearning.weighting)
    forget = ForgetStream(probabilities, unlearning.seed)
    retain = ShuffledStream(len(job.sets.retain), unlearning.seed)
    ready, halves = [], (slice(size), slice(size, None))
    for i in range(WARM_UP + job.steps):
        drawn, kept = forget.at(i, size), retain.at(i * size, size)
        rows = [*job.sets.forget.take(drawn).to_pylist(), *job.sets.retain.take(kept).to_pylist()]
        to_forget, to_retain = (collate(rows[half], model.device) for half in halves)
        tokens = sum(len(row["token_ids"]) for row in rows)
        ready.append((to_forget, to_retain, log_prob[torch.from_numpy(drawn)], tokens))
    optimizer = torch.optim.AdamW(model.parameters(), unlearning.learning_rate, weight_decay=unlearning.weight_decay)

    def log_probs(batch: MicroBatch) -> torch.Tensor:
        return losses.log_probs(model(input_ids=batch.token_ids, use_cache=False).logits, batch)

    def step() -> Raw:
        to_forget, to_retain, initially, tokens = ready.pop(0)
        forget_loss = losses.npo(log_probs(to_forget), initially, unlearning.beta).mean()
        forget_loss.backward()
        retain_loss = losses.descent(log_probs(to_retain), to_retain.scored.sum(1)).mean()
        (unlearning.retain_weight * retain_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), unlearning.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {"forget_loss": forget_loss.item(), "retain_loss": retain_loss.item(), "tokens": tokens}

    return step


def figures(raw: Raw, threads: str, num_draws: int) -> list[Figure]:
    """The figures that follow from the raw measurements."""
    shown: list[Figure] = []
    if "throughput" in raw:
        runs = raw["throughput"]
        shown += [_rate(f"{way}, {threads}", runs[way]) for way in runs]
        shown += [_faster(f"{way} / {PLAIN}", runs[way], runs[PLAIN]) for way in runs if way != PLAIN]
    if "workers" in raw:
        runs, ways = raw["workers"], list(raw["workers"])
        shown += [_rate(f"{way} of a thread", runs[way]) for way in ways]
        pairs = zip(ways[::2], ways[1::2], strict=True)
        shown += [_faster(f"{two} / {one.split(', ')[1]}", runs[two], runs[one]) for one, two in pairs]
    for way, refreshed in raw.get("refresh", {}).items():
        shown += _prices(way, refreshed, num_draws, f"{raw['forget set']['samples']} samples, {threads}")
    for way, (workers,) in raw.get("memory", {}).items():
        memory = max((worker["MiB"] for worker in workers), key=lambda mebibytes: mebibytes["peak"])
        for level, name in {"imports": "imports", "loaded": "the loaded model"}.items():
            over, weights = memory["peak"] - memory[level], memory["weights"]
            detail = f"of the largest worker; {over / weights:.3g} times the weights, {weights:.4g} MiB in float32"
            shown.append(Figure(f"{way}: peak over {name}", over, "MiB", detail))
    return shown


def _steps(runs: Runs) -> list[Raw]:
    return [step for workers in runs for step in workers[0]["steps"]]


def _rate(what: str, runs: Runs) -> Figure:
    return Figure.of(what, [step["tokens"] / step["seconds"] for step in _steps(runs)], "tokens/s")


def _faster(what: str, runs: Runs, than: Runs) -> Figure:
    pairs = list(zip(_steps(runs), _steps(than), strict=True))  # for the same batches
    off = max(abs(ours[loss] / theirs[loss] - 1) for ours, theirs in pairs for loss in ("forget_loss", "retain_loss"))
    speed = ratios(*([step["seconds"] for step in _steps(of)] for of in (than, runs)))
    return Figure.of(what, speed, detail=f"speed, step by step; losses differ by {off:.1g} at most")


def _prices(way: str, refreshed: Raw, num_draws: int, of_what: str) -> list[Figure]:
    """The cost of refreshes, in steps."""
    seconds, step = refreshed["seconds"], median(refreshed["seconds"]["step"])
    first, last = min(refreshed["draws"]), max(refreshed["draws"])
    drawn, name = seconds[f"K = {last}"], f"monte_carlo, K = {num_draws}"
    if last < num_draws:  # turn by turn, since drift between turns would be multiplied
        pairs = zip(seconds[f"K = {first}"], drawn, strict=True)
        drawn = [many + (num_draws - last) * (many - few) / (last - first) for few, many in pairs]
        name += ", EXTRAPOLATED"
    prices = {"closed form": seconds["closed form"], name: drawn}
    detail = f"of {step:.3g} s; a refresh of {of_what}"
    figures = [
        Figure.of(f"{way}, {what}", [price / step for price in laps], "steps", detail) for what, laps in prices.items()
    ]
    epochs = ratios(seconds["closed form"], seconds["epoch"])
    detail = "of plain torch's forward and backward over the same samples"
    return [*figures, Figure.of(f"{way}, closed form / epoch", epochs, detail=detail, at_most=1.0)]
