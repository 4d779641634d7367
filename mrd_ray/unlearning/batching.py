"""How a step's batch is shared and cut: what the engine is configured for, and what the loop does."""

from dataclasses import dataclass

import numpy as np

from mrd_ray.config import UnlearnConfig
from mrd_ray.errors import UserError


@dataclass(frozen=True)
class Batching:
    """A step's forget samples, and as many retain samples where there are any, on each worker.

    share: samples of each set per step and worker. micro_batch_size: samples of one pass. with_retain: whether steps
    take retain samples too.
    """

    share: int
    micro_batch_size: int
    with_retain: bool

    @classmethod
    def of(cls, config: UnlearnConfig, workers: int) -> "Batching":
        """By the settings. Raises UserError if the samples do not come out even."""
        unlearning = config.unlearning
        if unlearning.batch_size % workers:
            raise UserError(
                f"unlearning.batch_size: {unlearning.batch_size} cannot be shared by {workers} workers (ray.workers); "
                f"expected a multiple, such as {-(-unlearning.batch_size // workers) * workers}"
            )
        share = unlearning.batch_size // workers
        micro = min(unlearning.micro_batch_size or share, share)
        return cls(share, micro, unlearning.method != "ga" and unlearning.retain_weight > 0)

    @property
    def passes(self) -> int:
        """Forwards and backwards of a step, per worker."""
        return (2 if self.with_retain else 1) * -(-self.share // self.micro_batch_size)

    def parts(self, rows: np.ndarray, rank: int) -> list[np.ndarray]:
        """The micro-batches of one worker, of a step's rows of one set."""
        own = rows[rank * self.share : (rank + 1) * self.share]
        return [own[first : first + self.micro_batch_size] for first in range(0, len(own), self.micro_batch_size)]
