"""Work units: rectangles of (samples x draws)."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mrd_ray.config import ScoringSettings
from mrd_ray.data.micro_batches import Layout
from mrd_ray.errors import UserError

# Perturbing every weight once costs about as much as the forward of this many tokens: 7-10 ns per weight, compared with
# 2 FLOP per weight and token. This holds on CPUs (30 GFLOP/s per core) and on GPUs (memory traffic, float32 FLOPs).
DRAW_TOKENS = 256
# increase it whenever samples are cut into other micro-batches, or results hold something else: units must not mix
LAYOUT_VERSION = 5
_BLOCK_TOKENS = 64 * DRAW_TOKENS  # tokens of a unit's samples: enough that perturbing takes less than 2% of the time
_MAX_BLOCK_TOKENS = 64 * _BLOCK_TOKENS  # as many as actors and the driver easily hold as Python objects
_UNIT_SECONDS = 30.0  # target: a killed actor loses little, and scheduling costs almost nothing in comparison
_MAX_UNIT_SECONDS = 180.0  # longest time of a single draw over a unit's samples before the samples are divided
_UNITS_PER_ACTOR = 4  # at least, if the work can be divided that far, so that actors finish at about the same time


@dataclass(frozen=True)
class Unit:
    """A rectangle of work: micro-batches first..stop of a round's layout, draws first..stop (both stops excluded).

    Round 0 covers all samples; later rounds add draws for samples that adaptive scoring has not settled.
    """

    round: int
    first_micro_batch: int
    stop_micro_batch: int
    first_draw: int
    stop_draw: int

    @property
    def micro_batches(self) -> range:
        """The micro-batches that it spans."""
        return range(self.first_micro_batch, self.stop_micro_batch)

    @property
    def unit_id(self) -> str:
        """Its name, which `of_id` turns back into the unit."""
        micro_batches = f"m{self.first_micro_batch:08d}-{self.stop_micro_batch:08d}"
        return f"r{self.round:02d}_{micro_batches}_k{self.first_draw:08d}-{self.stop_draw:08d}"

    @classmethod
    def of_id(cls, unit_id: str) -> "Unit":
        """The unit with this id. Raises UserError if it is not the id of a unit.

        >>> Unit.of_id("r00_m00000000-00000003_k00000004-00000008").micro_batches
        range(0, 3)
        """
        match = re.fullmatch(r"r(\d+)_m(\d+)-(\d+)_k(\d+)-(\d+)", unit_id, re.ASCII)
        unit = None if match is None else cls(*map(int, match.groups()))
        if unit is None or unit.unit_id != unit_id or not unit.micro_batches or unit.first_draw >= unit.stop_draw:
            raise UserError(f"run.dir: units/{unit_id} is not a unit of mrd_ray; move it out of that folder")
        return unit


def missing_units(round: int, num_micro_batches: int, draws: range, done: Iterable[Unit]) -> list[Unit]:
    """The part of a round's grid that is not in `done` (only units of this round), in rectangles as large as possible.

    Raises UserError if done reaches past the grid.
    """
    finished: list[list[Unit]] = [[] for _ in range(num_micro_batches)]
    done = list(done)
    if (reached := max((unit.stop_draw for unit in done), default=0)) > draws.stop:
        raise UserError(
            f"scoring.num_draws: {draws.stop}, but this run directory already holds draws up to {reached}. "
            "This number can only grow; use another run.dir for fewer"
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
    """The ranges of draws that are in none of the units, which share a micro-batch."""
    gaps, reached = [], draws.start
    ordered = sorted(units, key=lambda unit: unit.first_draw)
    for before, unit in zip([None, *ordered], ordered, strict=False):
        if before is not None and unit.first_draw < reached:
            raise UserError(
                f"run.dir: units/{before.unit_id} and units/{unit.unit_id} hold the same draws of the same samples; "
                "move one of them out of that folder and run the same command again"
            )
        if unit.first_draw > reached:
            gaps.append((reached, unit.first_draw))
        reached = unit.stop_draw
    return gaps if reached >= draws.stop else [*gaps, (reached, draws.stop)]


def cut_units(layout: Layout, rectangles: Sequence[Unit], actors: int, tokens_per_second: float) -> list[Unit]:
    """Cut what is missing into units for this many actors of this speed (in token-forwards).

    A unit spans many samples, which then share each perturbation, and few draws. Cutting draws costs nothing, because
    an actor keeps the results at the unperturbed weights from one unit to the next. If there are few draws, a unit
    spans more samples.
    """
    total = sum(
        int(layout.padded_tokens[r.first_micro_batch : r.stop_micro_batch].sum()) * (r.stop_draw - r.first_draw)
        for r in rectangles
    )
    per_actor = max(1, total // (actors * _UNITS_PER_ACTOR))
    units = []
    for r in rectangles:
        draws = r.stop_draw - r.first_draw
        # fewer tokens only if a single draw of a full block would take too long, or leave too few units for all actors
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
    """Runs of consecutive micro-batches with at most `tokens` tokens each, but at least one micro-batch."""
    blocks, start, held = [], first, 0
    for micro_batch in range(first, stop):
        size = int(layout.padded_tokens[micro_batch])
        if micro_batch > start and held + size > tokens:
            blocks.append((start, micro_batch))
            start, held = micro_batch, 0
        held += size
    blocks.append((start, stop))
    return blocks


def first_draws(scoring: ScoringSettings) -> range:
    """The draws of round 0; the closed form's grid is one draw wide."""
    return range(1 if scoring.estimator == "closed_form" else scoring.num_draws)
