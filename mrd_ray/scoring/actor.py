"""One replica of the model on one worker: takes work units, gives back moments."""

import itertools
import math
import operator
import os
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from mrd_ray import models
from mrd_ray.config import ModelConfig
from mrd_ray.errors import UserError
from mrd_ray.mrd.likelihood import Likelihood, MicroBatch, sum_log_probs
from mrd_ray.mrd.monte_carlo import Moments, draw_deltas
from mrd_ray.mrd.perturb import Replica

UNIT_SCHEMA = pa.schema(
    [
        ("unit_id", pa.string()),
        ("first_draw", pa.int64()),
        ("stop_draw", pa.int64()),
        (
            "samples",
            pa.list_(
                pa.struct(
                    [
                        ("micro_batch", pa.int64()),
                        ("sample_id", pa.string()),
                        ("token_ids", pa.list_(pa.int32())),
                        ("scored", pa.list_(pa.bool_())),
                    ]
                )
            ),
        ),
    ]
)
_SUM = pa.list_(pa.float64())  # see monte_carlo.exact_sum
RESULT_SCHEMA = pa.schema(
    [
        ("unit_id", pa.string()),
        ("worker", pa.string()),
        ("seconds", pa.float64()),
        ("fatal", pa.string()),
        (
            "samples",
            pa.list_(
                pa.struct(
                    [
                        ("sample_id", pa.string()),
                        ("num_draws", pa.int64()),
                        ("sum_abs", _SUM),
                        ("sum", _SUM),
                        ("sum_squares", _SUM),
                        ("log_prob", pa.float64()),
                        ("error", pa.string()),
                    ]
                )
            ),
        ),
    ]
)


@dataclass(frozen=True)
class Task:
    """What every unit of a run has in common."""

    model: ModelConfig
    files_digest: str
    sigma: float
    seed: int
    threads: int
    on_gpu: bool


class ScoringActor:
    """A callable class for Ray Data: one unit (a row of UNIT_SCHEMA) in, one row of RESULT_SCHEMA out.

    A failure that concerns the run as a whole comes back as `fatal`, since an exception in a constructor would have
    Ray start the actor over and over.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._fatal: str | None = None
        self._block: Block | None = None
        torch.set_num_threads(task.threads)
        try:
            self._load()
        except UserError as problem:
            self._fatal = str(problem)

    def _load(self) -> None:
        path = models.directory(self._task.model)
        if (found := models.files_digest(path)) != self._task.files_digest:
            raise UserError(
                f"model.path: {path} on {os.uname().nodename} holds other weights ({found[:12]}) than on the driver "
                f"({self._task.files_digest[:12]}); give every node the same model"
            )
        self._device = torch.device("cuda" if self._task.on_gpu else "cpu")
        model = models.load_model(path, self._task.model.dtype, self._device)
        self._likelihood = Likelihood(model)
        self._replica = Replica(model)

    def __call__(self, units: pa.Table) -> pa.Table:
        """Score a unit."""
        started = time.perf_counter()
        (unit,) = units.to_pylist()
        samples: list[dict[str, Any]] = []
        if self._fatal is None:
            try:
                block = self._block_of(unit["samples"])
                samples = self._score(block, range(unit["first_draw"], unit["stop_draw"]))
            except torch.OutOfMemoryError as problem:
                self._fatal = f"a sample does not fit on the device beside the model; lower data.max_tokens ({problem})"
        result = {
            "unit_id": unit["unit_id"],
            "worker": f"{os.uname().nodename}:{os.getpid()}",
            "seconds": time.perf_counter() - started,
            "fatal": self._fatal,
            "samples": samples,
        }
        return pa.Table.from_pylist([result], RESULT_SCHEMA)

    def _block_of(self, samples: list[dict[str, Any]]) -> "Block":
        """The unit's samples at theta; kept from the last unit if that had the same ones."""
        sample_ids = [sample["sample_id"] for sample in samples]
        if self._block is None or self._block.sample_ids != sample_ids:
            batches = [
                MicroBatch.collate([s["token_ids"] for s in members], [s["scored"] for s in members], self._device)
                for _, group in itertools.groupby(samples, key=operator.itemgetter("micro_batch"))
                if (members := list(group))
            ]
            self._replica.restore()
            self._block = Block(sample_ids, batches, [self._likelihood.log_neg_log_probs(batch) for batch in batches])
        return self._block

    def _score(self, block: "Block", draws: range) -> list[dict[str, Any]]:
        task = self._task
        deltas = draw_deltas(self._replica, self._likelihood, block.batches, block.theta, task.sigma, task.seed, draws)
        log_probs = [
            sum_log_probs(theta, batch.scored) for theta, batch in zip(block.theta, block.batches, strict=True)
        ]
        return [
            _result(*sample, draws)
            for sample in zip(block.sample_ids, torch.cat(log_probs).tolist(), torch.cat(deltas).tolist(), strict=True)
        ]


class Block(NamedTuple):
    """Samples of a unit: collated, and evaluated at theta (see `draw_deltas`)."""

    sample_ids: list[str]
    batches: list[MicroBatch]
    theta: list[torch.Tensor]


def _result(sample_id: str, log_prob: float, deltas: list[float], draws: range) -> dict[str, Any]:
    error = None
    if not math.isfinite(log_prob):
        error = "its log-probability is not finite under the model as it is"
    elif broken := [k for k, value in zip(draws, deltas, strict=True) if not math.isfinite(value)]:
        error = f"its relative change is not finite in {len(broken)} draw(s), the first {broken[0]}: sigma too large?"
    moments = Moments.of(deltas)
    return {"sample_id": sample_id, "log_prob": log_prob, "error": error} | vars(moments)
