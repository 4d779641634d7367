"""Gaussian noise as a pure function of (seed, parameter name, flat element index).

No score may depend on how many actors there are, on batch order, on world size or on which slice of a parameter
a process holds. So z is not drawn from a stream: any slice of it can be computed alone.

    block b of parameter `name` under `seed`  =  Philox4x64-10(counter = b, key = (seed, hash64(name)))
    its four 64-bit words hold elements 8b .. 8b+7; word j, with low half l and high half h (signed 32-bit), gives
        u = (|l| + 1/2) / 2^31     in (0, 1]
        phi = pi h / 2^31          in [-pi, pi)
        z[8b + 2j] = sqrt(-2 ln u) cos(phi),   z[8b + 2j + 1] = sqrt(-2 ln u) sin(phi)

(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box and Muller, 1958.) The words are the same
on every device; the normals are float32 and agree between devices to float32 rounding. |z| is at most 6.7.
"""

import hashlib
import math
import threading
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import torch

NOISE_VERSION = 1  # raise it whenever any element of z changes: runs of different versions must not mix

_BLOCK = 8  # normals per Philox block
# Normals per pass: small enough that scratch stays in a core's L2 cache.
_CHUNK = 1 << 16


def hash64(name: str) -> int:
    """64-bit hash of a parameter name, equal on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def philox(seed: int, name: str, first_block: int) -> np.random.Philox:
    """The generator of `name`'s words, positioned so that its first word is word 0 of block `first_block`."""
    # numpy raises the counter before it makes a block, hence the - 1 (modulo the counter's 256 bits)
    return np.random.Philox(key=seed | hash64(name) << 64, counter=(first_block - 1) % 2**256)


class _Scratch(threading.local):
    """Per-thread buffers: allocating them anew for each chunk costs as much as the arithmetic."""

    def __init__(self) -> None:
        half = _CHUNK // 2
        self.radius, self.angle, self.cosine = (np.empty(half, np.float32) for _ in range(3))
        self.z = np.empty(_CHUNK, np.float32)


_scratch = _Scratch()


def _box_muller(words: np.ndarray) -> torch.Tensor:
    """uint64 [m] -> float32 [2m], a view of this thread's scratch; numpy is fast at strides, torch at log and cos."""
    m = len(words)
    halves = words.view(np.int32).reshape(m, 2)  # little-endian: column 0 is the low half
    radius, angle, cosine = (buffer[:m] for buffer in (_scratch.radius, _scratch.angle, _scratch.cosine))
    z = _scratch.z[: 2 * m].reshape(m, 2)

    np.copyto(radius, halves[:, 0], casting="unsafe")
    torch.from_numpy(radius).abs_().add_(0.5).mul_(2.0**-31).log_().mul_(-2.0)
    np.sqrt(radius, out=radius)

    np.copyto(angle, halves[:, 1], casting="unsafe")
    phi = torch.from_numpy(angle).mul_(math.pi * 2.0**-31)
    torch.cos(phi, out=torch.from_numpy(cosine))
    phi.sin_()

    np.multiply(radius, cosine, out=z[:, 0])
    np.multiply(radius, angle, out=z[:, 1])
    return torch.from_numpy(_scratch.z[: 2 * m])


def _chunks(seed: int, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (offset from start, float32 normals in scratch) covering elements start..stop of z."""
    first_block = start // _BLOCK
    generator = philox(seed, name, first_block)
    position = first_block * _BLOCK
    while position < stop:
        count = min(_CHUNK, -(-(stop - position) // _BLOCK) * _BLOCK)
        z = _box_muller(generator.random_raw(count // 2))
        lower, upper = max(position, start), min(position + count, stop)
        yield lower - start, z[lower - position : upper - position]
        position += count


def standard_normal(seed: int, name: str, start: int, stop: int) -> torch.Tensor:
    """Elements start..stop of z for one parameter: float32 [stop - start], on the CPU.

    Args:
        seed: 0 <= seed < 2**64; one per draw.
        name: the parameter's name, as in `model.named_parameters()`.
        start, stop: flat (row-major) element indices.
    """
    out = torch.empty(stop - start)
    for offset, z in _chunks(seed, name, start, stop):
        out[offset : offset + len(z)] = z
    return out


def standard_normal_like(tensor: torch.Tensor, seed: int, name: str, start: int = 0) -> torch.Tensor:
    """z for the parameter `name` from flat element `start` on: float32, of the tensor's shape and on its device."""
    zero = torch.zeros(tensor.shape, device=tensor.device)
    z = torch.empty_like(zero)
    add_noise(z, zero, 1.0, seed, name, start)
    return z


class Piece(NamedTuple):
    """out = base + sigma * z is to be done, where z starts at flat element `start` of the parameter `name`.

    `out` and `base` are contiguous, of one shape, dtype and device; `base` is not written.
    """

    out: torch.Tensor
    base: torch.Tensor
    name: str
    start: int


def add_noise(out: torch.Tensor, base: torch.Tensor, sigma: float, seed: int, name: str, start: int = 0) -> None:
    """out = base + sigma * z, where z starts at flat element `start` of the parameter `name`; see `Piece`."""
    add_noise_to_all([Piece(out, base, name, start)], sigma, seed)


def add_noise_to_all(pieces: Collection[Piece], sigma: float, seed: int) -> None:
    """out = base + sigma * z for each piece.

    On the CPU the normals are made in cache-sized chunks, one piece after the other; on CUDA pieces of a device and
    dtype share a launch of a fused kernel without a noise tensor.
    """
    for out, base, name, _ in pieces:
        if not (out.is_contiguous() and base.is_contiguous() and out.shape == base.shape and out.dtype == base.dtype):
            raise ValueError(f"{name}: add_noise needs contiguous tensors of one shape and dtype")
    if on_cuda := [piece for piece in pieces if piece.out.is_cuda]:
        from mrd_ray.mrd.noise_triton import add_noise_cuda  # Triton comes with CUDA builds of torch only

        add_noise_cuda(on_cuda, sigma, seed)
    for out, base, name, start in pieces:
        if not out.is_cuda:
            flat_out, flat_base = out.view(-1), base.view(-1)
            for offset, z in _chunks(seed, name, start, start + out.numel()):
                window = slice(offset, offset + len(z))
                torch.add(flat_base[window], z, alpha=sigma, out=flat_out[window])
