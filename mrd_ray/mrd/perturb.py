"""theta + delta: a working copy rebuilt from untouched base weights for each draw."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from mrd_ray.mrd.noise import Piece, add_noise_to_all

_PIECE = 1 << 20  # elements one thread perturbs at a time; small enough to balance, large enough to be worth a task


class Shard(NamedTuple):
    """Part of a parameter: flat elements start.. of it, contiguous. A whole parameter starts at 0."""

    tensor: torch.Tensor
    start: int


class Replica:
    """A model to run forwards with, and the base weights that a working copy is rebuilt from.

    The base is the memory that the model came in, which nothing here writes to: on a CPU it may be the weights' file
    itself, mapped, once for all actors of a node. The working copy is other memory, which the model's parameters are
    pointed to by a perturbation, and away from by `restore`. So there are two copies of the perturbed weights in all,
    and the unperturbed model is the very one that came, never one that noise was subtracted from.

    Args:
        model: in eval mode, its parameters contiguous. Tied parameters count once, under their first name.
        selected: the parameters theta, by name, that noise is added to; all if None.
        shards: where the model's weights are spread over processes, gives the parts of all parameters, by name, that
            this process holds, and lets go of gathered copies, which a write would not reach. Called before each write.
            The parts stay where they are: they are the working copy, and the base is a copy of them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        selected: Collection[str] | None = None,
        shards: Callable[[], Mapping[str, Shard]] | None = None,
    ) -> None:
        self.model = model
        self._shards = shards
        everything = shards() if shards is not None else {n: Shard(p.data, 0) for n, p in model.named_parameters()}
        theta = {name: everything[name].tensor for name in everything if selected is None or name in selected}
        self.base = theta if shards is None else {name: tensor.clone() for name, tensor in theta.items()}
        self.starts = {name: everything[name].start for name in theta}  # first flat element of each
        self._copies: dict[str, torch.Tensor] = {}  # the working copy, where there are no shards
        self._steps: dict[str, torch.Tensor] = {}
        self._threads = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="noise")

    @property
    def sharded(self) -> bool:
        """Whether the weights are spread over processes."""
        return self._shards is not None

    def working(self) -> dict[str, Shard]:
        """The working copy of theta, which the next forward uses; to write to now, before it."""
        if self._shards is not None:
            everything = self._shards()
            return {name: everything[name] for name in self.base}
        if not self._copies:
            self._copies = {name: torch.empty_like(tensor) for name, tensor in self.base.items()}
        self._point_to(self._copies)
        return {name: Shard(tensor, 0) for name, tensor in self._copies.items()}

    def _point_to(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            if name in tensors:
                parameter.data = tensors[name]

    def restore(self) -> None:
        """The model is theta again."""
        if self._shards is None:
            self._point_to(self.base)
            return
        for name, shard in self.working().items():
            shard.tensor.copy_(self.base[name])

    def step(self) -> dict[str, torch.Tensor]:
        """delta as the weights' precision has it, working - theta, by name; overwritten by the next call.

        Not where weights are spread over processes.
        """
        if not self._steps:
            self._steps = {name: torch.empty_like(tensor) for name, tensor in self.base.items()}
        for name, out in self._steps.items():
            torch.sub(self._copies[name], self.base[name], out=out)
        return self._steps

    def perturb(self, sigma: float, seed: int) -> None:
        """working = theta + sigma z, with z that of `seed` (see `noise`)."""
        pieces = [Piece(out, self.base[name], name, start) for name, (out, start) in self.working().items()]
        if any(piece.out.is_cuda for piece in pieces):
            add_noise_to_all(pieces, sigma, seed)
            return
        jobs = [
            Piece(out.view(-1)[i : i + _PIECE], base.view(-1)[i : i + _PIECE], name, start + i)
            for out, base, name, start in pieces
            for i in range(0, out.numel(), _PIECE)
        ]
        # torch's own threads cannot help numpy's generator, and would contend for the cores with these
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for _ in self._threads.map(lambda job: add_noise_to_all([job], sigma, seed), jobs):
                pass
        finally:
            torch.set_num_threads(threads)
