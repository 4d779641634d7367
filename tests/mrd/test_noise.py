"""The noise is the documented function, is normal, and any slice of it is the slice of the whole."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from mrd_ray.mrd import noise

N = 1 << 20


def reference(seed: int, name: str, start: int, stop: int) -> np.ndarray:
    """The docstring's formulas, element by element in float64, with Philox in plain integers."""

    def philox4x64_10(counter: int, key: tuple[int, int]) -> list[int]:
        c, mask = [counter, 0, 0, 0], 2**64 - 1
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [p1 >> 64 ^ c[1] ^ key[0], p1 & mask, p0 >> 64 ^ c[3] ^ key[1], p0 & mask]
            key = ((key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask)
        return c

    def signed(half: int) -> int:
        return half - 2**32 if half >= 2**31 else half

    z = []
    for element in range(start, stop):
        word = philox4x64_10(element // 8, (seed, noise.hash64(name)))[element % 8 // 2]
        u = (abs(signed(word % 2**32)) + 0.5) / 2**31
        phi = np.pi * signed(word >> 32) / 2**31
        z.append(np.sqrt(max(0.0, -2 * np.log(u))) * (np.sin(phi) if element % 2 else np.cos(phi)))
    return np.array(z)


def test_philox_is_the_published_one():
    """Known answers of Random123: zero counter and key; all ones."""
    zeros = np.random.Philox(key=0, counter=2**256 - 1).random_raw(4)
    assert [hex(word) for word in zeros.tolist()] == [
        "0x16554d9eca36314c", "0xdb20fe9d672d0fdc", "0xd7e772cee186176b", "0x7e68b68aec7ba23b",
    ]  # fmt: skip
    assert noise.hash64("model.embed_tokens.weight") == 0xF64261A496B5D16A


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
@pytest.mark.parametrize("start", [0, 3, 2**34 + 5])
def test_every_element_is_the_documented_formula(seed, start):
    z = noise.standard_normal(seed, "a.weight", start, start + 50)
    np.testing.assert_allclose(z.numpy(), reference(seed, "a.weight", start, start + 50), atol=2e-6)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 2), (7, 9), (65_535, 65_537), (100_001, 300_003), (5, 5)])
def test_slice_of_the_noise_is_slice_of_the_whole(start, stop):
    whole = noise.standard_normal(7, "w", 0, 300_010)
    assert torch.equal(noise.standard_normal(7, "w", start, stop), whole[start:stop])


def test_normal_by_kolmogorov_smirnov_and_moments():
    z = noise.standard_normal(11, "w", 0, N).double().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(z.mean()) < 4 / np.sqrt(N)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / N)
    assert abs(stats.kurtosis(z)) < 4 * np.sqrt(24 / N)
    assert np.isfinite(z).all()


def test_tails_are_those_of_a_normal():
    z = noise.standard_normal(12, "w", 0, 1 << 24).abs()
    expected = (1 << 24) * 2 * stats.norm.sf(4.5)
    assert abs(int((z > 4.5).sum()) - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 64, 65_536])
def test_elements_are_uncorrelated(lag):
    z = noise.standard_normal(13, "w", 0, N + lag).double()
    assert abs(float((z[:-lag] * z[lag:]).mean())) < 4.5 / np.sqrt(N)
    squares = z * z - 1
    assert abs(float((squares[:-lag] * squares[lag:]).mean())) < 2 * 4.5 / np.sqrt(N)


@pytest.mark.parametrize(
    ("first", "second"),
    [((1, "layers.0.w"), (1, "layers.1.w")), ((1, "w"), (2, "w")), ((0, "w"), (1 << 32, "w")), ((1, "ab"), (1, "ba"))],
)
def test_parameters_and_seeds_are_independent(first, second):
    a, b = (noise.standard_normal(seed, name, 0, N).double() for seed, name in (first, second))
    assert abs(float((a * b).mean())) < 4.5 / np.sqrt(N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_add_noise(dtype):
    base = torch.randn(1000, 77, dtype=dtype)
    kept, out = base.clone(), torch.empty_like(base)
    noise.add_noise(out, base, 1e-2, 5, "w")
    z = noise.standard_normal(5, "w", 0, base.numel()).view_as(base)
    torch.testing.assert_close(out, base + 1e-2 * z.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-9)
    assert torch.equal(base, kept)

    part = torch.empty(5000, dtype=dtype)
    noise.add_noise(part, base.view(-1)[1234:6234], 1e-2, 5, "w", start=1234)
    assert torch.equal(part, out.view(-1)[1234:6234])


def test_add_noise_refuses_strides_it_would_get_wrong():
    weight = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"layer\.weight"):
        noise.add_noise(weight.t(), weight.t(), 1.0, 0, "layer.weight")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Where the CUDA kernel runs: by Triton's interpreter on the CPU, or for real, of which a process has but one."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("where there is a GPU, Triton compiles: -m gpu")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [3, 2**63 + 5])
