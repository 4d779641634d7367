"""theta + delta: a working copy rebuilt from untouched base weights for each draw."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import torch

from mrd_ray.mrd.noise import add_noise

_PIECE = 1 << 20  # elements one thread perturbs at a time; small enough to balance, large enough to be worth a task


class Replica:
    """A model to run forwards with, and the base weights it is rebuilt from.

    The base is a private copy that nothing writes to; the model's own parameters are the working copy. Two copies
    of the perturbed weights in all. The unperturbed model is put back by `restore`, a copy, never by subtracting noise.

    Args:
        model: in eval mode, its parameters contiguous. Tied parameters count once, under their first name.
        selected: the parameters theta, by name, that noise is added to; all if None.
    """

    def __init__(self, model: torch.nn.Module, selected: Collection[str] | None = None) -> None:
        self.model = model
        self.working = {
            name: parameter.data for name, parameter in model.named_parameters() if selected is None or name in selected
        }
        self.base = {name: tensor.clone() for name, tensor in self.working.items()}
        self._threads = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="noise")

    def restore(self) -> None:
        """working = theta."""
        for name, tensor in self.working.items():
            tensor.copy_(self.base[name])

    def perturb(self, sigma: float, seed: int) -> None:
        """working = theta + sigma z, with z that of `seed` (see `noise`)."""
        if next(iter(self.working.values())).is_cuda:
            for name, out in self.working.items():
                add_noise(out, self.base[name], sigma, seed, name)
            return
        jobs = [
            (out.view(-1)[start : start + _PIECE], self.base[name].view(-1)[start : start + _PIECE], name, start)
            for name, out in self.working.items()
            for start in range(0, out.numel(), _PIECE)
        ]
        # torch's own threads cannot help numpy's generator, and would contend for the cores with these
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for _ in self._threads.map(lambda job: add_noise(job[0], job[1], sigma, seed, job[2], job[3]), jobs):
                pass
        finally:
            torch.set_num_threads(threads)
