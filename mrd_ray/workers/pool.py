"""How many actors there are, and the resources of each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mrd_ray.config import RaySettings
from mrd_ray.errors import UserError


@dataclass(frozen=True)
class Pool:
    """A number of actors, and the CPUs and GPUs of each."""

    actors: int
    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """Threads of one actor."""
        return max(1, int(self.cpus))

    @property
    def resources(self) -> dict[str, float]:
        """What one actor takes, under Ray's names."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def room(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many such actors fit on nodes with these resources; an actor cannot span nodes."""
        return sum(
            min(math.floor(node.get(name, 0.0) / each) for name, each in self.resources.items()) for node in nodes
        )

    @classmethod
    def of(
        cls, config: RaySettings, nodes: Sequence[Mapping[str, float]], grows: bool = False, word: str = "actor"
    ) -> "Pool":
        """Size the pool for nodes with these resources ("CPU", "GPU").

        Args:
            grows: nodes may still join, so `actors`, if set, is accepted even if there is no room for all of them yet.
            word: what the settings call an actor.

        Raises:
            UserError: the cluster has no room for the pool.
        """
        cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
        gpus_each = config.gpus_per_actor if config.gpus_per_actor is not None else float(gpus > 0)
        pool = cls(config.actors or 1, config.cpus_per_process, gpus_each)
        if grows and config.actors is not None:
            return pool
        if gpus_each > gpus:
            raise UserError(f"ray.gpus_per_{word}: {gpus_each:g} requested, but the cluster has {gpus:g} GPU(s)")
        if config.cpus_per_process > cpus:
            raise UserError(
                f"ray.cpus_per_process: {config.cpus_per_process:g} requested, but the cluster has {cpus:g}"
            )
        room = pool.room(nodes)
        if (config.actors or 1) > room:
            raise UserError(
                f"ray.{word}s: {config.actors or 1} requested, but the cluster's {cpus:g} CPU(s) and {gpus:g} GPU(s) "
                f"on {len(nodes)} node(s) have room for {room} of {config.cpus_per_process:g} CPU(s) and {gpus_each:g} "
                "GPU(s) each"
            )
        return cls(config.actors or room, config.cpus_per_process, gpus_each)
