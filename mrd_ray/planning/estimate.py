"""`mrd-ray plan`: what scoring would cost, also with other numbers of actors, estimators and micro-batches."""

import contextlib
import dataclasses
import functools
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from mrd_ray.config import PlanConfig, ScoringSettings
from mrd_ray.data import samples as samples_table
from mrd_ray.data.micro_batches import Layout, lay_out, lengths
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError
from mrd_ray.models import load
from mrd_ray.models.files import model_digest
from mrd_ray.planning.probe import Part, idle_pool, probe
from mrd_ray.planning.simulate import Course, Fleet, Rates, simulate
from mrd_ray.runs import meter
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.runs.journal import Journal
from mrd_ray.scoring import summary
from mrd_ray.scoring.actor import ScoringSetup
from mrd_ray.scoring.cost import ModelCost, assumed_tflops, forwards_per_token
from mrd_ray.scoring.estimators import refuse_uncovered
from mrd_ray.scoring.score import trial_of, unit_samples
from mrd_ray.scoring.units import DRAW_TOKENS, Unit, cut_units, first_draws, missing_units
from mrd_ray.workers.cluster import cluster, living_nodes
from mrd_ray.workers.pool import Pool

FLEETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # numbers of actors to simulate
_BUDGETS = {False: (512, 1024, 2048), True: (4096, 16384, 65536)}  # micro-batch tokens to try, on CPU and on GPU
_PROBED = 32  # micro-batches


@dataclass(frozen=True)
class Simulated:
    """A simulated run with N actors. efficiency: compared with one actor without losses."""

    actors: int
    seconds: float
    device_hours: float
    efficiency: float


@dataclass(frozen=True)
class Choice:
    """The cheapest way within the deadline, or the fastest within the budget; `met` says whether it is within both."""

    estimator: str
    micro_batch_tokens: int
    course: Simulated
    met: bool


@dataclass(frozen=True)
class Estimate:
    """Figures of a run that has not been made. Bytes and FLOPs are totals over all draws and samples.

    seconds: from Ray's start to the last unit; fleets and choice measure the same. around: reading before, and stopping
    Ray after, if a probe has measured that, else zero. Gathering the scores, about 0.2 ms a sample, is not included.
    """

    samples: int
    reasons: Counter[str]
    tokens: int
    padded_tokens: int
    micro_batches: int
    units: int
    actors: int
    parameters: int
    forward_flops: float
    weight_bytes_per_actor: int
    perturbation_bytes: int
    rates: Rates
    seconds: float
    around: float
    device_hours: float
    fleets: list[Simulated]
    choice: Choice | None


def plan(config: PlanConfig) -> Estimate:
    """Read and tokenise the data, cut it into units, and simulate `ray.actors` actors of the given shape.

    Raises:
        UserError: bad input or settings; with `probe`, also whatever would stop a run.
    """
    began = time.monotonic()
    job = _Job.of(config)
    if not config.probe:
        return _estimate(job)
    read = time.monotonic() - began
    with job.hardware():
        found = _estimate(job)
        began = time.monotonic()
    return dataclasses.replace(found, around=read + time.monotonic() - began)


def _estimate(job: "_Job") -> Estimate:
    config = job.config
    scoring, cost = config.scoring, job.cost
    layout = job.layout(scoring)
    units = job.units(scoring, job.pool.actors)
    rates = job.rates(scoring)
    padded = int(layout.padded_tokens.sum())
    size = torch.finfo(getattr(torch, config.model.dtype)).bits // 8
    flops_per_token = cost.flops_per_token * forwards_per_token(scoring)
    if scoring.estimator == "closed_form":
        # a probe's direction is made once per unit; the direction, the moved weights and their derivatives are copies
        copies, perturbations = (4 if scoring.curvature_probes else 1), scoring.curvature_probes * len(units)
        flops = padded * flops_per_token
    else:
        signs = 2 if scoring.paired else 1
        copies, perturbations = (
            (3 if scoring.controlled else 2),
            signs * sum(unit.stop_draw - unit.first_draw for unit in units),
        )
        flops = padded * (flops_per_token * scoring.num_draws + cost.flops_per_token)  # plus once at theta
        flops += 3 * padded * cost.flops_per_token if scoring.controlled else 0  # |g|
    course = job.course(scoring, rates, Fleet(job.pool.actors))
    return Estimate(
        samples=len(job.samples),
        reasons=summary.errors(job.samples),
        tokens=int(lengths(job.samples).sum()),
        padded_tokens=padded,
        micro_batches=len(layout),
        units=len(units),
        actors=job.pool.actors,
        parameters=cost.parameters,
        forward_flops=flops,
        weight_bytes_per_actor=copies * size * cost.parameters,
        perturbation_bytes=perturbations * 2 * size * cost.parameters,  # reads the base, writes the working copy
        rates=rates,
        seconds=course.seconds,
        around=0.0,
        device_hours=course.device_seconds * job.devices / 3600,
        fleets=job.fleets(scoring, rates),
        choice=job.choice(),
    )


