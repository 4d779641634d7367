"""The noise of `noise.py` as one fused CUDA kernel: out = base + sigma * z, with no noise tensor in memory.

One launch serves many parameters, so that small ones cost almost nothing. The kernel's speed is limited by instructions
rather than by memory, so it uses few: 128-bit products built from 32-bit ones, one integer range reduction for both
sine and cosine, and a whole Philox block, which is 8 neighbouring elements, in one thread.
"""

import contextlib
from collections.abc import Collection

import torch
import triton
import triton.language as tl

from mrd_ray.mrd.noise import Piece, hash64

_BLOCKS_PER_PROGRAM = 256  # Philox blocks, i.e. 2048 elements
_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _product(a, low, high):
    """uint64 a times the constant high:low, 32 bits each: the upper and the lower 64 bits of the 128."""
    a0 = a & 0xFFFFFFFF
    a1 = a >> 32
    p0 = a0 * low
    p1 = a1 * low + (p0 >> 32)
    p2 = a0 * high + (p1 & 0xFFFFFFFF)
    return a1 * high + (p1 >> 32) + (p2 >> 32), (p2 << 32) | (p0 & 0xFFFFFFFF)


@triton.jit
def _philox4x64_10(counter, key0, key1):
    c0 = counter
    c1 = tl.zeros_like(counter)
    c2 = tl.zeros_like(counter)
    c3 = tl.zeros_like(counter)
    # the multipliers 0xD2E7470EE14C6C93 and 0xCA5A826395121157
    low0 = tl.full(counter.shape, 0xE14C6C93, tl.uint64)
    high0 = tl.full(counter.shape, 0xD2E7470E, tl.uint64)
    low1 = tl.full(counter.shape, 0x95121157, tl.uint64)
    high1 = tl.full(counter.shape, 0xCA5A8263, tl.uint64)
    weyl0 = tl.full(counter.shape, 0x9E3779B97F4A7C15, tl.uint64)
    weyl1 = tl.full(counter.shape, 0xBB67AE8584CAA73B, tl.uint64)
    for _ in tl.static_range(10):
        upper0, lower0 = _product(c0, low0, high0)
        upper1, lower1 = _product(c2, low1, high1)
        c0 = upper1 ^ c1 ^ key0
        c1 = lower1
        c2 = upper0 ^ c3 ^ key1
        c3 = lower0
        key0 += weyl0
        key1 += weyl1
    return c0, c1, c2, c3


@triton.jit
def _box_muller(word):
    """uint64 [n] -> float32 [n, 2], as defined in `noise`.

    phi = quadrant pi/2 + x, |x| <= pi/4, where sine and cosine are polynomials accurate to float32 (Moshier's Cephes).
    """
    low = word.to(tl.uint32).to(tl.int32, bitcast=True)
    high = (word >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    u = (tl.abs(low.to(tl.float32)) + 0.5) * 4.656612873077393e-10  # 2^-31
    radius = tl.sqrt(-2.0 * tl.log(u))
    quadrant = ((high >> 29) + 1) >> 1
    x = (high - (quadrant << 30)).to(tl.float32) * 1.4629180792671596e-09  # pi 2^-31
    square = x * x
    sine = x + x * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    quartic = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    cosine = 1.0 + square * (-0.5 + square * quartic)
    odd = (quadrant & 1) != 0
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    cos = tl.where(((quadrant + 1) & 2) != 0, -cos, cos)
    sin = tl.where((quadrant & 2) != 0, -sin, sin)
    return tl.join(radius * cos, radius * sin)


# key is not specialised: Triton would turn an argument that equals 1 into a constant without a type
@triton.jit(do_not_specialize=["key"])
def _add_noise_kernel(table, row_of, sigma, key, TYPE: tl.constexpr, BLOCKS: tl.constexpr, WHOLE_BLOCKS: tl.constexpr):
    """Each program computes BLOCKS Philox blocks of one tensor; row_of says which row of the table describes it."""
    program = tl.program_id(0)
    row = table + tl.load(row_of + program).to(tl.int64) * 6
    out = tl.load(row).to(tl.pointer_type(TYPE))
    base = tl.load(row + 1).to(tl.pointer_type(TYPE))
    name_hash = tl.load(row + 2)
    start = tl.load(row + 3)
    count = tl.load(row + 4)
    index = (program - tl.load(row + 5)) * BLOCKS + tl.arange(0, BLOCKS)
    counter = (start // 8 + index).to(tl.uint64)
    zero = tl.zeros_like(counter)
    words = _philox4x64_10(counter, zero + key.to(tl.uint64), zero + name_hash.to(tl.uint64))
    even = tl.join(_box_muller(words[0]), _box_muller(words[2]))
    odd = tl.join(_box_muller(words[1]), _box_muller(words[3]))
    # [block, cosine or sine, upper half of the block, odd word]
    z = tl.join(even, odd).permute(0, 2, 3, 1).reshape(BLOCKS, 8)
    offset = index[:, None] * 8 + tl.arange(0, 8)[None, :]
    if WHOLE_BLOCKS:  # a thread reads and writes 16 bytes at once
        out = tl.multiple_of(out, 16)
        base = tl.multiple_of(base, 16)
        inside = (index < count // 8)[:, None].broadcast_to(BLOCKS, 8)
    else:
        offset -= start % 8
        inside = (offset >= 0) & (offset < count)
    value = tl.load(base + offset, mask=inside, other=0.0)
    wide = value if value.dtype == tl.float64 else value.to(tl.float32)
    tl.store(out + offset, (wide + sigma * z).to(TYPE), mask=inside)


def add_noise_cuda(pieces: Collection[Piece], sigma: float, noise_key: int) -> None:
    """out = base + sigma * z for each piece; see `noise`."""
    kinds: dict[tuple[torch.dtype, torch.device, bool], list[Piece]] = {}
    for piece in pieces:
        if piece.out.numel():
            kinds.setdefault((piece.out.dtype, piece.out.device, _whole_blocks(piece)), []).append(piece)
    for (dtype, device, whole_blocks), alike in kinds.items():
        programs = torch.tensor([_programs(piece) for piece in alike])
        total = int(programs.sum())
        table = torch.tensor(
            [
                [out.data_ptr(), base.data_ptr(), _signed(hash64(name)), start, out.numel(), first]
                for (out, base, name, start), first in zip(alike, (programs.cumsum(0) - programs).tolist(), strict=True)
            ]
        ).to(device)
        rows = torch.arange(len(alike), dtype=torch.int32, device=device)
        row_of = rows.repeat_interleave(programs.to(device), output_size=total)
        # the interpreter has no device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _add_noise_kernel[(total,)](
                table, row_of, sigma, _signed(noise_key),
                TYPE=_TYPES[dtype], BLOCKS=_BLOCKS_PER_PROGRAM, WHOLE_BLOCKS=whole_blocks,
                enable_fp_fusion=True,
            )  # fmt: skip


def _whole_blocks(piece: Piece) -> bool:
    """Whether it begins and ends at the edge of a Philox block, at addresses that are multiples of 16 bytes."""
    pointers = piece.out.data_ptr() | piece.base.data_ptr()
    return not (pointers % 16 or piece.start % 8 or piece.out.numel() % 8)


def _programs(piece: Piece) -> int:
    blocks = (piece.start + piece.out.numel() - 1) // 8 - piece.start // 8 + 1
    return triton.cdiv(blocks, _BLOCKS_PER_PROGRAM)


def _signed(word: int) -> int:
    """The int64 with the same bits as this uint64, so that launch arguments have one type, whatever their value."""
    return word - (word >> 63 << 64)
