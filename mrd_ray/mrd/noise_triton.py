"""The noise of `noise.py` as one fused CUDA kernel: out = base + sigma * z, no noise tensor in memory."""

import contextlib

import torch
import triton
import triton.language as tl

_BLOCKS_PER_PROGRAM = 128  # Philox blocks, i.e. 1024 elements


@triton.jit
def _philox4x64_10(counter, key0, key1):
    c0 = counter
    c1 = tl.zeros_like(counter)
    c2 = tl.zeros_like(counter)
    c3 = tl.zeros_like(counter)
    multiplier0 = tl.full(counter.shape, 0xD2E7470EE14C6C93, tl.uint64)
    multiplier1 = tl.full(counter.shape, 0xCA5A826395121157, tl.uint64)
    weyl0 = tl.full(counter.shape, 0x9E3779B97F4A7C15, tl.uint64)
    weyl1 = tl.full(counter.shape, 0xBB67AE8584CAA73B, tl.uint64)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(multiplier0, c0)
        high1 = tl.umulhi(multiplier1, c2)
        low0 = multiplier0 * c0
        low1 = multiplier1 * c2
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 += weyl0
        key1 += weyl1
    return c0, c1, c2, c3


@triton.jit
def _store_pair(out, base, sigma, word, element, start, count):
    low = word.to(tl.uint32).to(tl.int32, bitcast=True)
    high = (word >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    u = (tl.abs(low.to(tl.float32)) + 0.5) * 4.656612873077393e-10  # 2^-31
    phi = high.to(tl.float32) * 1.4629180792671596e-09  # pi 2^-31
    radius = tl.sqrt(-2.0 * tl.log(u))
    for half in tl.static_range(2):
        z = radius * (tl.cos(phi) if half == 0 else tl.sin(phi))
        offset = element + half - start
        inside = (offset >= 0) & (offset < count)
        value = tl.load(base + offset, mask=inside, other=0.0)
        wide = value if value.dtype == tl.float64 else value.to(tl.float32)
        tl.store(out + offset, (wide + sigma * z).to(value.dtype), mask=inside)


# not specialised: Triton would make an argument that equals 1 a constant, without a type
@triton.jit(do_not_specialize=["seed", "name_hash", "start", "count"])
def _add_noise_kernel(out, base, sigma, seed, name_hash, start, count, BLOCKS: tl.constexpr):
    block = start // 8 + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    zero = tl.zeros_like(block).to(tl.uint64)
    words = _philox4x64_10(block.to(tl.uint64), zero + seed.to(tl.uint64), zero + name_hash.to(tl.uint64))
    for j in tl.static_range(4):
        _store_pair(out, base, sigma, words[j], block * 8 + 2 * j, start, count)


def add_noise_cuda(out: torch.Tensor, base: torch.Tensor, sigma: float, seed: int, name_hash: int, start: int) -> None:
    """out = base + sigma * z for flat tensors of one dtype; see `noise.add_noise`."""
    if not out.numel():
        return
    first, last = start // 8, (start + out.numel() - 1) // 8
    grid = (triton.cdiv(last - first + 1, _BLOCKS_PER_PROGRAM),)
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():  # the interpreter has none
        _add_noise_kernel[grid](
            out, base, sigma, _signed(seed), _signed(name_hash), start, out.numel(), BLOCKS=_BLOCKS_PER_PROGRAM
        )


def _signed(word: int) -> int:
    """The int64 with the bits of this uint64: launch arguments of one type, whatever their value."""
    return word - (word >> 63 << 64)
