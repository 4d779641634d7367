"""How long units take a number of actors, simulated: some slower than others, some lost on the way."""

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
    """Seconds of one actor. theta and forward are for a padded token: once for a unit's samples, and for every draw.

    start_up: from asking for an actor until it takes units. perturb: of a draw. The closed form has forward alone.
    source: where they are from.
    """

    start_up: float
    theta: float
    perturb: float
    forward: float
    source: str


@dataclass(frozen=True)
class Fleet:
    """Actors as they come. straggling: standard deviation of the logarithm of their slowness, whose median is 1.

    losses_per_hour: of an actor, by a spot market say; another takes its place after the start-up time.
    """

    actors: int
    straggling: float = 0.0
    losses_per_hour: float = 0.0


@dataclass(frozen=True)
class Course:
    """How a simulated run went. device_seconds: all actors, from the beginning to the end of the run."""

    seconds: float
    device_seconds: float
    units_lost: int


def simulate(units: Sequence[Unit], layout: Layout, rates: Rates, fleet: Fleet, seed: int = 0) -> Course:
    """Units in their order to whoever is free, as Ray Data hands them out; lost ones are made again first.

    An actor runs a unit's samples at theta unless its last unit had the same ones.
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
