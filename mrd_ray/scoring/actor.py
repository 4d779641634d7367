"""One replica of the model on one worker: takes work units, gives back what scores are made of."""

import os
import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from mrd_ray.config import ModelConfig, ScoringConfig
from mrd_ray.errors import UserError
from mrd_ray.scoring.estimators import ClosedForm, MonteCarlo, estimator_of, refuse_wrong_rules
from mrd_ray.scoring.result import RESULT_SCHEMA
from mrd_ray.scoring.units import Unit
from mrd_ray.workers.memory import Sample, out_of_memory
from mrd_ray.workers.replica import attempt, replica


@dataclass(frozen=True)
class Task:
    """What every unit of a run has in common. trial: a few of its samples, to try the settings on."""

    model: ModelConfig
    scoring: ScoringConfig
    files_digest: str
    threads: int
    on_gpu: bool
    trial: list[Sample]


class ScoringActor:
    """For `workers.run_units`: the id of a `units.Unit` and its samples in, one row of RESULT_SCHEMA out.

    A failure that concerns the run as a whole comes back as `fatal`; the attribute says why no unit can be worked off.

    Raises Unfit if this node is not.
    """

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        self._estimator, self.fatal = attempt(lambda: self._load(task))

    def _load(self, task: Task) -> MonteCarlo | ClosedForm:
        model, self._weights = replica(task.model, task.files_digest, task.on_gpu)
        refuse_wrong_rules(model, task.scoring)
        return estimator_of(model, task.scoring, task.trial)

    def __call__(self, unit_id: str, samples: pa.Table) -> pa.Table:
        """Score a unit. samples: micro_batch, and sample_id, token_ids and scored of data.samples.SCHEMA."""
        started = time.perf_counter()
        unit = Unit.of_id(unit_id)
        result: dict[str, Any] = {"unit_id": unit_id, "samples": []}
        if self._estimator is not None:
            try:
                result["samples"] = self._estimator(samples.to_pylist(), range(unit.first_draw, unit.stop_draw))
                result["precision"] = self._estimator.precision
                result["checked"] = self._estimator.checked
                result["says"] = self._estimator.says
                self._weights.check()
            except UserError as problem:
                self.fatal = str(problem)
            except RuntimeError as problem:  # of one sample alone, that fitted before
                if not out_of_memory(problem):
                    raise
                self.fatal = f"the device ran out of memory for a single sample; give it fewer actors ({problem})"
        result |= {
            "worker": f"{os.uname().nodename}:{os.getpid()}",
            "seconds": time.perf_counter() - started,
            "fatal": self.fatal,
        }
        return pa.Table.from_pylist([result], RESULT_SCHEMA)
