"""Compares the prediction of `mrd-ray plan --probe` with the run."""

import dataclasses
import tempfile
from typing import Any, Literal

from benchmarks.common import stopwatch
from benchmarks.figures import Figure, Results
from mrd_ray import PlanConfig, ScoreConfig, plan, score


def main(
    model: str,
    data: str,
    out: str = "benchmarks/results",
    samples: tuple[int, ...] = (40, 120),
    actors: tuple[int, ...] = (1, 2),
    draws: int = 8,
    estimators: tuple[Literal["monte_carlo", "closed_form"], ...] = ("monte_carlo", "closed_form"),
) -> None:
    """Plan and do runs of several sizes, with several numbers of actors with one CPU each.

    Args:
        model: directory or hub id.
        data: forget set.
        out: folder of the JSON file.
        samples: rows of the forget set.
        actors: numbers of actors, with one CPU each.
        draws: K of monte_carlo.
        estimators: to plan and run.
    """
    results = Results("planner", locals(), out)
    figures = []
    for estimator in estimators:
        for count in actors:
            for size in samples:
                scoring: dict[str, Any] = {"estimator": estimator}
                scoring |= {"num_draws": draws} if estimator == "monte_carlo" else {}
                tree = {"model": {"path": model}, "data": {"path": data, "max_samples": size}, "scoring": scoring}
                tree["ray"] = {"actors": count, "cpus_per_process": 1, "gpus_per_actor": 0}
                foreseen = plan(PlanConfig.model_validate(tree | {"probe": True}))
                with tempfile.TemporaryDirectory() as folder:
                    lap = stopwatch()
                    score(ScoreConfig.model_validate(tree | {"run": {"dir": folder}}))
                    took = lap()
                name = f"{estimator}, {count} actor(s), {size} samples"
                whole, start = foreseen.seconds + foreseen.around, foreseen.rates.start_up
                results.keep(name, {"foreseen": dataclasses.asdict(foreseen), "took": took})
                detail = (
                    f"{whole:.0f} s foreseen, {start:.0f} of them to start actors and {foreseen.around:.0f} around "
                )
                detail += f"them; {took:.0f} taken"
                figures.append(Figure(name, abs(whole / took - 1), detail=detail, at_most=0.15))
    results.show(figures)
