"""The noise is the documented function, is normal, and any slice of it is the slice of the whole."""

import os
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [0, 1003])
@pytest.mark.parametrize("seed", [3, 2**63 + 5])
def test_triton_kernel_under_its_interpreter(dtype, start, seed):
    """The CUDA kernel, run by Triton's interpreter on the CPU: the same noise to float32 rounding."""
    kernel = pytest.importorskip("mrd_ray.mrd.noise_triton")
    base = torch.randn(3000, dtype=dtype)
    out, expected = torch.empty_like(base), torch.empty_like(base)
    kernel.add_noise_cuda(out, base, 1.0, seed, noise.hash64("w"), start)
    noise.add_noise(expected, base, 1.0, seed, "w", start)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


@pytest.mark.gpu
def test_cuda_equals_cpu():
    base = torch.randn(1_000_003)
    out, expected = torch.empty_like(base, device="cuda"), torch.empty_like(base)
    noise.add_noise(out, base.cuda(), 1.0, 9, "w", 17)
    noise.add_noise(expected, base, 1.0, 9, "w", 17)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=2e-6)


LOWERED = """
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from mrd_ray.mrd.noise_triton import _add_noise_kernel

target = GPUTarget("cuda", 90, 32)
backend = make_backend(target)
options = backend.parse_options({})
signature, constants = {}, {(7,): 128}
values = dict(out="*fp32", base="*fp32", sigma=1e-5, seed=1, name_hash=1, start=1, count=1)
for i, (parameter, (name, value)) in enumerate(zip(_add_noise_kernel.params, values.items())):
    assert parameter.name == name
    if isinstance(value, str):
        signature[name] = value
    elif isinstance(value, float):
        signature[name] = "fp32"
    elif parameter.do_not_specialize:
        signature[name] = "i64"
    else:  # what Triton makes of an argument that equals 1
        signature[name], constants[(i,)] = "constexpr", value
signature["BLOCKS"] = "constexpr"
source = ASTSource(_add_noise_kernel, signature, constants)
context = ir.context()
ir.load_dialects(context)
backend.load_dialects(context)
module = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
assert "umulhi" in str(module) or "mulhiui" in str(module)
print("lowered")
"""


def test_triton_kernel_lowers_for_a_gpu_where_arguments_equal_one():
    """Draw 1 of seed 0 has noise seed 1, which Triton would make a constant; its interpreter does not show that."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", LOWERED], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.stdout == "lowered\n", ran.stderr
