"""What scoring costs in the engine, compared with the best single process, and with a second actor.

Only ratios within one run are meaningful, on a machine that does nothing else at the time. For CPUs, on Linux.
"""

import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Literal

import torch

from benchmarks.common import Batches, Raw, stopwatch
from benchmarks.figures import Figure, Results
from mrd_ray import ScoreConfig, score
from mrd_ray.mrd.likelihood import Likelihood
from mrd_ray.mrd.monte_carlo import delta, noise_key
from mrd_ray.mrd.perturb import Replica
from mrd_ray.scoring.result import RESULT_SCHEMA
from mrd_ray.scoring.units import Unit

Part = Literal["ideal", "engine"]
LONG_UNIT = 30.0  # seconds; shorter units say little about a real run's


def main(
    model: str,
    data: str,
    out: str = "benchmarks/results",
    parts: tuple[Part, ...] = ("ideal", "engine"),
    max_samples: int = 200,
    draws: int = 4,
    micro_batch_tokens: int = 512,
    sigma: float = 1e-5,
) -> None:
    """Benchmark Monte Carlo scoring here, one thread per process.

    Example: python -m benchmarks scoring --model DIR --data ../shared/data/tofu/forget10.json

    Args:
        model: directory or hub id; the demo keeps one under ~/.cache/mrd_ray.
        data: forget set, for example TOFU's ../shared/data/tofu/forget10.json.
        out: folder of the JSON file.
        parts: ideal, engine or both; ratios need both sides.
        max_samples: rows of the forget set. One pass over them should take over 30 s.
        draws: K of `ideal` and of the engine with one actor. Two actors do 2 K, so that each actor has the same work,
            including its pass over the unperturbed model; with K, that pass would hide how draws scale.
        micro_batch_tokens: tokens per forward, padding included.
        sigma: standard deviation of the parameter noise.
    """
    results = Results("scoring", locals(), out)
    torch.set_num_threads(1)
    scoring = {"sigma": sigma, "num_draws": draws, "micro_batch_tokens": micro_batch_tokens}
    config = {"model": {"path": model}, "data": {"path": data, "max_samples": max_samples}, "scoring": scoring}
    work = Work(ScoreConfig.model_validate(config | {"run": {"dir": "unused"}}))
    results.keep("size", work.size)
    # the sides of a ratio take turns, so that changes of the machine's speed show as spread, not as a result
    if "ideal" in parts:
        results.keep("ideal, theta", work.ideal_theta())
        results.keep("ideal, first half", [work.ideal_draw(k) for k in range(draws // 2)])
    if "engine" in parts:
        results.keep("1 actor", engine(config, work, 1, draws))
    if "ideal" in parts:
        results.keep("ideal, second half", [work.ideal_draw(k) for k in range(draws // 2, draws)])
    if "engine" in parts:
        results.keep("2 actors", engine(config, work, 2, 2 * draws))
    results.show(figures(results.raw))


class Work(Batches):
    """Ways to score the samples in this process, on one replica. Times in seconds."""

    def __init__(self, config: ScoreConfig) -> None:
        super().__init__(config)
        self._scoring = config.scoring
        self._replica, self._likelihood = Replica(self.model), Likelihood(self.model)

    def ideal_theta(self) -> float:
        """The pass of all samples over the unperturbed model."""
        lap = stopwatch()
        self._replica.restore()
        self._theta = [self._likelihood.log_neg_log_probs(batch) for batch in self.batches]
        return lap()

    def ideal_draw(self, k: int) -> Raw:
        """Draw k for all samples: one perturbation, the forwards, and nothing else."""
        lap = stopwatch()
        self._replica.perturb(self._scoring.sigma, noise_key(self._scoring.seed, k))
        perturb = lap()
        deltas = [
            delta(theta, self._likelihood.log_neg_log_probs(batch), batch.scored)
            for theta, batch in zip(self._theta, self.batches, strict=True)
        ]
        return {"perturb": perturb, "forward": lap(), "deltas": torch.cat(deltas).tolist()}


def engine(config: Raw, work: Batches, actors: int, draws: int) -> Raw:
    """`mrd-ray score` in a fresh run directory: its wall-clock time, and every unit's time from its actor."""
    with tempfile.TemporaryDirectory() as folder:
        pool = {"actors": actors, "cpus_per_process": 1, "gpus_per_actor": 0}
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
            unit = Unit.of_id(row["unit_id"])
            tokens = int(work.layout.padded_tokens[unit.first_micro_batch : unit.stop_micro_batch].sum())
            written = Path(finished.run.path(f"units/{name}")).stat().st_mtime
            units.append(row | vars(unit) | {"work": tokens * (unit.stop_draw - unit.first_draw), "written": written})
    units.sort(key=lambda unit: unit["written"])
    held: dict[str, int] = {}
    for unit in units:  # an actor that switches to other samples first runs them through the unperturbed model
        unit["with_theta"] = held.get(unit["worker"]) != unit["first_micro_batch"]
        held[unit["worker"]] = unit["first_micro_batch"]
    scores = {row["sample_id"]: row["mean_abs"] for row in finished.scores.to_pylist()}
    mean_abs = [scores[work.rows[i]["sample_id"]] for i in work.order]
    return {"wall": wall, "draws": draws, "units": units, "mean_abs": mean_abs}


def figures(raw: Raw) -> list[Figure]:
    """The figures that follow from the raw timings."""
    shown: list[Figure] = []
    ideal, one, two = None, None, None
    if "ideal, first half" in raw:
        passes = raw["ideal, first half"] + raw["ideal, second half"]
        per_draw = [one_pass["perturb"] + one_pass["forward"] for one_pass in passes]
        ideal = raw["ideal, theta"] + sum(per_draw)
        detail = f"K = {len(passes)}; unperturbed {raw['ideal, theta']:.3g} s, then per draw {_spread(per_draw)}"
        shown.append(Figure("ideal", ideal, "s", detail))
    if "1 actor" in raw:
        one, two = (costs(raw[pool]) for pool in ("1 actor", "2 actors"))
        shown.append(Figure("engine, 1 actor", one["busy"], "s", one["detail"]))
        shown.append(Figure("engine, 2 actors", two["busy"], "s", two["detail"]))
        ratio = (two["draws"] / two["busy"]) / (one["draws"] / one["busy"])
        shown.append(
            Figure("2 actors / 1", ratio, detail="sample-draws per second of the busiest actor's units", at_least=1.9)
        )
        ratio = (two["draws"] / two["wall"]) / (one["draws"] / one["wall"])
        shown.append(Figure("2 actors / 1, by the clock", ratio, detail="start-up included"))
        shown.append(Figure("s of a draw, 2 / 1", two["draw"] / one["draw"], detail="what two actors cost each other"))
    if ideal and one:
        shown.append(
            Figure("ideal / engine", ideal / one["busy"], detail="same samples and draws, inside units", at_least=0.97)
        )
        shown.append(
            Figure("ideal / engine, between units too", ideal / one["span"], detail="by when their files were written")
        )
        mine = [fmean(map(abs, deltas)) for deltas in zip(*(one_pass["deltas"] for one_pass in passes), strict=True)]
        pairs = zip(mine, raw["1 actor"]["mean_abs"], strict=True)
        off = max((abs(a / b - 1) for a, b in pairs if b), default=0.0)
        shown.append(Figure("ideal - engine", off, detail="largest relative difference of a score"))
    return shown


def costs(run: Raw) -> Raw:
    """Seconds: `busy`, `span` and `wall` for the run; `theta` and `draw` for one actor on all samples."""
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
