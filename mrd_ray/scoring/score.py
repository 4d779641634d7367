"""`mrd-ray score`, start to end."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from rich.console import Console

from mrd_ray import models
from mrd_ray.config import ScoreConfig
from mrd_ray.data import samples as samples_table
from mrd_ray.errors import UserError
from mrd_ray.mrd.noise import NOISE_VERSION
from mrd_ray.progress import Meter
from mrd_ray.runs import RunDirectory
from mrd_ray.scoring import pipeline, plan, summary
from mrd_ray.scoring.actor import UNIT_SCHEMA, Task
from mrd_ray.scoring.pool import Pool
from mrd_ray.scoring.table import scores_table


@dataclass(frozen=True)
class ScoreRun:
    """What a finished run left: its directory, settings, samples.parquet and scores.parquet."""

    run: RunDirectory
    config: ScoreConfig
    samples: pa.Table
    scores: pa.Table

    @property
    def num_errors(self) -> int:
        """Samples without a score."""
        return len(self.scores) - self.scores["error"].null_count


def score(config: ScoreConfig) -> ScoreRun:
    """Score every sample of a forget set; resume, or add draws, if the run directory holds such a run already.

    Raises:
        UserError: bad input or settings, or a run directory of something else.
    """
    console = Console(stderr=True)
    run = RunDirectory(config.run.dir)
    with run.locked():
        path = models.directory(config.model)
        files_digest = models.files_digest(path)
        architecture = models.load_config(path)
        tokenizer = models.load_tokenizer(config.model)
        console.print(f"Reading {config.data.path}")
        samples = samples_table.build(config.data, tokenizer, models.context_length(architecture))
        run.claim(
            {
                "model": files_digest,
                "model.dtype": config.model.dtype,
                "tokenizer": models.tokenizer_digest(tokenizer),
                "samples": samples_table.digest(samples),
                "data.template": config.data.template,
                "data.score_on": config.data.score_on,
                "scoring.sigma": config.scoring.sigma,
                "scoring.seed": config.scoring.seed,
                "scoring.micro_batch_tokens": config.scoring.micro_batch_tokens,
                "estimator": "monte_carlo",
                "noise version": NOISE_VERSION,
            },
            config,
        )
        run.write_table("samples.parquet", samples)

        layout = plan.layout(lengths(samples), config.scoring.micro_batch_tokens)
        done = [plan.Unit.of_id(name.removesuffix(".parquet")) for name in run.names("units")]
        rectangles = plan.missing(len(layout), config.scoring.num_draws, done)
        if rectangles:
            _work_off(config, run, samples, layout, rectangles, plan.ModelCost.of(architecture), files_digest)
        results = (run.read_table(f"units/{name}") for name in run.names("units"))
        scores = scores_table(samples, results, config.scoring)
        run.write_table("scores.parquet", scores)
        finished = ScoreRun(run, config, samples, scores)
        run.write("summary.png", summary.figure(finished.scores, samples, config))
    return finished


def lengths(samples: pa.Table) -> np.ndarray:
    """Tokens of each sample, zero for those that cannot be scored: int64 [n]."""
    found: np.ndarray = pc.fill_null(pc.list_value_length(samples["token_ids"]), 0).to_numpy().astype(np.int64)
    return found


def _work_off(
    config: ScoreConfig,
    run: RunDirectory,
    samples: pa.Table,
    layout: plan.Layout,
    rectangles: list[plan.Unit],
    cost: plan.ModelCost,
    files_digest: str,
) -> None:
    """Compute what is missing; each unit's result is on disk before it counts as done."""
    with pipeline.cluster():
        pool = Pool.of(config.ray, ray.cluster_resources())
        units = plan.cut(layout, rectangles, pool.actors, plan.assumed_tflops(pool) * 1e12 / cost.flops_per_token)
        task = Task(config.model, files_digest, config.scoring.sigma, config.scoring.seed, pool.threads, pool.gpus > 0)
        tables = [_unit_table(unit, samples, layout) for unit in units]
        work = {unit.unit_id: plan.token_forwards(layout, [unit]) for unit in units}
        scored = 0
        with Meter("Scoring", sum(work.values())) as meter:
            meter.advance(0, f"{len(units)} unit(s) to do, starting {pool.actors} actor(s)")
            for count, result in enumerate(pipeline.results(tables, task, pool), 1):
                (row,) = result.select(["unit_id", "seconds", "fatal"]).to_pylist()
                if row["fatal"] is not None:
                    raise UserError(row["fatal"])
                run.write_table(f"units/{row['unit_id']}.parquet", result)
                if count == 1:
                    meter.working_since(row["seconds"])
                unit = plan.Unit.of_id(row["unit_id"])
                scored += len(result["samples"][0]) * (unit.stop_draw - unit.first_draw)
                rate = scored / meter.working_seconds
                meter.advance(work[row["unit_id"]], f"unit {count} of {len(units)}, {rate:.3g} samples x draws/s")


def _unit_table(unit: plan.Unit, samples: pa.Table, layout: plan.Layout) -> pa.Table:
    members = [
        {"micro_batch": micro_batch, **sample}
        for micro_batch in range(unit.first_micro_batch, unit.stop_micro_batch)
        for sample in samples.select(["sample_id", "token_ids", "scored"]).take(layout.samples(micro_batch)).to_pylist()
    ]
    row = {
        "unit_id": unit.unit_id,
        "first_draw": unit.first_draw,
        "stop_draw": unit.stop_draw,
        "samples": members,
    }
    return pa.Table.from_pylist([row], UNIT_SCHEMA)
