"""How a step's batch is divided among the workers and into passes, for the engine and for the loop."""

from dataclasses import dataclass

import numpy as np

from mrd_ray.config import UnlearnConfig
from mrd_ray.errors import UserError


@dataclass(frozen=True)
class Batching:
    """Each worker's samples of a step: forget samples, and as many retain samples if there are any.

    share: samples of each set per step and worker. micro_batch_size: samples of one pass. with_retain: whether steps
    take retain samples too.
    """

    share: int
    micro_batch_size: int
    with_retain: bool

    @classmethod
    def of(cls, config: UnlearnConfig, workers: int) -> "Batching":
        """The batching that the settings ask for. Raises UserError if the workers' shares would differ."""
        unlearning = config.unlearning
        if unlearning.batch_size % workers:
            raise UserError(
                f"unlearning.batch_size: {unlearning.batch_size} cannot be divided among {workers} workers "
                f"(ray.workers); expected a multiple, for example {-(-unlearning.batch_size // workers) * workers}"
            )
        share = unlearning.batch_size // workers
        micro = min(unlearning.micro_batch_size or share, share)
        return cls(share, micro, unlearning.method != "ga" and unlearning.retain_weight > 0)

    @property
    def passes(self) -> int:
        """Forwards, each with a backward, of a step, per worker."""
        return (2 if self.with_retain else 1) * -(-self.share // self.micro_batch_size)

    def parts(self, rows: np.ndarray, rank: int) -> list[np.ndarray]:
        """One worker's micro-batches, given a step's rows of one set."""
        own = rows[rank * self.share : (rank + 1) * self.share]
        return [own[first : first + self.micro_batch_size] for first in range(0, len(own), self.micro_batch_size)]
