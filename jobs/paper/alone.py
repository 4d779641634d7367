"""Unlearns one sample, or a few together, from the initial model: counts updates, and measures how far they go."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pyarrow.compute as pc
import torch
from transformers import PreTrainedModel

from jobs.paper import sweep
from jobs.paper.config import AloneSettings, TasksOfSweep
from jobs.paper.subject import Subject
from mrd_ray.config import ModelSettings
from mrd_ray.errors import UserError
from mrd_ray.models import load
from mrd_ray.models.files import Unchanged, model_digest
from mrd_ray.mrd.extraction import extraction_likelihoods
from mrd_ray.mrd.likelihood import Likelihood, TokenMeasures
from mrd_ray.unlearning import losses
from mrd_ray.workers.memory import Tokenised, collate
from mrd_ray.workers.replica import replica

Groups = dict[str, list[Tokenised]]


def unlearn_each(
    subject: Subject, groups: Groups, alone: AloneSettings, tasks: TasksOfSweep, title: str
) -> tuple["Limits", dict[str, "Outcome"]]:
    """What counts as forgotten, and how each group of samples, by name, came to it from the model as it was."""
    resources: dict[str, Any] = {"cpus": tasks.cpus_per_process, "gpus": tasks.gpus_per_task}
    reference = subject.model
    if alone.reference is not None:
        reference = _reference(subject.model, alone.reference)
    elif subject.pretrained is not None:
        reference = subject.pretrained
    _refuse_other_tokens(reference, subject)
    everything = subject.samples.select(["token_ids", "scored"]).to_pylist()
    ask = _Block(reference, model_digest(reference), alone, tasks, {"": everything}, None)
    found = sweep.work_off(subject.run, "What it never knew", _averages, {"reference": ask}, **resources)
    limits = Limits(**found["reference"])
    names = list(groups)
    blocks = [names[start : start + tasks.samples_per_task] for start in range(0, len(names), tasks.samples_per_task)]
    digest = model_digest(subject.model)
    cells = {
        f"block-{i:05d}": _Block(subject.model, digest, alone, tasks, {name: groups[name] for name in block}, limits)
        for i, block in enumerate(blocks)
    }
    results = sweep.work_off(subject.run, title, _unlearn_block, cells, **resources)
    return limits, {name: Outcome(**one) for result in results.values() for name, one in result.items()}


def _refuse_other_tokens(reference: ModelSettings, subject: Subject) -> None:
    """Raises UserError if the samples' token ids mean something else to the reference model."""
    ids = sorted(set(pc.list_flatten(subject.samples["token_ids"]).to_pylist()))
    theirs = load.load_tokenizer(reference).convert_ids_to_tokens(ids)
    for token_id, own, other in zip(ids, subject.tokenizer.convert_ids_to_tokens(ids), theirs, strict=True):
        if own != other:
            raise UserError(
                f"alone.reference: {reference.path} has another tokenizer: token {token_id} is {other!r} there and "
                f"{own!r} in {subject.model.path}; give a model of the same family"
            )


def _reference(model: ModelSettings, path: str) -> ModelSettings:
    """The reference model, under the settings of the model but for where it is."""
    return model.model_copy(update={"path": path, "revision": None, "tokenizer": None})


def identity(model: ModelSettings, alone: AloneSettings, tasks: TasksOfSweep) -> dict[str, Any]:
    """What the outcomes depend on."""
    own = {f"alone.{name}": value for name, value in alone.model_dump().items()}
    if alone.reference is not None:
        own["alone.reference"] = model_digest(_reference(model, alone.reference))
    return own | {"ray.samples_per_task": tasks.samples_per_task}  # which decides the cells of the sweep


@dataclass(frozen=True)
class Limits:
    """Averages of the forget set on the reference model: samples below both are forgotten.

    memorization_accuracy, extraction_likelihood: in [0, 1]; the latter is None if not used, or without an n-gram.
    """

    memorization_accuracy: float
    extraction_likelihood: float | None

    def __str__(self) -> str:
        words = f"an MA below {self.memorization_accuracy:.3f}"
        return (
            words if self.extraction_likelihood is None else f"{words} and an EL below {self.extraction_likelihood:.3g}"
        )


