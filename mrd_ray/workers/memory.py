"""What fits in a device's memory: the share for activations, and micro-batches that are halved until they fit."""

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict, TypeVar

import torch
from transformers import PreTrainedModel

from mrd_ray.config import ScoringSettings
from mrd_ray.errors import UserError
from mrd_ray.mrd.likelihood import MicroBatch
from mrd_ray.mrd.recompute import layers_of


class Tokenised(TypedDict):
    """The tokens of a sample, and which of them are scored."""

    token_ids: list[int]
    scored: list[bool]


class Batched(Tokenised):
    """Tokens with the number of their micro-batch."""

    micro_batch: int


class Sample(Batched):
    """A sample to score."""

    sample_id: str


T = TypeVar("T")
B = TypeVar("B", bound=Batched)

TOO_LARGE = "does not fit in the device's memory beside the model; shorten it or set data.truncate"

_CPU_ACTIVATIONS = 4.0 * 2**30  # bytes
_FREE_SHARE = 0.6  # of a GPU's free memory; logits, rules and the allocator's gaps need some of the rest


def activation_bytes(model: PreTrainedModel, scoring: ScoringSettings, sharded: bool = False) -> float:
    """Bytes on each device that a micro-batch's activations may take (see `recomputing`).

    Where weights are gathered layer by layer, all processes must recompute the same layers: every layer or none.

    Raises:
        UserError: a budget is set, and the model has no layer that can be recomputed.
    """
    if scoring.activation_gib is not None and not layers_of(model):
        raise UserError("scoring.activation_gib: no layer of this model can be recomputed; leave it out")
    if sharded:
        return math.inf if scoring.activation_gib is None else 0.0
    if scoring.activation_gib is not None:
        return scoring.activation_gib * 2**30
    devices = {parameter.device for parameter in model.parameters()}
    if any(device.type != "cuda" for device in devices):
        return _CPU_ACTIVATIONS
    return min(map(_free, devices)) * _FREE_SHARE


def _free(device: torch.device) -> int:
    """Free bytes, including those that torch has reserved and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def collate(members: Sequence[Tokenised], device: torch.device) -> MicroBatch:
    """One forward of these samples."""
    return MicroBatch.collate([s["token_ids"] for s in members], [s["scored"] for s in members], device)


def fitting(
    samples: Sequence[B], device: torch.device, compute: Callable[[Sequence[B], MicroBatch], T], halve: bool
) -> Iterator[tuple[Sequence[B], T | None]]:
    """Apply `compute` to each micro-batch, halved until it fits on the device; None for a single sample too large."""
    for _, group in itertools.groupby(samples, key=operator.itemgetter("micro_batch")):
        waiting = [list(group)]
        while waiting:
            members = waiting.pop()
            found = None
            try:
                found = compute(members, collate(members, device))
            except RuntimeError as problem:
                if not (halve and out_of_memory(problem)):
                    raise
            if found is None:
                release(device)
            if found is None and len(members) > 1:
                middle = len(members) // 2
                waiting += [members[middle:], members[:middle]]
            else:
                yield members, found


def release(device: torch.device) -> None:
    """Free cached memory. Call it when the exception is gone, because that keeps the failed forward's tensors alive."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(problem: RuntimeError) -> bool:
    """Whether the device, or the machine, ran out of memory."""
    return isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in str(problem)
