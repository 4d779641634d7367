"""One replica of the model on one worker: takes rows of evaluated sets, returns what metrics are computed from."""

import os
import time
from dataclasses import dataclass

import pyarrow as pa
import torch

from mrd_ray.config import EvaluationSettings, ModelSettings
from mrd_ray.errors import UserError
from mrd_ray.evaluation.measure import RECORD, Measurer
from mrd_ray.models.load import load_tokenizer
from mrd_ray.workers.memory import out_of_memory
from mrd_ray.workers.replica import attempt, replica

RESULT_SCHEMA = pa.schema(
    [
        ("unit_id", pa.string()),
        ("worker", pa.string()),
        ("seconds", pa.float64()),
        ("fatal", pa.string()),
        ("records", pa.list_(RECORD)),
    ]
)


@dataclass(frozen=True)
class EvaluationSetup:
    """What every unit of a run has in common."""

    model: ModelSettings
    evaluation: EvaluationSettings
    files_digest: str
    threads: int
    on_gpu: bool


class EvaluationActor:
    """For `workers.run_units`: a unit's id and its rows in, one row of RESULT_SCHEMA out.

    A failure that concerns the run as a whole comes back as `fatal`. Raises Unfit if this node cannot load the model.
    """

    def __init__(self, task: EvaluationSetup) -> None:
        torch.set_num_threads(task.threads)
        self._measurer, self._fatal = attempt(lambda: self._load(task))

    def _load(self, task: EvaluationSetup) -> Measurer:
        model, self._weights = replica(task.model, task.files_digest, task.on_gpu)
        return Measurer(model, load_tokenizer(task.model), task.evaluation)

    def __call__(self, unit_id: str, rows: pa.Table) -> pa.Table:
        """Measure a unit. rows: with the fields of sets.EVALUATED_ROW."""
        started = time.perf_counter()
        result: dict[str, object] = {"unit_id": unit_id, "records": []}
        if self._measurer is not None:
            try:
                result["records"] = self._measurer(rows.to_pylist())
                self._weights.check()
            except UserError as problem:
                self._fatal = str(problem)
            except RuntimeError as problem:  # of EL_n's generation
                if not out_of_memory(problem):
                    raise
                self._fatal = f"the device ran out of memory; lower evaluation.generation_batch ({problem})"
        result |= {
            "worker": f"{os.uname().nodename}:{os.getpid()}",
            "seconds": time.perf_counter() - started,
            "fatal": self._fatal,
        }
        return pa.Table.from_pylist([result], RESULT_SCHEMA)
