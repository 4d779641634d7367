"""Compares the closed form's cost with a plain forward and backward of the same batches, and with Monte Carlo.

Only ratios within one run are meaningful, on a machine that does nothing else at the time. On Linux.
"""

import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Literal

import matplotlib.figure
import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.common import PAPER_DRAWS, Batches, Raw, resident, stopwatch
from benchmarks.figures import Figure, Results, ratios
from mrd_ray import ScoreConfig, ScoringSettings
from mrd_ray.mrd.closed_form import GradientNorms
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch
from mrd_ray.mrd.monte_carlo import draw_deltas
from mrd_ray.mrd.perturb import Replica
from mrd_ray.scoring.summary import png
from mrd_ray.workers.memory import activation_bytes

FROZEN, TRAINABLE = "plain, parameters frozen", "plain, parameters trainable"
RECOMPUTING, CLOSED = "closed form, layers recomputed", "closed form"


def main(
    model: str,
    data: str,
    out: str = "benchmarks/results",
    max_samples: int = 48,
    repeats: int = 3,
    draws: int = 16,
    micro_batch_tokens: int = 512,
    sigma: float = 1e-5,
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Benchmark the estimators here, on one thread or a GPU. Writes a JSON file and a plot of error against time.

    Args:
        model: directory or hub id; the demo keeps one under ~/.cache/mrd_ray.
        data: forget set, for example TOFU's ../shared/data/tofu/forget10.json.
        out: folder of the JSON file and the plot.
        max_samples: rows of the forget set.
        repeats: passes over the samples for each way; the ways take turns.
        draws: Monte Carlo draws to make; the cost of 200 is extrapolated.
        micro_batch_tokens: tokens per forward, padding included.
        sigma: standard deviation of the parameter noise.
        device: where the model is.
        dtype: of the weights; Monte Carlo only runs in float32.
    """
    results = Results("closed_form", locals(), out)
    torch.set_num_threads(1)
    tree = {"model": {"path": model, "dtype": dtype}, "data": {"path": data, "max_samples": max_samples}}
    tree |= {"run": {"dir": "unused"}}
    config = ScoreConfig.model_validate(tree | {"scoring": {"micro_batch_tokens": micro_batch_tokens, "sigma": sigma}})
    results.keep("peak MiB", peaks(config, device))
    work = Batches(config, device)
    results.keep("size", work.size)
    seconds, norms = passes(work, repeats)
    results.keep("seconds", seconds)
    if dtype == "float32":  # only here is sigma not lost to rounding
        results.keep("monte carlo", monte_carlo(work, sigma, draws, norms))
        results.file.with_suffix(".png").write_bytes(figure(results.raw))
    results.show(figures(results.raw))


def ways(model: PreTrainedModel) -> dict[str, Callable[[MicroBatch], torch.Tensor | None]]:
    """Passes over a batch; the closed form's passes return per-sample squared norms."""
    scoring = ScoringSettings(estimator="closed_form")
    recomputing, norms = (
        GradientNorms(model, activations=0.0),
        GradientNorms(model, None, activation_bytes(model, scoring)),
    )

    def plain(batch: MicroBatch) -> torch.Tensor:
        embedding: Any = model.get_input_embeddings()
        embedded = embedding(batch.token_ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
        targets = batch.token_ids[:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        (losses * batch.scored.flatten()).sum().backward()
        return losses

    def frozen(batch: MicroBatch) -> None:
        model.requires_grad_(False)
        plain(batch)

    def trainable(batch: MicroBatch) -> None:
        model.requires_grad_(True)
        plain(batch)
        model.zero_grad(set_to_none=True)

    of_norms = {RECOMPUTING: lambda batch: recomputing(batch)[1], CLOSED: lambda batch: norms(batch)[1]}
    return {FROZEN: frozen, TRAINABLE: trainable, **of_norms}


def passes(work: Batches, repeats: int) -> tuple[dict[str, list[float]], np.ndarray]:
    """Seconds of a pass over all samples, repeatedly; and every sample's gradient norm."""
    seconds: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):  # the first is the warm-up, on one batch
        for way, run in ways(work.model).items():
            lap = stopwatch()
            outputs = [run(batch) for batch in (work.batches if repeat else work.batches[:1])]
            if repeat:
                seconds.setdefault(way, []).append(lap())
    squares = torch.cat([squares for squares in outputs if squares is not None])
    return seconds, squares.sqrt().cpu().numpy()


def monte_carlo(work: Batches, sigma: float, draws: int, norms: np.ndarray) -> Raw:
    """Seconds per draw, and the error after each number of draws, relative to the closed form."""
    exact = sigma * np.sqrt(2 / np.pi) * norms
    replica, likelihood = Replica(work.model), Likelihood(work.model)
    lap = stopwatch()
    theta = [likelihood.log_neg_log_probs(batch) for batch in work.batches]
    raw: Raw = {"theta seconds": lap(), "draw seconds": [], "relative error by draws": []}
    deltas = []
    for k in range(draws):
        drawn = draw_deltas(replica, likelihood, work.batches, theta, sigma, 0, range(k, k + 1))
        deltas.append(torch.cat(drawn)[:, 0, 0].abs().cpu().numpy())
        raw["draw seconds"].append(lap())
        error = np.mean(deltas, 0) / exact - 1
        raw["relative error by draws"].append(float(np.sqrt(np.mean(error**2))))
    replica.restore()
    double = GradientNorms(work.model.double())
    references = torch.cat([double(batch)[1] for batch in work.batches[:2]]).sqrt().cpu().numpy()
    raw["relative error of the closed form"] = float(np.abs(norms[: len(references)] / references - 1).max())
    return raw


def peaks(config: ScoreConfig, device: str) -> dict[str, float]:
    """MiB that a pass over the largest batch adds to a loaded model; each way has its own process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as process:
        names = (FROZEN, TRAINABLE, RECOMPUTING, CLOSED)
        return {way: process.submit(_peak, config, way, device).result() for way in names}


def _peak(config: ScoreConfig, way: str, device: str) -> float:
    torch.set_num_threads(1)
    work = Batches(config, device)
    run = ways(work.model)[way]
    run(MicroBatch(work.batches[0].token_ids[:1], work.batches[0].scored[:1]))  # allocates the libraries' buffers
    largest = max(work.batches, key=lambda batch: batch.token_ids.numel())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(largest)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # memory that the small pass freed would be reused without being counted
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak of loading
    resident_before = resident("VmRSS")
    run(largest)
    return resident("VmHWM") - resident_before


def figures(raw: Raw) -> list[Figure]:
    """The figures that follow from the raw timings."""
    shown = []
    for way, laps in raw["seconds"].items():
        shown.append(Figure.of(way, laps, "s", f"{raw['size']['samples']} samples"))
    for way in (FROZEN, TRAINABLE):
        ratio = ratios(raw["seconds"][CLOSED], raw["seconds"][way])
        shown.append(Figure.of(f"closed form / {way}, time", ratio, at_most=1.0))
    for way in (FROZEN, TRAINABLE):
        ours, theirs = raw["peak MiB"][CLOSED], raw["peak MiB"][way]
        detail = f"{ours:.0f} MiB over {theirs:.0f}, beyond the loaded model"
        shown.append(Figure(f"closed form / {way}, peak memory", ours / theirs, detail=detail, at_most=1.0))
    detail = "every layer's activations made again in the backward, none kept"
    ratio = ratios(raw["seconds"][RECOMPUTING], raw["seconds"][CLOSED])
    shown.append(Figure.of(f"{RECOMPUTING} / kept, time", ratio, detail=detail))
    ours, theirs = raw["peak MiB"][RECOMPUTING], raw["peak MiB"][CLOSED]
    detail = f"{ours:.0f} MiB over {theirs:.0f}"
    shown.append(Figure(f"{RECOMPUTING} / kept, peak memory", ours / theirs, detail=detail))
    if (drawn := raw.get("monte carlo")) is None:
        return shown
    whole = [drawn["theta seconds"] + PAPER_DRAWS * lap for lap in drawn["draw seconds"]]
    name = f"Monte Carlo, K = {PAPER_DRAWS}"
    shown.append(Figure.of(name, whole, "s", f"from {len(whole)} draws, {PAPER_DRAWS / len(whole):.3g} times as many"))
    faster = median(whole) / median(raw["seconds"][CLOSED])
    shown.append(Figure(f"{name} / closed form, time", faster, at_least=65.0))
    errors = drawn["relative error by draws"]
    shown.append(Figure(f"error at K = {len(errors)}", errors[-1], detail="root mean square, relative"))
    detail = "largest, relative, against float64"
    shown.append(Figure("error of the closed form", drawn["relative error of the closed form"], detail=detail))
    return shown


def figure(raw: Raw) -> bytes:
    """Relative error against seconds, both axes logarithmic: PNG."""
    drawn = raw["monte carlo"]
    page = matplotlib.figure.Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = page.add_subplot()
    times = drawn["theta seconds"] + np.cumsum(drawn["draw seconds"])
    errors = drawn["relative error by draws"]
    axis.plot(times, errors, ".-", color="#4878a8", label=f"Monte Carlo, K = 1 to {len(errors)}")
    draws = np.arange(len(errors), PAPER_DRAWS + 1)
    extrapolated = drawn["theta seconds"] + draws * median(drawn["draw seconds"])
    scale = errors[-1] * np.sqrt(len(errors) / draws)
    axis.plot(extrapolated, scale, "--", color="#4878a8", label=f"extrapolated to K = {PAPER_DRAWS} as 1/sqrt(K)")
    closed = median(raw["seconds"][CLOSED])
    axis.plot([closed], [drawn["relative error of the closed form"]], "o", color="#c44e52", label="closed form")
    axis.set(xscale="log", yscale="log", xlabel="seconds", ylabel="relative error of a score")
    axis.set_title(f"{raw['size']['samples']} samples, {raw['size']['parameters'] / 1e6:.0f} M parameters")
    axis.legend()
    return png(page)