@dataclass(frozen=True)
class Outcome:
    """The outcome of unlearning a group.

    updates: of the weights. forgotten: whether it got below the limits; if not, it ran out of updates or diverged.
    mean_change, change_norm: mean absolute and Euclidean difference of the weights, in units of the weights.
    memorization_accuracy: before each update and after the last, mean over the group.
    """

    updates: int
    forgotten: bool
    mean_change: float
    change_norm: float
    memorization_accuracy: list[float]


@dataclass(frozen=True)
class _Block:
    """What one task of the sweep unlearns, group by group."""

    model: ModelSettings
    files_digest: str
    alone: AloneSettings
    tasks: TasksOfSweep
    groups: Groups
    limits: Limits | None

    def replica(self) -> tuple[PreTrainedModel, Unchanged]:
        torch.set_num_threads(max(1, int(self.tasks.cpus_per_process)))
        return replica(self.model, self.files_digest, self.tasks.gpus_per_task > 0)


def _averages(task: _Block) -> sweep.Result:
    """MA and EL_n of all samples, averaged, on the reference model."""
    model, weights = task.replica()
    samples = task.groups[""]
    accuracy = []
    for sample in samples:
        batch = collate([sample], model.device)
        measures = TokenMeasures(batch)
        Likelihood(model).margins(batch, measures)
        accuracy += measures.means()["memorization_accuracy"]
    extraction = _extraction(model, samples, task.alone)
    weights.check()
    return {"memorization_accuracy": fmean(accuracy), "extraction_likelihood": extraction}


def _extraction(model: PreTrainedModel, samples: Sequence[Tokenised], alone: AloneSettings) -> float | None:
    """Mean EL_n, None if it is left out or no sample is long enough."""
    if not alone.extraction_n:
        return None
    likelihoods = extraction_likelihoods(
        model, [sample["token_ids"] for sample in samples], alone.extraction_n, alone.extraction_stride,
        scored=[sample["scored"] for sample in samples],
    )  # fmt: skip
    known = [likelihood for likelihood in likelihoods if not math.isnan(likelihood)]
    return fmean(known) if known else None


def _unlearn_block(task: _Block) -> sweep.Result:
    model, weights = task.replica()
    assert task.limits is not None
    theta = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    weights.check()
    return {name: vars(ascend(model, theta, group, task.limits, task.alone)) for name, group in task.groups.items()}


def ascend(
    model: PreTrainedModel,
    theta: dict[str, torch.Tensor],
    samples: Sequence[Tokenised],
    limits: Limits,
    alone: AloneSettings,
) -> Outcome:
    """Gradient ascent (SGA) from theta on these samples, all in each update, until they are forgotten.

    Args:
        theta: weights to start from, by name; they are not changed.
    """
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.copy_(theta[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=alone.learning_rate, weight_decay=0.0, fused=True)
    batch = collate(samples, model.device)
    num_tokens = batch.scored.sum(1)
    accuracy: list[float] = []
    forgotten = False
    for updates in itertools.count():
        logits = model(batch.token_ids, use_cache=False).logits
        log_prob = losses.log_probs(logits, batch)
        correct = (logits[:, :-1].argmax(-1) == batch.token_ids[:, 1:]) & batch.scored
        accuracy.append(float((correct.sum(1) / num_tokens).mean()))
        if not bool(torch.isfinite(log_prob).all()):  # diverged
            updates = alone.max_updates
            break
        forgotten = _below(accuracy[-1], limits.memorization_accuracy) and (
            limits.extraction_likelihood is None
            or _below(_extraction(model, samples, alone) or 0.0, limits.extraction_likelihood)
        )
        if forgotten or updates == alone.max_updates:
            break
        losses.ascent(log_prob, num_tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    change = [(weights.detach() - theta[name]).double() for name, weights in model.named_parameters()]
    return Outcome(
        updates,
        forgotten,
        math.fsum(float(of.abs().sum()) for of in change) / sum(of.numel() for of in change),
        math.sqrt(math.fsum(float((of**2).sum()) for of in change)),
        accuracy,
    )


def _below(value: float, limit: float) -> bool:
    """Zero counts as below, since no value is below zero."""
    return value < limit or value == 0
