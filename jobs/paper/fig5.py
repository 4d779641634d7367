"""Figure 5: how does MRD change with sigma, with the precision, and with the number of draws K?"""

from typing import Any

import matplotlib.figure
import numpy as np

from jobs.paper import sweep
from jobs.paper.config import Fig5Config
from jobs.paper.findings import Cell, Findings
from jobs.paper.statistics import Interval, mean, spearman
from jobs.paper.subject import Subject, prepare
from mrd_ray.config import RunSettings, ScoreConfig, ScoringSettings
from mrd_ray.scoring.score import score

_CLAIM = "MRD is measured with sigma = 1e-5 and K = 200; the order it puts samples in is stable around these values."

_SETTINGS = ("parameters", "seed", "micro_batch_tokens")  # of scoring, besides what the sweep varies


def experiment(config: Fig5Config) -> tuple[Findings, Subject]:
    """Compare Algorithm 1, at each sigma and precision and at each K, with the closed form in float32."""
    settings = {f"scoring.{name}": getattr(config.scoring, name) for name in _SETTINGS}
    own = {
        "scored": config.scored,
        "sigma_draws": config.sigma_draws,
        "scoring.sigma": config.scoring.sigma,
        "experiment": "fig5",
    }
    subject = prepare(config, settings | own)
    # one at a time, since each run spreads over all actors
    results = sweep.work_off(subject.run, "Scoring", _score, _runs(config, subject), at_once=1)
    exact = results["closed-form-float32"]
    rows = [_row(name, result, exact) for name, result in results.items()]
    title = "Figure 5: MRD with sigma, precision and K"
    return Findings("fig5", title, _CLAIM, rows, _found(config, results, exact), _page(config, results)), subject


def _runs(config: Fig5Config, subject: Subject) -> dict[str, ScoreConfig]:
    """A scoring run of each cell."""
    base = {name: getattr(config.scoring, name) for name in _SETTINGS}

    data = config.data if config.scored is None else config.data.model_copy(update={"max_samples": config.scored})

    def run(directory: str, dtype: str, **scoring: Any) -> ScoreConfig:
        return ScoreConfig(
            model=subject.model.model_copy(update={"dtype": dtype}),
            data=data,
            run=RunSettings(dir=subject.run.path(f"runs/{directory}")),
            scoring=ScoringSettings(**base, **scoring),
            ray=config.ray,
        )

    sigma, runs = config.scoring.sigma, {}
    for dtype in dict.fromkeys(("float32", *config.dtypes)):
        name = f"closed-form-{dtype}"
        runs[name] = run(name, dtype, estimator="closed_form", sigma=sigma)
    # the effect of low precision is the question, so allow it
    of_draws = {"estimator": "monte_carlo", "allow_low_precision": True}
    for dtype in config.dtypes:
        for other in sorted(config.sigmas):
            name = f"{dtype}-sigma-{other:g}"
            runs[name] = run(name, dtype, sigma=other, num_draws=config.sigma_draws, **of_draws)
    for draws in sorted(config.draws):  # each resumes from the one before, in the same directory
        runs[f"float32-draws-{draws}"] = run("float32-draws", "float32", sigma=sigma, num_draws=draws, **of_draws)
    return runs


def _score(config: ScoreConfig) -> sweep.Result:
    finished = score(config)
    return {
        "sample_id": finished.scores["sample_id"].to_pylist(),
        "mrd": finished.scores["mrd"].to_pylist(),
        "mrd_se": finished.scores["mrd_se"].to_pylist(),
        "sigma": config.scoring.sigma,
        "dtype": config.model.dtype,
        "draws": config.scoring.num_draws if config.scoring.estimator == "monte_carlo" else None,
        "precision": finished.run.manifest().get("precision"),
    }


def _ratios(result: sweep.Result, exact: sweep.Result) -> list[float]:
    """Each sample's MRD / sigma, divided by the closed form's in float32: 1 if MRD is first order in sigma."""
    pairs = zip(result["mrd"], exact["mrd"], strict=True)
    return [(mrd / result["sigma"]) / (other / exact["sigma"]) for mrd, other in pairs]