@dataclass
class _Job:
    """What all ways to make the run have in common.

    files_digest: of the model, for a probe. ray_seconds: how long Ray took to start, if it was started.
    """

    config: PlanConfig
    skeleton: PreTrainedModel
    samples: pa.Table
    pool: Pool
    cost: ModelCost
    files_digest: str
    ray_seconds: float = 0.0
    layouts: dict[int, Layout] = field(default_factory=dict)

    @classmethod
    def of(cls, config: PlanConfig) -> "_Job":
        skeleton = load.skeleton(config.model)
        refuse_uncovered(skeleton, config.scoring)
        console = meter.console(config.output)
        tokenizer = load.load_tokenizer(config.model, console)
        samples = samples_table.build(config.data, tokenizer, Limits.of(skeleton), console)
        pool = Pool(config.ray.actors or 1, config.ray.cpus_per_process, config.ray.gpus_per_actor or 0.0)
        digest = model_digest(config.model) if config.probe else ""
        return cls(config, skeleton, samples, pool, ModelCost.of(skeleton), digest)

    @contextlib.contextmanager
    def hardware(self) -> Iterator[None]:
        """Ray, for a probe, with the requested number of actors, or as many as fit."""
        began = time.monotonic()
        with cluster(log_to_driver=not self.config.output.quiet):
            self.pool = Pool.of(self.config.ray, living_nodes())
            self.ray_seconds = time.monotonic() - began
            yield

    @property
    def devices(self) -> float:
        """Devices per actor: its GPUs, or 1 if it has none."""
        return self.pool.gpus or 1.0

    def layout(self, scoring: ScoringSettings) -> Layout:
        tokens = scoring.micro_batch_tokens
        if tokens not in self.layouts:
            self.layouts[tokens] = lay_out(lengths(self.samples), tokens, self.cost.rope_switch)
        return self.layouts[tokens]

    def units(self, scoring: ScoringSettings, actors: int) -> list[Unit]:
        """The units that a run with N actors would cut, based on the assumed rate."""
        layout = self.layout(scoring)
        per_token = self.cost.flops_per_token * forwards_per_token(scoring)
        rectangles = missing_units(0, len(layout), first_draws(scoring), [])
        return cut_units(layout, rectangles, actors, assumed_tflops(self.pool) * 1e12 / per_token)

    def rates(self, scoring: ScoringSettings) -> Rates:
        """Measured rates, or rates computed from FLOPs; the latter leave out starting actors, which takes seconds."""
        if self.config.probe:
            return self._probed(scoring)
        tflops, source = self._tflops
        token = self.cost.flops_per_token / (tflops * 1e12)
        draws = scoring.estimator == "monte_carlo"
        perturbed = (2 if scoring.paired else 1) if draws else scoring.curvature_probes
        return Rates(
            start_up=0.0,
            theta=token if draws else 0.0,
            perturb=perturbed * DRAW_TOKENS * token,
            forward=token * forwards_per_token(scoring),
            source=f"{tflops:.3g} TFLOP/s per actor, {source}",
        )

    @functools.cached_property
    def _tflops(self) -> tuple[float, str]:
        if self.config.tflops is not None:
            return self.config.tflops, "as given"
        if self.pool.gpus:
            return assumed_tflops(self.pool), "assumed; use --probe, or measure and set --tflops"
        width = self.skeleton.config.get_text_config().hidden_size
        return _measured_cpu_tflops(width, self.pool.threads), "of a matrix product here; --probe measures scoring"

    def _probed(self, scoring: ScoringSettings) -> Rates:
        config, layout = self.config, self.layout(scoring)
        if not len(layout):
            raise UserError(f"data.path: {config.data.path} has no sample that can be scored, so none to probe with")
        few = trial_of(self.samples, layout)
        task = ScoringSetup(config.model, scoring, self.files_digest, self.pool.threads, self.pool.gpus > 0, few)
        chosen = np.unique(np.linspace(0, len(layout) - 1, min(_PROBED, len(layout))).round().astype(int)).tolist()
        parts: list[Part] = [
            (unit_samples(self.samples, layout, range(i, i + 1)), int(layout.padded_tokens[i])) for i in chosen
        ]
        found = probe(task, self.pool, parts)
        return dataclasses.replace(found, start_up=found.start_up + self.ray_seconds + self._idle_pool)

    @functools.cached_property
    def _idle_pool(self) -> float:
        with tempfile.TemporaryDirectory() as folder:  # a pool needs a run directory for its journal
            run = RunDirectory(folder)
            run.claim({}, self.config)
            return idle_pool(self.pool, Journal(run, "plan", self.config.output))

    def course(self, scoring: ScoringSettings, rates: Rates, fleet: Fleet) -> Course:
        return simulate(self.units(scoring, fleet.actors), self.layout(scoring), rates, fleet)

    def fleets(self, scoring: ScoringSettings, rates: Rates) -> list[Simulated]:
        """Simulated runs with 1 to 1,000 actors."""
        alone = self.course(scoring, rates, Fleet(1)).seconds
        found = []
        for actors in FLEETS:
            fleet = Fleet(actors, self.config.straggling if actors > 1 else 0.0, self.config.losses_per_hour)
            course = self.course(scoring, rates, fleet)
            efficiency = alone / course.device_seconds if course.device_seconds else 1.0
            hours = course.device_seconds * self.devices / 3600
            found.append(Simulated(actors, course.seconds, hours, efficiency))
        return found

    def choice(self) -> Choice | None:
        """The best of both estimators, some micro-batches and all fleets; None without a deadline or a budget."""
        config = self.config
        if config.deadline is None and config.budget is None:
            return None
        hours, budget = config.deadline or float("inf"), config.budget or float("inf")
        ways = [
            (scoring, course)
            for scoring in self._alternatives()
            for course in self.fleets(scoring, self.rates(scoring))
        ]
        within = [way for way in ways if way[1].seconds <= 3600 * hours and way[1].device_hours <= budget]
        if config.deadline is not None:
            scoring, course = min(within or ways, key=lambda way: way[1].device_hours if within else way[1].seconds)
        else:
            scoring, course = min(within or ways, key=lambda way: way[1].seconds if within else way[1].device_hours)
        return Choice(scoring.estimator, scoring.micro_batch_tokens, course, bool(within))

    def _alternatives(self) -> Iterator[ScoringSettings]:
        """This estimator and the other one, each with several micro-batch sizes, for the same statistic."""
        own = self.config.scoring
        shared = own.model_dump(include={"parameters", "sigma", "statistic", "seed", "num_draws"})
        for estimator in ("monte_carlo", "closed_form"):
            for tokens in sorted({own.micro_batch_tokens, *_BUDGETS[self.pool.gpus > 0]}):
                if estimator == own.estimator:
                    yield own.model_copy(update={"micro_batch_tokens": tokens})
                    continue
                try:
                    other = ScoringSettings(**shared, estimator=estimator, micro_batch_tokens=tokens)
                    refuse_uncovered(self.skeleton, other)
                except (ValidationError, UserError):  # the other estimator cannot do what is asked
                    continue
                yield other


def _measured_cpu_tflops(width: int, threads: int) -> float:
    """Rate of a linear layer of the model's width on N threads of this machine."""
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
