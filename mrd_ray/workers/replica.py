"""One replica of the driver's model on one worker, or why it cannot be loaded."""

import os
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from mrd_ray.config import ModelSettings
from mrd_ray.errors import Unfit, UserError
from mrd_ray.models.files import Unchanged, model_digest, weight_files
from mrd_ray.models.load import load_model
from mrd_ray.mrd.causality import dependence

T = TypeVar("T")


def replica(config: ModelSettings, files_digest: str, on_gpu: bool) -> tuple[PreTrainedModel, Unchanged]:
    """This worker's replica of the driver's model, and a check that its weights have not changed since.

    Raises Unfit if it cannot be loaded on this node, or if the weights here are different; UserError if the model is
    not causal.
    """
    try:
        model, weights = _loaded(config, files_digest, on_gpu)
    except UserError as problem:
        raise Unfit(str(problem)) from problem
    except torch.OutOfMemoryError as problem:
        raise Unfit(f"model.path: it does not fit on the device ({problem}); monte_carlo needs two copies") from problem
    except Exception as problem:  # mounts, drivers and devices each fail in their own way
        raise Unfit(f"model.path: cannot load {config.path}: {type(problem).__name__}: {problem}") from problem
    refuse_not_causal(model)
    return model, weights


def _loaded(config: ModelSettings, files_digest: str, on_gpu: bool) -> tuple[PreTrainedModel, Unchanged]:
    weights = Unchanged([] if on_gpu else weight_files(config))  # a GPU has its own copy
    refuse_other_model(config, files_digest)
    spread = on_gpu and torch.cuda.device_count() > 1  # Ray shows an actor only its own GPUs
    model = load_model(config, torch.device("cuda" if on_gpu else "cpu"), spread)
    weights.check(replaced=True)  # the loaded files are those of the digest
    return model, weights


def refuse_other_model(config: ModelSettings, files_digest: str) -> None:
    """Raises UserError if the model's files on this node are not those of the driver."""
    if (found := model_digest(config)) != files_digest:
        raise UserError(
            f"model.path: {config.path} on {os.uname().nodename} is another model ({found[:12]}) than on the driver "
            f"({files_digest[:12]}); give every node the same model"
        )


def refuse_not_causal(model: PreTrainedModel) -> None:
    """Raises UserError if a token's likelihood depends on more than the tokens before it."""
    if (what := dependence(model)) is not None:
        raise UserError(
            f"model.path: {type(model).__name__} (model type {model.config.model_type}) is not causal here: its "
            f"predictions depend on {what}, so they are not likelihoods. Use a causal language model; a "
            "BERT-like one needs is_decoder: true in its config.json, if it was trained that way"
        )


def attempt(load: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `load` returns, or why this actor cannot process any unit.

    An exception in an actor's constructor would end the run, inside Ray's traceback. Raises Unfit if another node may
    succeed.
    """
    try:
        return load(), None
    except Unfit:
        raise
    except UserError as problem:
        return None, str(problem)
    except torch.OutOfMemoryError as problem:
        return None, f"model.path: it does not fit on the device ({problem}); monte_carlo needs two copies of it"
    except Exception as problem:  # a defect of ours, or a model that breaks a library
        return None, f"an actor could not start: {type(problem).__name__}: {problem}\n{traceback.format_exc()}"
