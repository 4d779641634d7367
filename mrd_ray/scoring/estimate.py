"""`mrd-ray plan`: what scoring would cost, from the architecture and the tokens alone."""

import time
from dataclasses import dataclass

import torch

from mrd_ray import models
from mrd_ray.config import PlanConfig
from mrd_ray.data import samples as samples_table
from mrd_ray.scoring import plan as planning
from mrd_ray.scoring.pool import Pool
from mrd_ray.scoring.score import lengths


@dataclass(frozen=True)
class Estimate:
    """Figures of a run that has not been made. Bytes and FLOPs are of all draws and samples together."""

    samples: int
    unscorable: int
    padded_tokens: int
    micro_batches: int
    units: int
    actors: int
    parameters: int
    forward_flops: float
    weight_bytes_per_actor: int
    perturbation_bytes: int
    tflops_per_actor: float
    tflops_source: str
    seconds: float


def plan(config: PlanConfig) -> Estimate:
    """Read and tokenise the data and cut it into units, for `ray.actors` actors of the given shape.

    The duration is FLOPs over rate; starting actors (seconds) and an uneven finish come on top.

    Raises:
        UserError: bad input or settings.
    """
    skeleton = models.skeleton(config.model)
    planning.refuse_uncovered(skeleton, config.scoring)
    architecture = skeleton.config
    tokenizer = models.load_tokenizer(config.model)
    samples = samples_table.build(config.data, tokenizer, models.context_length(architecture))
    pool = Pool(config.ray.actors or 1, config.ray.cpus_per_actor, config.ray.gpus_per_actor or 0.0)
    cost = planning.ModelCost.of(skeleton)
    if config.tflops is not None:
        tflops, source = config.tflops, "as given"
    elif pool.gpus:
        tflops, source = planning.assumed_tflops(pool), "assumed; measure and give --tflops"
    else:
        tflops, source = _measured_cpu_tflops(architecture.get_text_config().hidden_size, pool.threads), "measured here"

    scoring = config.scoring
    layout = planning.layout(lengths(samples), scoring.micro_batch_tokens)
    rectangles = planning.missing(0, len(layout), planning.first_draws(scoring), [])
    flops_per_token = cost.flops_per_token * planning.forwards_per_token(scoring)
    # the cut follows the same assumed rate as the run's
    units = planning.cut(layout, rectangles, pool.actors, planning.assumed_tflops(pool) * 1e12 / flops_per_token)
    padded = int(layout.padded_tokens.sum())
    size = torch.finfo(getattr(torch, config.model.dtype)).bits // 8
    if scoring.estimator == "closed_form":
        # a probe's direction is made once for a unit; it, the moved weights and their derivatives are copies
        copies, perturbations = (4 if scoring.curvature_probes else 1), scoring.curvature_probes * len(units)
        flops = padded * flops_per_token
    else:
        signs = 2 if scoring.antithetic else 1
        copies, perturbations = 2, signs * sum(unit.stop_draw - unit.first_draw for unit in units)
        flops = padded * (flops_per_token * scoring.num_draws + cost.flops_per_token)  # and once at theta
    # perturbing costs time as so many forwards of a token would
    work = flops + perturbations * planning.DRAW_TOKENS * cost.flops_per_token
    return Estimate(
        samples=len(samples),
        unscorable=len(samples) - samples["error"].null_count,
        padded_tokens=padded,
        micro_batches=len(layout),
        units=len(units),
        actors=pool.actors,
        parameters=cost.parameters,
        forward_flops=flops,
        weight_bytes_per_actor=copies * size * cost.parameters,
        perturbation_bytes=perturbations * 2 * size * cost.parameters,  # reads the base, writes the working copy
        tflops_per_actor=tflops,
        tflops_source=source,
        seconds=work / (tflops * 1e12 * min(pool.actors, max(1, len(units)))),
    )


def _measured_cpu_tflops(width: int, threads: int) -> float:
    """Rate of a linear layer of the model's width on so many threads of this machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b = torch.randn(2048, width), torch.randn(width, 4 * width)
    torch.mm(a, b)
    repeats, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < 0.5:
        torch.mm(a, b)
        repeats += 1
    torch.set_num_threads(before)
    return repeats * 2 * a.numel() * b.shape[1] / elapsed / 1e12
