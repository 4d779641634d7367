"""One replica of the model on one worker: takes work units, gives back what scores are made of."""

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from mrd_ray import model_files, models
from mrd_ray.config import ModelConfig, ScoringConfig
from mrd_ray.errors import Unfit, UserError
from mrd_ray.mrd.causality import dependence
from mrd_ray.scoring.estimators import ClosedForm, MonteCarlo, estimator_of, refuse_wrong_rules
from mrd_ray.scoring.memory import Sample, out_of_memory
from mrd_ray.scoring.plan import Unit
from mrd_ray.scoring.result import RESULT_SCHEMA

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """What every unit of a run has in common. trial: a few of its samples, to try the settings on."""

    model: ModelConfig
    scoring: ScoringConfig
    files_digest: str
    threads: int
    on_gpu: bool
    trial: list[Sample]


def replica(config: ModelConfig, files_digest: str, on_gpu: bool) -> tuple[PreTrainedModel, model_files.Unchanged]:
    """This worker's replica of the driver's model, and what tells whether its weights are still those.

    Raises Unfit if it cannot be loaded on this node, or the weights here are others; UserError if it is not causal.
    """
    try:
        model, weights = _loaded(config, files_digest, on_gpu)
    except UserError as problem:
        raise Unfit(str(problem)) from problem
    except torch.OutOfMemoryError as problem:
        raise Unfit(f"model.path: it does not fit on the device ({problem}); monte_carlo needs two copies") from problem
    except Exception as problem:  # a mount, a driver, a device: each fails in ways of its own
        raise Unfit(f"model.path: cannot load {config.path}: {type(problem).__name__}: {problem}") from problem
    refuse_not_causal(model)
    return model, weights


def _loaded(config: ModelConfig, files_digest: str, on_gpu: bool) -> tuple[PreTrainedModel, model_files.Unchanged]:
    weights = model_files.Unchanged([] if on_gpu else model_files.weight_files(config))  # a GPU has a copy
    if (found := model_files.files_digest(config)) != files_digest:
        raise UserError(
            f"model.path: {config.path} on {os.uname().nodename} is another model ({found[:12]}) than on the driver "
            f"({files_digest[:12]}); give every node the same model"
        )
    spread = on_gpu and torch.cuda.device_count() > 1  # Ray shows an actor its own GPUs alone
    model = models.load_model(config, torch.device("cuda" if on_gpu else "cpu"), spread)
    weights.check(replaced=True)  # what was loaded is what the digest is of
    return model, weights


def refuse_not_causal(model: PreTrainedModel) -> None:
    """Raises UserError if a token's likelihood depends on more than the tokens before it."""
    if (what := dependence(model)) is not None:
        raise UserError(
            f"model.path: {type(model).__name__} (model type {model.config.model_type}) is not causal here: what it "
            f"predicts depends on {what}, so the likelihoods of its tokens are none. Give a causal language model; a "
            "BERT-like one needs is_decoder: true in its config.json, if it was trained so"
        )


def attempt(load: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `load` gives, or why no unit can be worked off on this actor.

    An exception in an actor's constructor would end the run with Ray's traceback around it. Raises Unfit where others
    may do better.
    """
    try:
        return load(), None
    except Unfit:
        raise
    except UserError as problem:
        return None, str(problem)
    except torch.OutOfMemoryError as problem:
        return None, f"model.path: it does not fit on the device ({problem}); monte_carlo needs two copies of it"
    except Exception as problem:  # a defect of ours, or a model that a library chokes on
        return None, f"an actor could not start: {type(problem).__name__}: {problem}\n{traceback.format_exc()}"


class ScoringActor:
    """For `pipeline.results`: the id of a `plan.Unit` and its samples in, one row of RESULT_SCHEMA out.

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