def _is_linear(result: sweep.Result, exact: sweep.Result) -> bool:
    """Whether MRD is its small-sigma limit, within 25% plus two standard errors of a sample's score."""
    relative = np.median([se / mrd for se, mrd in zip(result["mrd_se"], result["mrd"], strict=True) if mrd])
    return abs(float(np.median(_ratios(result, exact))) - 1) < 0.25 + 2 * float(relative)


def _row(name: str, result: sweep.Result, exact: sweep.Result) -> dict[str, Cell]:
    relative = [se / mrd for se, mrd in zip(result["mrd_se"], result["mrd"], strict=True) if mrd]
    of_weights = result["precision"] or {}
    return {
        "run": name,
        "sigma": result["sigma"],
        "K": result["draws"],
        "MRD, mean": float(np.mean(result["mrd"])),
        "relative s.e.": float(np.median(relative)) if relative else None,
        "MRD/sigma over the closed form's": mean(_ratios(result, exact)),
        "Spearman with the closed form": None if result is exact else spearman(result["mrd"], exact["mrd"]),
        "weights moved": of_weights.get("share_moved"),
        "rounding / signal": of_weights.get("noise_floor"),
    }


def _found(config: Fig5Config, results: dict[str, sweep.Result], exact: sweep.Result) -> list[str]:
    """For each precision: where MRD is proportional to sigma, and where samples keep their order; the effect of K."""
    sentences = []
    for dtype in config.dtypes:
        runs = [results[f"{dtype}-sigma-{sigma:g}"] for sigma in sorted(config.sigmas)]
        linear = [run["sigma"] for run in runs if _is_linear(run, exact)]
        orders = {run["sigma"]: spearman(run["mrd"], exact["mrd"]) for run in runs}
        bent = [run["sigma"] for run in runs if run["sigma"] not in linear]
        held = [sigma for sigma, order in orders.items() if order.low > 0]
        sentences.append(
            f"{dtype}, K = {config.sigma_draws}: MRD is its small-sigma limit, within 25% and two standard errors, at "
            f"sigma {_list(linear)}, not at {_list(bent)}; samples have the limit's order, "
            f"beyond chance, at {_list(held)}."
        )
    draws = {k: spearman(results[f"float32-draws-{k}"]["mrd"], exact["mrd"]) for k in sorted(config.draws)}
    sentences.append(
        f"float32, sigma {config.scoring.sigma:g}: Spearman's correlation with the closed form is "
        + ", ".join(f"{order} at K = {k}" for k, order in draws.items())
        + "."
    )
    sentences.append(
        f"{len(exact['mrd'])} samples, noise seed {config.scoring.seed}. All share their draws, so their errors are "
        "correlated, and a mean over them is less certain than its interval says."
    )
    return sentences


def _list(sigmas: list[float]) -> str:
    return ", ".join(f"{sigma:g}" for sigma in sigmas) or "none"


def _page(config: Fig5Config, results: dict[str, sweep.Result]) -> matplotlib.figure.Figure:
    page = matplotlib.figure.Figure(figsize=(11, 4.5), layout="constrained")
    of_sigma, of_draws = page.subplots(1, 2)
    exact = results["closed-form-float32"]
    sigmas = np.array(sorted(config.sigmas))
    of_sigma.plot(sigmas, float(np.mean(exact["mrd"])) / exact["sigma"] * sigmas, color="grey", label="closed form")
    for dtype, style in zip(config.dtypes, ("o-", "s--"), strict=False):
        means = [float(np.mean(results[f"{dtype}-sigma-{sigma:g}"]["mrd"])) for sigma in sigmas]
        of_sigma.plot(sigmas, means, style, label=f"Algorithm 1, {dtype}")
    of_sigma.set(xscale="log", yscale="log", xlabel="sigma", ylabel="MRD, mean", title=f"K = {config.sigma_draws}")
    of_sigma.legend()
    draws = sorted(config.draws)
    orders: list[Interval] = [spearman(results[f"float32-draws-{k}"]["mrd"], exact["mrd"]) for k in draws]
    below = [order.value - order.low for order in orders]
    above = [order.high - order.value for order in orders]
    of_draws.errorbar(draws, [order.value for order in orders], yerr=[below, above], fmt="o-", capsize=3)
    of_draws.set(xlabel="K", ylabel="Spearman with the closed form", title=f"float32, sigma = {config.scoring.sigma:g}")
    return page
