"""The workers of a training run, as collectives: who scores what, and how results are gathered."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from mrd_ray.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This worker is `rank` of `size`. Every method but `deal` is a collective: all ranks must call it."""

    rank: int
    size: int

    @classmethod
    def of_process_group(cls) -> "Ranks":
        """The ranks of torch.distributed's default group."""
        return cls(dist.get_rank(), dist.get_world_size())

    def deal(self, count: int) -> list[int]:
        """This rank's share of items 0..count-1, dealt in turns; all ranks get equally many, so the last may repeat.

        Under ZeRO-3 a forward is a collective, so a rank without work of its own repeats the last item.
        """
        rounds = -(-count // self.size)
        return [min(turn * self.size + self.rank, count - 1) for turn in range(rounds)]

    def gather(self, rows: list[T]) -> list[T]:
        """All ranks' rows, ordered by rank; every rank gets them."""
        if self.size == 1:
            return rows
        found: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(found, rows)
        return [row for part in found for row in part]

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """The sum over ranks of each value, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def agree(self, attempt: Callable[[], T]) -> T:
        """Run `attempt` on every rank. If it raises UserError on any, it is raised on all, so that none waits."""
        result, problem = None, None
        try:
            result = attempt()
        except UserError as raised:
            problem = str(raised)
        problems = [found for found in self.gather([problem]) if found is not None]
        if problems:
            raise UserError(problems[0])
        return result  # type: ignore[return-value]
