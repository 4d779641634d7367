"""Gaussian noise as a pure function of (noise_key, parameter name, flat element index).

No score may depend on the number of actors, the batch order, the world size, or which slice of a parameter a process
holds. So z is not drawn from a stream: any slice of it can be computed by itself.

    block b of parameter `name` under `noise_key`  =  Philox4x64-10(counter = b, key = (noise_key, hash64(name)))
    its four 64-bit words hold elements 8b .. 8b+7; word j, with low half l and high half h (signed 32-bit), yields
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

NOISE_VERSION = 1  # increase it whenever any element of z changes: runs of different versions must not mix

_BLOCK = 8  # normals per Philox block
# Normals per pass: few enough that the scratch buffers stay in a core's L2 cache.
_CHUNK = 1 << 16


def hash64(name: str) -> int:
    """64-bit hash of a parameter name, equal on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def philox(noise_key: int, name: str, first_block: int) -> np.random.Philox:
    """The generator of `name`'s words, positioned so that its first word is word 0 of block `first_block`."""
    # numpy increments the counter before it makes a block, hence the - 1 (modulo the counter's 256 bits)
    return np.random.Philox(key=noise_key | hash64(name) << 64, counter=(first_block - 1) % 2**256)


class _Scratch(threading.local):
    """Per-thread buffers: allocating them for each chunk would cost as much as the arithmetic."""

    def __init__(self) -> None:
        half = _CHUNK // 2
        self.radius, self.angle, self.cosine = (np.empty(half, np.float32) for _ in range(3))
        self.z = np.empty(_CHUNK, np.float32)


_scratch = _Scratch()


def _box_muller(words: np.ndarray) -> torch.Tensor:
    """uint64 [m] -> float32 [2m], view of this thread's scratch; numpy is fast with strides, torch with log and cos."""
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


def _chunks(noise_key: int, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (offset from start, float32 normals in scratch) covering elements start..stop of z."""
    first_block = start // _BLOCK
    generator = philox(noise_key, name, first_block)
    position = first_block * _BLOCK
    while position < stop:
        count = min(_CHUNK, -(-(stop - position) // _BLOCK) * _BLOCK)
        z = _box_muller(generator.random_raw(count // 2))
        lower, upper = max(position, start), min(position + count, stop)
        yield lower - start, z[lower - position : upper - position]
        position += count


def standard_normal(noise_key: int, name: str, start: int, stop: int) -> torch.Tensor:
    """Elements start..stop of z for one parameter: float32 [stop - start], on the CPU.

    Args:
        noise_key: 0 <= noise_key < 2**64; one per draw.
        name: the parameter's name, as in `model.named_parameters()`.
        start, stop: flat (row-major) element indices.
    """
    out = torch.empty(stop - start)
    for offset, z in _chunks(noise_key, name, start, stop):
        out[offset : offset + len(z)] = z
    return out


def standard_normal_like(tensor: torch.Tensor, noise_key: int, name: str, start: int = 0) -> torch.Tensor:
    """z for the parameter `name`, from flat element `start`: float32, with the tensor's shape and on its device."""
    zero = torch.zeros(tensor.shape, device=tensor.device)
    z = torch.empty_like(zero)
    add_noise(z, zero, 1.0, noise_key, name, start)
    return z


class Piece(NamedTuple):
    """One task: out = base + sigma * z, where z starts at flat element `start` of the parameter `name`.

    `out` and `base` are contiguous, with the same shape, dtype and device; `base` is not written.
    """

    out: torch.Tensor
    base: torch.Tensor
    name: str
    start: int


def add_noise(out: torch.Tensor, base: torch.Tensor, sigma: float, noise_key: int, name: str, start: int = 0) -> None:
    """out = base + sigma * z, where z starts at flat element `start` of the parameter `name`; see `Piece`."""
    add_noise_to_all([Piece(out, base, name, start)], sigma, noise_key)


def add_noise_to_all(pieces: Collection[Piece], sigma: float, noise_key: int) -> None:
    """out = base + sigma * z for each piece.

    On the CPU, normals are made in cache-sized chunks, one piece after another. On CUDA, pieces with the same device
    and dtype share one launch of a fused kernel, without a noise tensor.
    """
    for out, base, name, _ in pieces:
        if not (out.is_contiguous() and base.is_contiguous() and out.shape == base.shape and out.dtype == base.dtype):
            raise ValueError(f"{name}: add_noise needs contiguous tensors with the same shape and dtype")
    if on_cuda := [piece for piece in pieces if piece.out.is_cuda]:
        from mrd_ray.mrd.noise_triton import add_noise_cuda  # only CUDA builds of torch include Triton

        add_noise_cuda(on_cuda, sigma, noise_key)
    for out, base, name, start in pieces:
        if not out.is_cuda:
            flat_out, flat_base = out.view(-1), base.view(-1)
            for offset, z in _chunks(noise_key, name, start, start + out.numel()):
                window = slice(offset, offset + len(z))
                torch.add(flat_base[window], z, alpha=sigma, out=flat_out[window])
