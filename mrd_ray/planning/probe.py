"""How long an actor's work takes on this hardware, measured by letting actors do a little of it."""

import collections
import os
import time
from statistics import median

import numpy as np
import pyarrow as pa
import ray

from mrd_ray.config import RaySettings
from mrd_ray.errors import Unfit, UserError
from mrd_ray.planning.simulate import Rates
from mrd_ray.runs.journal import Journal
from mrd_ray.scoring.actor import ScoringActor, ScoringSetup
from mrd_ray.scoring.units import Unit
from mrd_ray.workers.pool import Pool
from mrd_ray.workers.run_units import run_units

_SECONDS = 10.0  # of timed work, approximately
_NEVER = 1e9  # seconds: a probe reports no stalls
Part = tuple[pa.Table, int]  # samples in the form that a ScoringActor takes, and their padded tokens


def idle_pool(pool: Pool, journal: Journal) -> float:
    """Seconds that the run's pool takes if its actors do nothing: for processes, their imports, and Ray Data."""
    began = time.monotonic()
    units = {str(number): 0 for number in range(pool.actors)}
    collections.deque(
        run_units(units, [pa.table({"block": [0]})], _Idle, None, pool, journal, RaySettings(stall_after=_NEVER)),
        maxlen=0,
    )
    return time.monotonic() - began


def probe(task: ScoringSetup, pool: Pool, parts: list[Part]) -> Rates:
    """Rates of `pool.actors` actors that work side by side, as in the run; the start-up excludes `idle_pool`.

    Args:
        parts: a few of the run's micro-batches, evenly spread, shortest samples first.

    Raises:
        UserError: an actor refuses the model or the settings.
    """
    actor = ray.remote(_Timed).options(num_cpus=pool.cpus, num_gpus=pool.gpus)
    actors = [actor.remote(task) for _ in range(pool.actors)]
    try:
        if refusals := [reason for reason in ray.get([one.refuses.remote() for one in actors]) if reason]:
            raise UserError(refusals[0])
        start_up = max(ray.get([one.loading.remote() for one in actors]))
        theta, perturb, forward = np.mean(ray.get([one.measure.remote(parts) for one in actors]), 0).tolist()
    finally:
        for one in actors:
            ray.kill(one)
    return Rates(start_up, theta, perturb, forward, f"measured here, {pool.actors} actor(s) side by side")


class _Idle:
    """For `workers.run_units`: an actor that does nothing, in a process with all imports of a scoring actor's."""

    def __init__(self, task: None) -> None:
        pass

    def __call__(self, unit_id: str, block: pa.Table) -> pa.Table:
        return pa.table({"unit_id": [unit_id]})


class _Timed:
    """A scoring actor that times itself."""

    def __init__(self, task: ScoringSetup) -> None:
        began = time.monotonic()
        self._of_draws = task.scoring.estimator == "monte_carlo"
        self._draw, self._refuses = 0, None
        try:
            self._actor = ScoringActor(task)
            self._refuses = self._actor.fatal
        except Unfit as problem:
            self._refuses = f"{os.uname().nodename}: {problem}"
        self._loading = time.monotonic() - began

    def loading(self) -> float:
        """Seconds for loading the model and trying the settings on it."""
        return self._loading

    def refuses(self) -> str | None:
        """Why no unit can be processed, or None."""
        return self._refuses

    def measure(self, parts: list[Part]) -> tuple[float, float, float]:
        """Seconds for theta per token, for a perturbation, and for a forward per token; see `Rates`."""
        few = parts[0][0].slice(0, 1)  # takes little more than a perturbation
        few_tokens = len(few["token_ids"][0])
        self._seconds(few)  # libraries warm up
        small = self._repeated(few, _SECONDS / 4)
        each = self._seconds(parts[len(parts) // 2][0]) - small
        step = max(1, round(len(parts) * each / (_SECONDS / 8)))  # so that together they take about a second
        # the last one may be a single sample
        many = parts[step // 2 :: step] if step // 2 < len(parts) - 1 else [max(parts, key=lambda part: part[1])]
        samples, tokens = pa.concat_tables(part for part, _ in many), sum(tokens for _, tokens in many)
        self._seconds(few)  # an actor keeps the last samples' theta
        first = self._seconds(samples)
        large = self._repeated(samples, _SECONDS / 2)
        if not self._of_draws:
            return 0.0, 0.0, large / tokens
        if tokens < 4 * few_tokens:  # too few samples to separate a forward's time from a perturbation's
            return max(0.0, first - large) / tokens, 0.0, large / tokens
        forward = max(0.0, (large - small) / (tokens - few_tokens))
        return max(0.0, first - large) / tokens, max(0.0, small - forward * few_tokens), forward

    def _repeated(self, samples: pa.Table, at_most: float) -> float:
        found: list[float] = []
        while not found or (sum(found) < at_most and len(found) < 20):
            found.append(self._seconds(samples))
        return median(found)

    def _seconds(self, samples: pa.Table) -> float:
        """Seconds for one more draw, or for the closed form, on these samples."""
        unit = Unit(0, 0, 1, self._draw, self._draw + 1)
        self._draw += 1
        (row,) = self._actor(unit.unit_id, samples).to_pylist()
        if row["fatal"]:
            raise UserError(row["fatal"])
        return float(row["seconds"])
