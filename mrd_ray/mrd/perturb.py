"""theta + delta: a working copy, rebuilt for each draw from base weights that never change."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from mrd_ray.mrd.noise import Piece, add_noise_to_all

_PIECE = 1 << 20  # elements that a thread perturbs at a time: small enough to balance, large enough to be worth a task


class Shard(NamedTuple):
    """Part of a parameter: its flat elements from `start` on, contiguous. A whole parameter starts at 0."""

    tensor: torch.Tensor
    start: int


class Replica:
    """A model to run forwards with, and the base weights from which a working copy is rebuilt.

    The base is the memory in which the model arrived, and nothing here writes to it. On a CPU it may be the mapped
    weights file itself, shared by all actors of a node. The working copy is separate memory: a perturbation points the
    model's parameters to it, and `restore` points them back. So the perturbed weights exist twice in total, and the
    unperturbed model is the original one, never the result of subtracting noise.

    Args:
        model: in eval mode, with contiguous parameters. Tied parameters count once, under their first name.
        selected: names of the parameters theta, to which noise is added; all if None.
        shards: used where the model's weights are spread over processes. Returns this process's parts of all
            parameters, by name, and releases gathered copies, which a write would not reach. Called before each write.
            The parts stay in place: they are the working copy, and the base is a copy of them.
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
        self._copies: dict[str, torch.Tensor] = {}  # the working copy, if there are no shards
        self._steps: dict[str, torch.Tensor] = {}
        self._threads = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="noise")

    @property
    def sharded(self) -> bool:
        """Whether the weights are spread over processes."""
        return self._shards is not None

    def working(self) -> dict[str, Shard]:
        """The working copy of theta, which the next forward uses; write to it before that forward."""
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
        """Make the model theta again."""
        if self._shards is None:
            self._point_to(self.base)
            return
        for name, shard in self.working().items():
            shard.tensor.copy_(self.base[name])

    def step(self) -> dict[str, torch.Tensor]:
        """delta after rounding to the weights' precision, working - theta, by name; the next call overwrites it.

        Not available where weights are spread over processes.
        """
        if not self._steps:
            self._steps = {name: torch.empty_like(tensor) for name, tensor in self.base.items()}
        for name, out in self._steps.items():
            torch.sub(self._copies[name], self.base[name], out=out)
        return self._steps

    def perturb(self, sigma: float, noise_key: int) -> None:
        """working = theta + sigma z, where z belongs to `noise_key` (see `noise`)."""
        pieces = [Piece(out, self.base[name], name, start) for name, (out, start) in self.working().items()]
        if any(piece.out.is_cuda for piece in pieces):
            add_noise_to_all(pieces, sigma, noise_key)
            return
        jobs = [
            Piece(out.view(-1)[i : i + _PIECE], base.view(-1)[i : i + _PIECE], name, start + i)
            for out, base, name, start in pieces
            for i in range(0, out.numel(), _PIECE)
        ]
        # torch's own threads cannot help numpy's generator, and would compete with these threads for the cores
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for _ in self._threads.map(lambda job: add_noise_to_all([job], sigma, noise_key), jobs):
                pass
        finally:
            torch.set_num_threads(threads)
