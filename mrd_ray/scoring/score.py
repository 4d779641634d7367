"""`mrd-ray score`, from start to end."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from mrd_ray.config import ScoreConfig, ScoringSettings
from mrd_ray.data import samples as samples_table
from mrd_ray.data.micro_batches import Layout, lay_out, lengths
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError
from mrd_ray.models import load
from mrd_ray.models.files import model_digest
from mrd_ray.mrd.noise import NOISE_VERSION
from mrd_ray.runs import meter
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.runs.hold import held
from mrd_ray.runs.journal import Journal
from mrd_ray.scoring import summary
from mrd_ray.scoring.actor import ScoringActor, ScoringSetup
from mrd_ray.scoring.cost import ModelCost, assumed_tflops, forwards_per_token, gpu_advice, token_forwards
from mrd_ray.scoring.estimators import refuse_uncovered
from mrd_ray.scoring.result import RESULT_SCHEMA
from mrd_ray.scoring.table import scores_table, unsettled
from mrd_ray.scoring.units import LAYOUT_VERSION, Unit, cut_units, first_draws, missing_units
from mrd_ray.workers.cluster import cluster
from mrd_ray.workers.memory import Sample
from mrd_ray.workers.run_units import Load, pool_of, work_off

_OF_SAMPLE = ["sample_id", "token_ids", "scored"]
_OWNS = ("units", "samples.parquet", "scores.parquet", "summary.png")


@dataclass(frozen=True)
class ScoreRun:
    """A finished run: its directory, settings, samples.parquet and scores.parquet."""

    run: RunDirectory
    config: ScoreConfig
    samples: pa.Table
    scores: pa.Table

    @property
    def num_errors(self) -> int:
        """Number of samples without a score."""
        return len(self.scores) - self.scores["error"].null_count

    def refuse_other_samples(self, samples: pa.Table) -> None:
        """Raises UserError unless the scored samples equal these, which were read earlier, row by row."""
        if not self.samples.select(_OF_SAMPLE).equals(samples.select(_OF_SAMPLE)):
            raise UserError(
                f"data.path: {self.config.data.path} has changed since this run read it, so these scores are of other "
                "samples. Restore it and run the same command again, or start again in another run.dir"
            )


def score(config: ScoreConfig) -> ScoreRun:
    """Score every sample of a forget set. If the run directory already holds this run, resume it or add draws.

    Raises:
        UserError: bad input or settings, or the run directory holds something else.
    """
    console = meter.console(config.output)
    run = RunDirectory.of(config.run)
    with held(run):
        files_digest = model_digest(config.model)
        skeleton = load.skeleton(config.model)
        unused = load.unused_weights(config.model)
        refuse_uncovered(skeleton, config.scoring)
        tokenizer = load.load_tokenizer(config.model, console)
        samples = samples_table.build(config.data, tokenizer, Limits.of(skeleton), console)
        run.claim(
            {
                "model": files_digest,
                "model.dtype": config.model.dtype,
                "tokenizer": load.tokenizer_identity(tokenizer, config.model),
                "samples": samples_table.digest(samples),
                "data.template": config.data.template,
                "data.score_on": config.data.score_on,
            }
            | _identity(config.scoring),
            config,
            _OWNS,
        )
        run.record("unused_weights", unused)
        run.write_table("samples.parquet", samples)
        with Journal(run, "score", config.output) as journal:
            rounds = ScoringRounds(config, run, samples, ModelCost.of(skeleton), files_digest, journal)
            scores = rounds.work_off()
            run.write_table("scores.parquet", scores)
            finished = ScoreRun(run, config, samples, scores)
            run.write("summary.png", summary.figure(finished.scores, samples, config))
            journal.tell(samples=len(samples), sample_errors=finished.num_errors)
    return finished


def _identity(scoring: ScoringSettings) -> dict[str, object]:
    """What a score depends on, without the number of draws where a later run may add some."""
    names = ["estimator", "parameters", "sigma", "micro_batch_tokens", "measures"]
    names += (
        ["curvature_probes", "verify_draws"]
        if scoring.estimator == "closed_form"
        else ["antithetic", "target_relative_se"]
    )
    if scoring.estimator == "monte_carlo" or scoring.curvature_probes or scoring.verify_draws:
        names += ["seed"]
    if scoring.target_relative_se is not None:  # these determine the rounds of draws
        names += ["statistic", "num_draws", "max_draws"]
    identity = {f"scoring.{name}": getattr(scoring, name) for name in names}
    identity |= {"scoring.control_variate": scoring.controlled} if scoring.estimator == "monte_carlo" else {}
    versions = {"noise version": NOISE_VERSION, "layout version": LAYOUT_VERSION}
    return identity | {"scoring.measures": sorted(scoring.measures)} | versions


def unit_samples(samples: pa.Table, layout: Layout, micro_batches: range) -> pa.Table:
    """The samples of consecutive micro-batches, in the form that `ScoringActor` takes."""
    indices, micro_batch = layout.members(micro_batches)
    return samples.select(_OF_SAMPLE).take(indices).add_column(0, "micro_batch", pa.array(micro_batch))


def trial_of(samples: pa.Table, layout: Layout) -> list[Sample]:
    """A few samples on which an actor tries the settings before it scores any."""
    few = samples.take(layout.few(4)).select(_OF_SAMPLE)
    return few.add_column(0, "micro_batch", pa.array([0] * len(few), pa.int64())).to_pylist()


@dataclass
class ScoringRounds:
    """Rounds of scoring: round 0 draws for every sample, later (adaptive) rounds add draws for unsettled samples."""

    config: ScoreConfig
    run: RunDirectory
    samples: pa.Table
    cost: ModelCost
    files_digest: str
    journal: Journal
    layouts: list[Layout] = field(default_factory=list)  # of the rounds so far

    def work_off(self) -> pa.Table:
        """Compute what is missing, round after round, and return the scores."""
        scoring = self.config.scoring
        draws = first_draws(scoring)
        waiting = lengths(self.samples)
        grows = False
        for number in itertools.count():
            layout = lay_out(waiting, scoring.micro_batch_tokens, self.cost.rope_switch)
            self.layouts.append(layout)
            done = [unit for unit in self._units() if unit.round == number]
            rectangles = missing_units(number, len(layout), draws, done)
            if rectangles:
                grows = self.journal.within(cluster(log_to_driver=not self.config.output.quiet)) or grows
                self._compute(layout, rectangles, number, grows)
            order = np.argsort(lengths(self.samples), kind="stable")  # every round's layout is part of this order
            scores = scores_table(self.samples, order, self._results(order), scoring)
            waiting = np.where(unsettled(scores, scoring), waiting, 0)
            if not waiting.any():
                return scores
            draws = range(draws.stop, min(2 * draws.stop, scoring.max_draws))
        raise AssertionError("unreachable")

    def _units(self) -> list[Unit]:
        """The units whose results are on disk."""
        return [Unit.of_id(name.removesuffix(".parquet")) for name in self.run.names("units")]

    def _results(self, order: np.ndarray) -> Iterator[tuple[int, pa.Table]]:
        """Results of the rounds so far (see `scores_table`); those of later rounds may be incomplete."""
        place = np.argsort(order)

        def first(unit: Unit) -> int:
            return int(place[self.layouts[unit.round].samples(unit.first_micro_batch)[0]])

        for unit in sorted((unit for unit in self._units() if unit.round < len(self.layouts)), key=first):
            yield first(unit), self._result(unit)

    def _result(self, unit: Unit) -> pa.Table:
        name = f"units/{unit.unit_id}.parquet"
        result = self.run.read_table(name, RESULT_SCHEMA)
        indices, _ = self.layouts[unit.round].members(unit.micro_batches)
        expected = self.samples["sample_id"].take(indices).to_pylist()
        found = result["samples"].combine_chunks().flatten().field("sample_id").to_pylist()
        if result["unit_id"].to_pylist() != [unit.unit_id] or Counter(found) != Counter(expected):
            raise UserError(
                f"{self.run.path(name)} is not that unit's result; delete it and run the same command again"
            )
        return result

    def _compute(self, layout: Layout, rectangles: list[Unit], number: int, grows: bool) -> None:
        """Compute these rectangles; each unit's result is on disk before it counts as done."""
        config, scoring = self.config, self.config.scoring
        pool = pool_of(config.ray, grows, self.journal)
        if number == 0 and (say := gpu_advice(pool, scoring)) is not None:
            self.journal.event("advice", say)
        rate = assumed_tflops(pool) * 1e12 / self.cost.flops_per_token / forwards_per_token(scoring)
        units = cut_units(layout, rectangles, pool.actors, rate)
        trial = trial_of(self.samples, self.layouts[0])  # the same samples in every round
        task = ScoringSetup(config.model, scoring, self.files_digest, pool.threads, pool.gpus > 0, trial)
        blocks = list(dict.fromkeys(unit.micro_batches for unit in units))
        block_of = {block: i for i, block in enumerate(blocks)}
        work_off(
            "Scoring" if number == 0 else f"More draws, round {number}",
            {unit.unit_id: _load(layout, unit, block_of[unit.micro_batches]) for unit in units},
            (unit_samples(self.samples, layout, block) for block in blocks),
            ScoringActor, task, pool, self.run, self.journal, config.ray,
            items="samples" if scoring.estimator == "closed_form" else "samples x draws",
            begun=self._record,
        )  # fmt: skip

    def _record(self, result: pa.Table) -> None:
        """Record what the actors found when they tried the settings, from the first result."""
        (row,) = result.select(["precision", "checked", "says"]).to_pylist()
        self.run.record("precision", row["precision"])
        self.run.record("checked", row["checked"])
        if row["checked"] is not None and (why := row["checked"]["unchecked"]) is not None:
            self.journal.event("unchecked", f"The check by draws is incomplete: {why}")
        if row["says"] is not None:
            self.journal.event("control_variate", row["says"])


def _load(layout: Layout, unit: Unit, block: int) -> Load:
    draws = unit.stop_draw - unit.first_draw
    samples = int(layout.bounds[unit.stop_micro_batch] - layout.bounds[unit.first_micro_batch])
    tokens = int(layout.padded_tokens[unit.first_micro_batch : unit.stop_micro_batch].sum())
    return Load(block, token_forwards(layout, [unit]), draws * samples, draws * tokens)
