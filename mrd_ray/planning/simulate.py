"""Simulates how long N actors take for the units, with some actors slower than others and some lost."""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mrd_ray.data.micro_batches import Layout
from mrd_ray.scoring.units import Unit


@dataclass(frozen=True)
class Rates:
    """Times of one actor, in seconds.

    start_up: from asking for an actor until it takes units. theta: per padded token, once for a unit's samples.
    perturb: per draw. forward: per padded token, for every draw. The closed form uses only start_up and forward.
    source: where the rates come from.
    """

    start_up: float
    theta: float
    perturb: float
    forward: float
    source: str


@dataclass(frozen=True)
class Fleet:
    """The simulated actors. straggling: standard deviation of the logarithm of their slowness, whose median is 1.

    losses_per_hour: how often an actor is lost, for example on a spot market; a new one replaces it after the start-up
    time.
    """

    actors: int
    straggling: float = 0.0
    losses_per_hour: float = 0.0


@dataclass(frozen=True)
class Course:
    """The outcome of a simulated run. device_seconds: over all actors, from the start to the end of the run."""

    seconds: float
    device_seconds: float
    units_lost: int


def simulate(units: Sequence[Unit], layout: Layout, rates: Rates, fleet: Fleet, seed: int = 0) -> Course:
    """Give units in order to the next free actor, as Ray Data does; lost units are repeated first.

    An actor runs a unit's samples at theta, unless its last unit had the same samples.
    """
    random = np.random.default_rng(seed)
    slowness = np.exp(fleet.straggling * random.standard_normal(fleet.actors))
    life = 3600 / fleet.losses_per_hour if fleet.losses_per_hour else math.inf
    ends = [rates.start_up + random.exponential(life) if life < math.inf else life for _ in range(fleet.actors)]
    holds: list[range | None] = [None] * fleet.actors
    tokens = np.concatenate([[0], np.cumsum(layout.padded_tokens)])
    free = [(rates.start_up, actor) for actor in range(fleet.actors)]
    waiting, lost, finished = deque(units), 0, 0.0
    while waiting:
        now, actor = heapq.heappop(free)
        unit = waiting.popleft()
        size = float(tokens[unit.stop_micro_batch] - tokens[unit.first_micro_batch])
        draws = unit.stop_draw - unit.first_draw
        seconds = draws * (rates.perturb + rates.forward * size)
        if holds[actor] != unit.micro_batches:
            seconds += rates.theta * size
        done = now + float(slowness[actor]) * seconds
        if done > ends[actor]:
            waiting.appendleft(unit)
            lost += 1
            done = max(now, ends[actor]) + rates.start_up
            ends[actor] = done + random.exponential(life)
            holds[actor] = None
        else:
            holds[actor] = unit.micro_batches
            finished = max(finished, done)
        heapq.heappush(free, (done, actor))
    return Course(finished, finished * fleet.actors, lost)
