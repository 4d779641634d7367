"""How many actors, and what each gets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mrd_ray.config import RayConfig
from mrd_ray.errors import UserError


@dataclass(frozen=True)
class Pool:
    """So many actors, of so many CPUs and GPUs each."""

    actors: int
    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """Threads of one actor."""
        return max(1, int(self.cpus))

    @classmethod
    def of(cls, config: RayConfig, resources: Mapping[str, float]) -> "Pool":
        """Size the pool for a cluster with these resources ("CPU", "GPU"). Raises UserError if it has no room."""
        cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        gpus_each = config.gpus_per_actor if config.gpus_per_actor is not None else float(gpus > 0)
        if gpus_each > gpus:
            raise UserError(f"ray.gpus_per_actor: {gpus_each:g} asked for, but the cluster has {gpus:g} GPU(s)")
        if config.cpus_per_actor > cpus:
            raise UserError(f"ray.cpus_per_actor: {config.cpus_per_actor:g} asked for, but the cluster has {cpus:g}")
        room = math.floor(cpus / config.cpus_per_actor)
        if gpus_each:
            room = min(room, math.floor(gpus / gpus_each))
        if config.actors is not None and config.actors > room:
            raise UserError(
                f"ray.actors: {config.actors} asked for, but the cluster's {cpus:g} CPU(s) and {gpus:g} GPU(s) have "
                f"room for {room} of {config.cpus_per_actor:g} CPU(s) and {gpus_each:g} GPU(s) each"
            )
        return cls(config.actors or room, config.cpus_per_actor, gpus_each)
