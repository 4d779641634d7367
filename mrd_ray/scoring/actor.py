"""One replica of the model on one worker: takes work units, and returns the partial results of scores."""

import os
import time
from dataclasses import dataclass

import pyarrow as pa
import torch

from mrd_ray.config import ModelSettings, ScoringSettings
from mrd_ray.errors import UserError
from mrd_ray.scoring.estimators import ClosedForm, MonteCarlo, estimator_of, refuse_wrong_rules
from mrd_ray.scoring.result import RESULT_SCHEMA
from mrd_ray.scoring.units import Unit
from mrd_ray.workers.memory import Sample, out_of_memory
from mrd_ray.workers.replica import attempt, replica


@dataclass(frozen=True)
class ScoringSetup:
    """What all units of a run have in common. trial: a few of the run's samples, to try the settings on."""

    model: ModelSettings
    scoring: ScoringSettings
    files_digest: str
    threads: int
    on_gpu: bool
    trial: list[Sample]


class ScoringActor:
    """For `workers.run_units`: takes the id of a `units.Unit` and its samples, and returns one row of RESULT_SCHEMA.

    A failure that concerns the whole run is returned as `fatal`. The attribute `fatal` says why no unit can be
    processed, or is None.

    Raises Unfit if this node cannot work on units.
    """

    def __init__(self, task: ScoringSetup) -> None:
        torch.set_num_threads(task.threads)
        self._estimator, self.fatal = attempt(lambda: self._load(task))

    def _load(self, task: ScoringSetup) -> MonteCarlo | ClosedForm:
        model, self._weights = replica(task.model, task.files_digest, task.on_gpu)
        refuse_wrong_rules(model, task.scoring)
        return estimator_of(model, task.scoring, task.trial)

    def __call__(self, unit_id: str, samples: pa.Table) -> pa.Table:
        """Score a unit. samples: micro_batch, and sample_id, token_ids and scored of data.samples.SCHEMA."""
        started = time.perf_counter()
        unit = Unit.of_id(unit_id)
        result: dict[str, object] = {"unit_id": unit_id, "samples": []}
        if self._estimator is not None:
            try:
                result["samples"] = self._estimator(samples.to_pylist(), range(unit.first_draw, unit.stop_draw))
                result["precision"] = self._estimator.precision
                result["checked"] = self._estimator.checked
                result["says"] = self._estimator.says
                self._weights.check()
            except UserError as problem:
                self.fatal = str(problem)
            except RuntimeError as problem:  # a single sample that fitted before
                if not out_of_memory(problem):
                    raise
                self.fatal = f"the device ran out of memory for a single sample; use fewer actors ({problem})"
        result |= {
            "worker": f"{os.uname().nodename}:{os.getpid()}",
            "seconds": time.perf_counter() - started,
            "fatal": self.fatal,
        }
        return pa.Table.from_pylist([result], RESULT_SCHEMA)
