"""Only the driver, with millions of samples: its memory and time if results cost nothing to compute."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import pyarrow as pa
import ray

from benchmarks.common import Raw, resident, stopwatch
from benchmarks.figures import Figure, Results
from mrd_ray import ScoreConfig
from mrd_ray.data import samples as samples_table
from mrd_ray.data.micro_batches import lay_out
from mrd_ray.data.micro_batches import lengths as lengths_of
from mrd_ray.mrd.monte_carlo import Moments
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.runs.journal import Journal
from mrd_ray.scoring import score, summary
from mrd_ray.scoring.actor import ScoringSetup
from mrd_ray.scoring.cost import GPU_TFLOPS, ModelCost
from mrd_ray.scoring.result import RESULT_SCHEMA
from mrd_ray.scoring.table import scores_table
from mrd_ray.scoring.units import Unit, first_draws, missing_units

_TOKENS = (20, 80)  # per sample, uniform
_TEXT = "What does it say there about her? "


class MadeUp:
    """Stands in for `ScoringActor`: returns results of the right shape at once; a sample's score follows its number."""

    def __init__(self, task: ScoringSetup) -> None:
        """Of the task, it only needs the estimator."""
        self._of_draws = task.scoring.estimator == "monte_carlo"

    def __call__(self, unit_id: str, samples: pa.Table) -> pa.Table:
        """Draws, and a gradient norm, equal to the sample's number plus 1."""
        unit = Unit.of_id(unit_id)
        draws = unit.stop_draw - unit.first_draw
        of_all: Raw = {
            "log_prob": -1.0,
            "num_draws": draws if self._of_draws else 0,
            **{field.name: [] for field in dataclasses.fields(Moments)[1:]},
            "measures": {},
        }
        of_all |= {"sum": [1.0], "sum_squares": [1.0], "probes": []}
        scored = []
        for sample_id in samples["sample_id"].to_pylist():
            value = int(sample_id, 16) + 1.0
            of_draws: Raw = {"sum_abs": [draws * value], "sum_abs_squares": [draws * value**2]}
            of_draws |= {} if self._of_draws else {"gradient_norm": value}
            scored.append({"sample_id": sample_id, **of_all, **of_draws})
        row = {"unit_id": unit_id, "worker": "made up", "seconds": 0.0, "samples": scored}
        return pa.Table.from_pylist([row], RESULT_SCHEMA)


def main(
    samples: int = 10_000_000,
    estimator: Literal["closed_form", "monte_carlo"] = "closed_form",
    draws: int = 200,
    parameters: int = 135_000_000,
    out: str = "benchmarks/results",
) -> None:
    """Benchmark the driver: plan, feed two actors that invent results, gather the scores.

    Reading and tokenising come before this and are not measured.

    Args:
        samples: number of invented samples, of 20 to 80 tokens.
        estimator: whose results are invented.
        draws: K of monte_carlo.
        parameters: size of the model for which units are cut, for actors with one GPU each.
        out: folder of the JSON file.
    """
    results = Results("driver", locals(), out)
    with tempfile.TemporaryDirectory() as folder:
        scoring = {"estimator": estimator} | ({"num_draws": draws} if estimator == "monte_carlo" else {})
        drove = _drive(Path(folder), samples, scoring, parameters)
    results.keep("found", drove)
    results.show(
        [
            *(Figure(name, of["seconds"], "s", f"peak {of['peak MiB']:,} MiB") for name, of in drove["phases"].items()),
            Figure("peak", max(of["peak MiB"] for of in drove["phases"].values()) / 1024, "GiB",
                   f"{drove['samples table, MiB']:,} MiB of it are the samples' table"),
        ]
    )  # fmt: skip


def _drive(folder: Path, n: int, scoring: Raw, parameters: int) -> Raw:
    settings = {"model": {"path": "made up"}, "data": {"path": "made up"}, "run": {"dir": str(folder / "run")}}
    config = ScoreConfig.model_validate(settings | {"scoring": scoring, "ray": {"actors": 2}})
    run = RunDirectory(config.run.dir)
    run.claim({}, config)
    table = _samples(n)
    phases: Raw = {"before": _phase()}
    layout = lay_out(lengths_of(table), config.scoring.micro_batch_tokens)
    rectangles = missing_units(0, len(layout), first_draws(config.scoring), [])
    phases["lay out"] = _phase()
    with ray.init(log_to_driver=False, include_dashboard=False), Journal(run, "score") as journal:
        rounds = score.ScoringRounds(config, run, table, ModelCost(parameters, 2 * parameters), "", journal, [layout])
        with (
            mock.patch.object(score, "assumed_tflops", return_value=GPU_TFLOPS),
            mock.patch.object(score, "ScoringActor", MadeUp),
        ):
            rounds._compute(layout, rectangles, 0, grows=False)
    phases["work off"] = _phase()
    order = np.argsort(lengths_of(table), kind="stable")
    scores = scores_table(table, order, rounds._results(order), config.scoring)
    phases["gather"] = _phase()
    summary.figure(scores, table, config)
    phases["summary"] = _phase()
    mrd = scores["mrd"].to_numpy()
    np.testing.assert_allclose(mrd / mrd[0], np.arange(1, n + 1))
    return {
        "samples": n, "tokens": int(lengths_of(table).sum()), **scoring, "parameters": parameters,
        "units": len(run.names("units")), "samples table, MiB": round(table.nbytes / 2**20),
        "phases": phases,
    }  # fmt: skip


_lap = stopwatch()


def _phase() -> Raw:
    """Seconds since the last call, and the peak of resident memory since then (including Ray's shared memory)."""
    peak = resident("VmHWM")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    return {"seconds": round(_lap(), 1), "peak MiB": round(peak)}


def _samples(n: int) -> pa.Table:
    """The samples' table, like `data.samples.build` makes it."""
    lengths = np.random.default_rng(0).integers(*_TOKENS, n)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    tokens, scored = np.zeros(lengths.sum(), np.int32), np.ones(lengths.sum(), bool)
    columns = {
        "sample_id": pa.array(np.char.mod("%016x", np.arange(n))),
        "index": pa.array(np.arange(n)),
        "file": pa.nulls(n, pa.string()),
        "row": pa.array(np.arange(1, n + 1)),
        "text": pa.array([_TEXT * 6] * n, pa.large_string()),
        "token_ids": pa.LargeListArray.from_arrays(offsets, pa.array(tokens)),
        "scored": pa.LargeListArray.from_arrays(offsets, pa.array(scored)),
        "error": pa.nulls(n, pa.string()),
    }
    return pa.table(columns, samples_table.SCHEMA)
