"""What a draw's control variate costs, and how much it reduces the variance."""

import itertools
import math
import time

import torch

from benchmarks.common import Batches, Raw
from benchmarks.figures import Figure, Results
from mrd_ray import ScoreConfig
from mrd_ray.mrd.first_order import FirstOrder
from mrd_ray.mrd.likelihood import Likelihood
from mrd_ray.mrd.monte_carlo import delta, noise_key
from mrd_ray.mrd.perturb import Replica

_WANTED = {1e-5: 30.0, 1e-4: 5.0}  # by sigma: how many times smaller the error should be at equal time


def main(
    model: str,
    data: str,
    dtype: str = "float32",
    max_samples: int = 16,
    draws: int = 6,
    threads: int = 1,
    out: str = "benchmarks/results",
) -> None:
    """Compare plain Monte Carlo draws with pairs that have a control variate, for the same noise.

    Args:
        model: directory of a model.
        data: forget set.
        dtype: of the weights.
        max_samples: rows of the forget set.
        draws: number of draws for each sigma.
        threads: number of torch threads.
        out: folder of the JSON file.
    """
    results = Results("control_variate", locals(), out)
    torch.set_num_threads(threads)
    settings = {"model": {"path": model, "dtype": dtype}, "data": {"path": data, "max_samples": max_samples}}
    work = Batches(ScoreConfig.model_validate(settings | {"run": {"dir": "unused"}}))
    drawn = {sigma: _drawn(work, sigma, draws) for sigma in _WANTED}
    results.keep("found", {"size": work.size, **{f"{sigma:g}": of_sigma for sigma, of_sigma in drawn.items()}})
    figures = []
    for sigma, of in drawn.items():
        cost = (of["plain"] + of["first order"] + of["other sign"]) / of["plain"]
        each = f"sigma {sigma:g}"
        figures += [
            Figure(f"{each}: cost of a draw", cost, detail="over that of a plain one, perturbation included"),
            Figure(f"{each}: variance, plain / controlled", of["variance ratio"], detail="pooled over samples"),
            Figure(f"{each}: error at equal time, plain / controlled", math.sqrt(of["variance ratio"] / cost),
                   at_least=_WANTED[sigma]),
            Figure(f"{each}: draws for a standard error of 1%", math.ceil((of["relative error"] / 0.01) ** 2),
                   detail="of the sample that fares worst"),
        ]  # fmt: skip
    results.show(figures)


def _drawn(work: Batches, sigma: float, draws: int) -> Raw:
    """Seconds of a draw, its L and its other sign; variance of |Delta| divided by that of a pair's mean minus |L|."""
    replica, likelihood = Replica(work.model), Likelihood(work.model)
    first_order = FirstOrder(work.model, replica.base)
    theta = [likelihood.log_neg_log_probs(batch) for batch in work.batches]
    deltas, others, first = [], [], []
    seconds = {"plain": 0.0, "first order": 0.0, "other sign": 0.0}

    def drawn(k: int, step: float) -> torch.Tensor:
        replica.perturb(step, noise_key(0, k))
        pairs = zip(theta, work.batches, strict=True)
        return torch.cat([delta(at, likelihood.log_neg_log_probs(batch), batch.scored) for at, batch in pairs])

    for k in range(draws):
        times = [time.perf_counter()]
        deltas.append(drawn(k, sigma))
        times.append(time.perf_counter())
        step = replica.step()
        first.append(torch.cat([first_order(batch, replica.base, step) for batch in work.batches]))
        times.append(time.perf_counter())
        others.append(drawn(k, -sigma))
        times.append(time.perf_counter())
        for name, (began, ended) in zip(seconds, itertools.pairwise(times), strict=True):
            seconds[name] += ended - began
    replica.restore()
    plain, other = torch.stack(deltas).abs(), torch.stack(others).abs()
    rest = (plain + other) / 2 - torch.stack(first).abs()
    return {
        **{name: of_all / draws for name, of_all in seconds.items()},
        "variance ratio": float(plain.var(0).sum() / rest.var(0).sum()),
        "relative error": max((rest.std(0) / plain.mean(0)).tolist()),
    }
