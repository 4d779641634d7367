"""theta + delta: a working copy rebuilt from untouched base weights for each draw."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from mrd_ray.mrd.noise import add_noise

_PIECE = 1 << 20  # elements one thread perturbs at a time; small enough to balance, large enough to be worth a task


class Shard(NamedTuple):
    """Part of a parameter: flat elements start.. of it, contiguous. A whole parameter starts at 0."""

    tensor: torch.Tensor
    start: int


class Replica:
    """A model to run forwards with, and the base weights it is rebuilt from.

    The base is the memory that the model came in, which nothing writes to; the model's own parameters become the
    working copy. Two copies of the perturbed weights in all, of which the base, on a CPU, may be the weights' file
    itself, mapped, which all actors of a node share. The unperturbed model is put back by `restore`, a copy, never by
    subtracting noise.

    Args:
        model: in eval mode, its parameters contiguous. Tied parameters count once, under their first name.
        selected: the parameters theta, by name, that noise is added to; all if None.
        shards: where the model's weights are spread over processes, gives the parts of all parameters, by name, that
            this process holds, and lets go of gathered copies, which a write would not reach. Called before each write.
            The base is a copy then, since the parts stay where they are.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        selected: Collection[str] | None = None,
        shards: Callable[[], Mapping[str, Shard]] | None = None,
    ) -> None:
        self.model = model
        self._selected = selected
        self._shards = shards or self._whole
        if shards is not None:
            self.base = {name: shard.tensor.clone() for name, shard in self.working().items()}
        else:
            self.base = {name: shard.tensor for name, shard in self.working().items()}
            for name, parameter in model.named_parameters():
                if name in self.base:
                    parameter.data = parameter.data.clone()
        self._threads = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="noise")

    def _whole(self) -> dict[str, Shard]:
        return {name: Shard(parameter.data, 0) for name, parameter in self.model.named_parameters()}

    def working(self) -> dict[str, Shard]:
        """The working copy of theta, to write to now, before the next forward."""
        everything = self._shards()
        return {name: everything[name] for name in everything if self._selected is None or name in self._selected}

    def restore(self) -> None:
        """working = theta."""
        for name, shard in self.working().items():
            shard.tensor.copy_(self.base[name])

    def perturb(self, sigma: float, seed: int) -> None:
        """working = theta + sigma z, with z that of `seed` (see `noise`)."""
        working = self.working()
        if any(shard.tensor.is_cuda for shard in working.values()):
            for name, (out, start) in working.items():
                add_noise(out, self.base[name], sigma, seed, name, start)
            return
        jobs = [
            (out.view(-1)[i : i + _PIECE], self.base[name].view(-1)[i : i + _PIECE], sigma, seed, name, start + i)
            for name, (out, start) in working.items()
            for i in range(0, out.numel(), _PIECE)
        ]
        # torch's own threads cannot help numpy's generator, and would contend for the cores with these
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for _ in self._threads.map(lambda job: add_noise(*job), jobs):
                pass
        finally:
            torch.set_num_threads(threads)