def test_triton_kernel_makes_the_noise(dtype, seed, device):
    """The same as on the CPU to float32 rounding, in one launch."""
    kernel = pytest.importorskip("mrd_ray.mrd.noise_triton")
    # whole Philox blocks and not, below and above a program's, a start beyond 32 bits, a single element, none
    sizes = [(8, 0), (3000, 0), (4104, 16), (3000, 1003), (5, 2**40 + 6), (2049, 0), (1, 7), (0, 0)]
    shards = [(torch.randn(size).to(dtype), f"w{number}", start) for number, (size, start) in enumerate(sizes)]
    pieces = [
        noise.Piece(torch.empty_like(base, device=device), base.to(device), name, start) for base, name, start in shards
    ]
    kernel.add_noise_cuda(pieces, 1.0, seed)
    for (out, *_), (base, name, start) in zip(pieces, shards, strict=True):
        expected = torch.empty_like(base)
        noise.add_noise(expected, base, 1.0, seed, name, start)
        rounding = torch.finfo(dtype).eps * 8 if dtype in (torch.float16, torch.bfloat16) else 2e-6
        difference = (out.cpu().double() - expected.double()).abs().max() if len(out) else 0.0
        assert difference <= rounding, name


def test_triton_kernel_on_noise_alone(device):
    """Where sine and cosine change places or sign, and where the radius is least: a hundred thousand elements."""
    kernel = pytest.importorskip("mrd_ray.mrd.noise_triton")
    zero = torch.zeros(100_000, device=device)
    out = torch.full_like(zero, torch.nan)
    kernel.add_noise_cuda([noise.Piece(out, zero, "w", 24)], 1.0, 1)
    torch.testing.assert_close(out.cpu(), noise.standard_normal(1, "w", 24, 100_024), rtol=0, atol=2e-6)


COMPILED = """
import json, subprocess, sys, tempfile
from pathlib import Path
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mrd_ray.mrd.noise_triton import _BLOCKS_PER_PROGRAM, _add_noise_kernel

bytes_of, whole_blocks = int(sys.argv[1]), sys.argv[2] == "True"
parameters = {parameter.name: parameter for parameter in _add_noise_kernel.params}
assert parameters["key"].do_not_specialize  # else Triton would make a key that equals 1 a constant, without a type
signature = dict(table="*i64", row_of="*i32", sigma="fp32", key="i64")
constants = dict(
    TYPE={2: tl.bfloat16, 4: tl.float32}[bytes_of],
    BLOCKS=_BLOCKS_PER_PROGRAM,
    WHOLE_BLOCKS=whole_blocks,
)
assert [*signature, *constants] == list(parameters)
where = {(list(parameters).index(name),): value for name, value in constants.items()}
source = ASTSource(_add_noise_kernel, signature | dict.fromkeys(constants, "constexpr"), where)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
tools = Path(triton.__file__).parent / "backends/nvidia/bin"
with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
    cubin.write(kernel.asm["cubin"])
    cubin.flush()
    shown = [
        subprocess.run([tools / "cuobjdump", flag, cubin.name], capture_output=True, text=True, check=True).stdout
        for flag in ("--dump-resource-usage", "-sass")
    ]
print(json.dumps(shown))
"""


@pytest.mark.parametrize(("bytes_of", "whole_blocks", "at_most"), [(2, True, 74), (4, True, 82), (4, False, 98)])
def test_triton_kernel_compiles_for_a_gpu_to_few_instructions(bytes_of, whole_blocks, at_most, tmp_path):
    """The machine code of a GPU, which no GPU is needed for: nothing spilt, wide accesses, instructions an element."""
    pytest.importorskip("mrd_ray.mrd.noise_triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED, str(bytes_of), str(whole_blocks)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    usage, code = json.loads(ran.stdout)
    assert {"STACK:0", "LOCAL:0"} <= set(usage.split())
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\d+ +)?([A-Z][A-Z0-9.]+)", code)
    a_thread = 16  # elements: 2048 by 128 threads
    assert len(instructions) / a_thread <= at_most, len(instructions)
    wide = [name for name in instructions if re.match(r"(LDG|STG).*\.128", name)]
    assert len(wide) == (2 * a_thread * bytes_of / 16 if whole_blocks else 0)
