"""Cut (samples x draws) into work units, and say what they cost."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from mrd_ray import models
from mrd_ray.config import ScoringConfig
from mrd_ray.errors import UserError
from mrd_ray.mrd.coverage import coverage
from mrd_ray.scoring.pool import Pool

# Perturbing every weight once costs about as much as the forward of so many tokens: 7-10 ns a weight against
# 2 FLOP a weight and token. True of CPUs (30 GFLOP/s a core) as of GPUs (memory traffic against float32 FLOPs).
DRAW_TOKENS = 256
# raise it whenever samples are cut into other micro-batches, or results hold something else: units must not mix
LAYOUT_VERSION = 5
_PADDING = 0.05  # of a micro-batch's positions at most, where it is cut for that
_LEAST_TOKENS = 512  # a micro-batch is not cut below that for its padding's sake: each forward has its own overhead
_BLOCK_TOKENS = 64 * DRAW_TOKENS  # a unit's samples: enough that perturbing stays under 2% of it
_MAX_BLOCK_TOKENS = 64 * _BLOCK_TOKENS  # so much as actors and the driver easily hold as Python objects
_UNIT_SECONDS = 30.0  # aimed at: little is lost with a killed actor, and scheduling costs nothing beside it
_MAX_UNIT_SECONDS = 180.0  # a single draw over a unit's samples may take so long before the samples are divided
_UNITS_PER_ACTOR = 4  # at least, if the work can be divided so far, to even out the finish
# Cautious sustained float32 rates. They decide only how work is cut, never a score.
CPU_TFLOPS_PER_THREAD, GPU_TFLOPS = 0.03, 15.0


@dataclass(frozen=True)
class Layout:
    """Samples in micro-batches: the shapes of all forwards, fixed by the samples alone, whatever the cluster.

    order: int64 [n], indices of the samples (sorted by sample_id) by length, then id.
    bounds: int64 [m + 1]; micro-batch i is order[bounds[i]:bounds[i + 1]].
    padded_tokens: int64 [m], positions in each micro-batch's forward.
    """

    order: np.ndarray
    bounds: np.ndarray
    padded_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.padded_tokens)

    def samples(self, micro_batch: int) -> np.ndarray:
        """Indices of its samples."""
        return self.order[self.bounds[micro_batch] : self.bounds[micro_batch + 1]]

    def members(self, micro_batches: range) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the samples of consecutive micro-batches, and the micro-batch of each."""
        bounds = self.bounds[micro_batches.start : micro_batches.stop + 1]
        return self.order[bounds[0] : bounds[-1]], np.repeat(micro_batches, np.diff(bounds))

    def few(self, count: int) -> np.ndarray:
        """Indices of up to so many samples, of different lengths, none of the longer half."""
        return self.order[: -(-len(self.order) // 2) : max(1, len(self.order) // (2 * count))][:count]


def layout(lengths: np.ndarray, micro_batch_tokens: int, switch: int | None = None) -> Layout:
    """Cut samples, given their int [n] lengths in order of sample_id, into micro-batches of so many padded tokens.

    Of fewer, where they would hold more than 5% of padding. A sample longer than `micro_batch_tokens` has a micro-batch
    of its own. Length 0 marks a sample to leave out.

    Args:
        switch: see `models.rope_switch`; no micro-batch has samples on both sides of it.
    """
    order = np.argsort(lengths, kind="stable")
    order = order[np.searchsorted(lengths[order], 1) :]
    bounds, widths = [0], []
    held = 0  # tokens of the micro-batch so far
    for position, length in enumerate(lengths[order].tolist()):  # lengths rise, so the newest is the padded width
        members = position - bounds[-1]
        positions = (members + 1) * length
        wasteful = held >= _LEAST_TOKENS and held + length < (1 - _PADDING) * positions
        switched = switch is not None and length > switch and members and lengths[order[position - 1]] <= switch
        if members and (positions > micro_batch_tokens or wasteful or switched):
            widths.append(lengths[order[position - 1]])
            bounds.append(position)
            held = 0
        held += length
    if len(order):
        widths.append(lengths[order[-1]])
        bounds.append(len(order))
    edges = np.asarray(bounds, np.int64)
    return Layout(order, edges, np.diff(edges) * np.asarray(widths, np.int64))


@dataclass(frozen=True)
class Unit:
    """A rectangle of work: micro-batches first..stop of a round's layout, draws first..stop (both stops excluded).

    Round 0 is of all samples; later ones add draws to those that adaptive scoring has not settled.
    """

    round: int
    first_micro_batch: int
    stop_micro_batch: int
    first_draw: int
    stop_draw: int

    @property
    def micro_batches(self) -> range:
        """Those it spans."""
        return range(self.first_micro_batch, self.stop_micro_batch)

    @property
    def unit_id(self) -> str:
        """Its name, from which `of_id` makes it again."""
        micro_batches = f"m{self.first_micro_batch:08d}-{self.stop_micro_batch:08d}"
        return f"r{self.round:02d}_{micro_batches}_k{self.first_draw:08d}-{self.stop_draw:08d}"

    @classmethod
    def of_id(cls, unit_id: str) -> "Unit":
        """The unit of this id. Raises UserError if it is none."""
        match = re.fullmatch(r"r(\d+)_m(\d+)-(\d+)_k(\d+)-(\d+)", unit_id, re.ASCII)
        unit = None if match is None else cls(*map(int, match.groups()))
        if unit is None or unit.unit_id != unit_id or not unit.micro_batches or unit.first_draw >= unit.stop_draw:
            raise UserError(f"run.dir: units/{unit_id} is not a unit of this engine; move it out of that folder")
        return unit


def missing(round: int, num_micro_batches: int, draws: range, done: Iterable[Unit]) -> list[Unit]:
    """What of a round's grid is not in `done` (its units alone), in rectangles as large as may be.

    Raises UserError if done reaches past it.
    """
    finished: list[list[Unit]] = [[] for _ in range(num_micro_batches)]
    done = list(done)
    if (reached := max((unit.stop_draw for unit in done), default=0)) > draws.stop:
        raise UserError(
            f"scoring.num_draws: {draws.stop}, but this run directory already holds draws up to {reached}. "
            "It can only grow; use another directory for fewer"
        )
    for unit in done:
        if unit.stop_micro_batch > num_micro_batches or unit.first_draw < draws.start:
            raise UserError(f"run.dir: units/{unit.unit_id} is not a unit of this run; move it out of that folder")
        for micro_batch in unit.micro_batches:
            finished[micro_batch].append(unit)
    gaps = [_gaps(units, draws) for units in finished]
    rectangles = []
    first = 0
    for stop in range(1, num_micro_batches + 1):
        if stop == num_micro_batches or gaps[stop] != gaps[first]:
            rectangles += [Unit(round, first, stop, *gap) for gap in gaps[first]]
            first = stop
    return rectangles


def _gaps(units: Sequence[Unit], draws: range) -> list[tuple[int, int]]:
    """What of the draws is in none of the units, which share a micro-batch."""
    gaps, reached = [], draws.start
    ordered = sorted(units, key=lambda unit: unit.first_draw)
    for before, unit in zip([None, *ordered], ordered, strict=False):
        if before is not None and unit.first_draw < reached:
            raise UserError(
                f"run.dir: units/{before.unit_id} and units/{unit.unit_id} hold the same draws of the same samples; "
                "move one of them out of that folder and start the same command again"
            )
        if unit.first_draw > reached:
            gaps.append((reached, unit.first_draw))
        reached = unit.stop_draw
    return gaps if reached >= draws.stop else [*gaps, (reached, draws.stop)]


def cut(layout: Layout, rectangles: Sequence[Unit], actors: int, tokens_per_second: float) -> list[Unit]:
    """Cut what is missing into units for so many actors of such a speed (in token-forwards).

    A unit spans many samples, so that a perturbation is shared by many, and few draws; draws cost nothing to cut,
    since an actor keeps what it knows of the unperturbed weights from one unit to the next. Where draws are few, it
    spans the more samples.
    """
    total = sum(
        int(layout.padded_tokens[r.first_micro_batch : r.stop_micro_batch].sum()) * (r.stop_draw - r.first_draw)
        for r in rectangles
    )
    per_actor = max(1, total // (actors * _UNITS_PER_ACTOR))
    units = []
    for r in rectangles:
        draws = r.stop_draw - r.first_draw
        # fewer tokens only if single draws of a full block would be too long, or too few to go round
        full = min(max(_BLOCK_TOKENS, int(tokens_per_second * _UNIT_SECONDS) // draws), _MAX_BLOCK_TOKENS)
        block_tokens = min(full, int(tokens_per_second * _MAX_UNIT_SECONDS), per_actor)
        for first, stop in _blocks(layout, r.first_micro_batch, r.stop_micro_batch, block_tokens):
            tokens = int(layout.padded_tokens[first:stop].sum())
            budget = min(tokens_per_second * _UNIT_SECONDS, per_actor)
            pieces = min(draws, math.ceil(draws * tokens / budget))
            edges = [r.first_draw + draws * piece // pieces for piece in range(pieces + 1)]
            units += [Unit(r.round, first, stop, a, b) for a, b in itertools.pairwise(edges)]
    return units


def _blocks(layout: Layout, first: int, stop: int, tokens: int) -> list[tuple[int, int]]:
    """Runs of micro-batches of up to so many tokens each, at least one micro-batch long."""
    blocks, start, held = [], first, 0
    for micro_batch in range(first, stop):
        size = int(layout.padded_tokens[micro_batch])
        if micro_batch > start and held + size > tokens:
            blocks.append((start, micro_batch))
            start, held = micro_batch, 0
        held += size
    blocks.append((start, stop))
    return blocks


@dataclass(frozen=True)
class ModelCost:
    """What a model's architecture says about cost.

    parameters: number of weights. flops_per_token: of a forward, attention over the context left out. rope_switch: see
    `models.rope_switch`.
    """

    parameters: int
    flops_per_token: int
    rope_switch: int | None = None

    @classmethod
    def of(cls, skeleton: PreTrainedModel) -> "ModelCost":
        """Count the parameters of a model, which need not have its weights (`models.skeleton`)."""
        parameters = sum(parameter.numel() for parameter in skeleton.parameters())
        tied = skeleton.config.get_text_config().tie_word_embeddings
        embedding: Any = skeleton.get_input_embeddings()
        looked_up = 0 if tied else embedding.weight.numel()
        return cls(parameters, 2 * (parameters - looked_up), models.rope_switch(skeleton.config))


def refuse_uncovered(skeleton: PreTrainedModel, scoring: ScoringConfig) -> None:
    """Raises UserError if scoring.parameters names nothing, or parameters that the closed form may not answer for."""
    selected = models.select(dict(skeleton.named_parameters()), scoring.parameters)
    if scoring.estimator != "closed_form" or scoring.allow_slow_parameters:
        return
    if slow := coverage(skeleton, selected).slow:
        raise UserError(
            f"scoring.estimator: closed_form has no rule for {len(slow)} of the {len(selected)} parameters: "
            f"{', '.join(slow[:8])}{', ...' if len(slow) > 8 else ''}. Set scoring.allow_slow_parameters to "
            "differentiate them sample by sample, leave them out with scoring.parameters, or use monte_carlo"
        )


def first_draws(scoring: ScoringConfig) -> range:
    """The draws of round 0; the closed form's grid is one draw wide."""
    return range(1 if scoring.estimator == "closed_form" else scoring.num_draws)


def forwards_per_token(scoring: ScoringConfig) -> float:
    """What a token costs in one draw, or in the closed form, in units of a plain forward."""
    if scoring.estimator == "monte_carlo":
        return (2.0 if scoring.paired else 1.0) + (4.0 if scoring.controlled else 0.0)
    passes = 2 if "log_prob_gradient_norm" in scoring.measures else 1
    return 3.0 * passes + 9.0 * scoring.curvature_probes


def assumed_tflops(pool: Pool) -> float:
    """A cautious rate of one actor, in TFLOP/s, where none was measured. Of several GPUs one works at a time."""
    return GPU_TFLOPS * min(1.0, pool.gpus) if pool.gpus else CPU_TFLOPS_PER_THREAD * pool.threads


def advice(pool: Pool, scoring: ScoringConfig) -> str | None:
    """What a person may want to set otherwise on these devices."""
    if not pool.gpus or scoring.micro_batch_tokens >= 4096:
        return None
    return (
        f"scoring.micro_batch_tokens: {scoring.micro_batch_tokens} leaves a GPU idle for the most part; 16384 is for "
        "one, in a new run.dir since it changes the last digits of scores"
    )


def token_forwards(layout: Layout, units: Sequence[Unit]) -> int:
    """Work of `units` in forwards of one token, perturbations counted as what they cost in the same measure."""
    return sum(
        (int(layout.padded_tokens[unit.first_micro_batch : unit.stop_micro_batch].sum()) + DRAW_TOKENS)
        * (unit.stop_draw - unit.first_draw)
        for unit in units
    )
