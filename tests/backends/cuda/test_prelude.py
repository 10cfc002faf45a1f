"""The functions that kernels call: NVRTC compiles each for GPUs, g++ for the emulator; arithmetic is the language's."""

from __future__ import annotations

import re

import kernel_interpreter
import numpy as np
import pytest
from emulator.harness import DEVICE_PRELUDE, compile_source, compiler
from onnxc.backends.cuda import nvrtc

needs_nvrtc = pytest.mark.skipif(not nvrtc.is_available(), reason="nvidia-cuda-nvrtc is not installed")
needs_compiler = pytest.mark.skipif(
    compiler() is None, reason="g++ is not installed: nothing compiles CUDA C for a CPU"
)

# Calls of every function, by kernel. f, d, i, l, b, h are pointers to float, double, i32, i64, i8, f16; s is shared
# memory, r are registers, t is the thread.
CALLS = {
    "block": "f[t] = ((float*)shared_memory())[t]; barrier(); warp_barrier();",
    "shuffles": "f[t] = shuffle_xor(f[t], 1); d[t] = shuffle_down(d[t], 1); i[t] = shuffle_up(i[t], 1);"
    "l[t] = shuffle(l[t], 3); r[0] = shuffle_xor(r[0], 2); *(u64*)l = shuffle((u64)l[t], 1); r[1] = ballot(f[t] > 0);",
    "copies": "copy_async_16(s, f, true); copy_async_8(s + 16, f, i[t] > 0); copy_async_4(s + 24, f, false);"
    "copy_async_commit(); copy_async_wait<1>(); copy_async_wait<0>();",
    "matrices": "load_matrix_x1(r, s); load_matrix_x2(r + 1, s); load_matrix_x4(r + 3, s);"
    "load_matrix_x1_transposed(r + 7, s); load_matrix_x2_transposed(r + 8, s); load_matrix_x4_transposed(r + 10, s);",
    "multiply": "float c[4] = {f[0], f[1], f[2], f[3]}; i32 e[4] = {i[0], i[1], i[2], i[3]};"
    "mma_m16n8k16_f16(c, r, r + 4); mma_m16n8k16_bf16(c, r, r + 4); mma_m16n8k8_tf32(c, r, r + 4);"
    "mma_m16n8k32_s8s8(e, r, r + 4); mma_m16n8k32_u8s8(e, r, r + 4); "
    "mma_m16n8k32_s8u8(e, r, r + 4); mma_m16n8k32_u8u8(e, r, r + 4); for (int n = 0; n < 4; ++n) f[n] = c[n] + e[n];",
    "narrow": "f[0] = f16_to_f32(h[0]); f[1] = bf16_to_f32(h[1]); h[2] = f32_to_f16(f[2]); h[3] = f32_to_bf16(f[3]);"
    "h[4] = f64_to_f16(d[0]); h[5] = f64_to_bf16(d[1]); r[0] = f32_to_tf32(f[4]); r[1] = pack_f16(f[5], f[6]);"
    "r[2] = pack_bf16(f[7], f[8]);",
    "extrema": "f[0] = minimum(f[1], f[2]); f[3] = maximum(f[1], f[2]); d[0] = minimum(d[1], d[2]);"
    "d[3] = maximum(d[1], d[2]); i[0] = minimum(i[1], i[2]); b[0] = maximum(b[1], b[2]); l[0] = minimum(l[1], l[2]);",
    "integers": "i[0] = div_or_zero(i[1], i[2]); b[0] = rem_or_zero(b[1], b[2]); l[0] = shift_left(l[1], l[2]);"
    "i[3] = shift_right(i[4], i[5]); i[6] = floor_div(i[7], i[8]); l[3] = floor_mod(l[4], l[5]);"
    "l[6] = power(l[7], l[8]); r[0] = popcount(r[1]); r[2] = count_bits(l[9]);",
    "floats": "f[9] = rounded_product(f[1], f[2]) + f[3]; d[4] = rounded_product(d[5], d[6]);"
    "f[0] = sigmoid(f[1]); d[0] = sigmoid(d[1]); f[2] = reciprocal_estimate(f[3]);"
    "f[7] = exp2_estimate(f[8]);"
    "f[4] = bits_as<float>(i[0]); *(u64*)l = to_u64(f[5]) + to_u64(d[2]); f[6] = f64_to_f32_toward_zero(d[3]);",
    "atomics": "".join(
        f"atomic_{op}({target}, {value});"
        for op in ("add", "min", "max", "mul")
        for target, value in (
            *(("f", "1.5f"), ("d", "1.5"), ("i", "3"), ("(u32*)i", "3"), ("l", "3"), ("(u64*)l", "3"), ("b", "3")),
            *(("(u8*)b + 1", "3"), ("(i16*)h", "3"), ("(u16*)h + 1", "3")),
        )
    ),
    "half_atomics": "".join(
        f"atomic_{op}_{kind}(h, 1.5f);" for op in ("add", "min", "max", "mul") for kind in ("f16", "bf16")
    ),
    "vectors": "*(Pack<float, 4>*)f = *(const Pack<float, 4>*)(f + 4); *(Pack<f16, 8>*)h = {{1, 2, 3, 4, 5, 6, 7, 8}};"
    "const Pack<i8, 16> p = *(const Pack<i8, 16>*)b; b[16] = p.lane[3];",
    "mathematics": "f[0] = expf(f[1]) + logf(f[2]) + tanhf(f[3]) + erff(f[4]) + powf(f[5], f[6]) + fmodf(f[7], f[8]);"
    "f[2] = rintf(f[9]); d[0] = exp(d[1]) + log(d[2]) + tanh(d[3]) + erf(d[4]) + pow(d[5], d[6]) + fmod(d[7], d[8]);"
    "d[2] = rint(d[9]); f[1] = fmaf(f[1], f[2], f[3]);"
    "f[3] = rsqrtf(f[4]) + copysignf(f[5], f[6]) + sqrtf(f[7]) + exp2f(f[8]) + expm1f(f[9]);"
    "d[1] = fma(d[1], d[2], d[3]) + rsqrt(d[4]) + fabs(d[5]) + log1p(d[6]) + asinh(d[7]) + floor(d[8]) + trunc(d[9]);",
}
# Called by others only.
INNER = {"shared_address", "swap_word", "swap_part", "atomic_update"}


def kernel(name: str, body: str) -> str:
    parameters = "float* f, double* d, i32* i, i64* l, i8* b, f16* h, u32* out"
    return (
        f'extern "C" __global__ void __launch_bounds__(32)\n{name}({parameters})\n{{\n    const int t = threadIdx.x;\n'
        f"    u32 r[16];\n    for (int n = 0; n < 16; ++n) r[n] = out[n];\n"
        f"    unsigned char* const s = shared_memory();\n"
        f"    {body}\n    for (int n = 0; n < 16; ++n) out[t * 16 + n] = r[n];\n    (void)s;\n}}\n"
    )


def test_every_function_is_called() -> None:
    """What is tested here is all that the prelude has."""
    text = DEVICE_PRELUDE.read_text()
    names = set(re.findall(r"DEVICE [\w ]+[ *]+(\w+)\(", text)) - INNER
    assert {"barrier", "shared_memory", "mma_m16n8k16_f16", "bits_as", "popcount", "atomic_mul"} <= names
    assert "atomic_update" not in names and len(names) > 50
    assert [name for name in names if not re.search(rf"\b{name}\b", " ".join(CALLS.values()))] == []


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", CALLS)
def test_functions_compile_for_a_gpu(name: str, architecture: str) -> None:
    result = nvrtc.compile_source(DEVICE_PRELUDE.read_text() + kernel(name, CALLS[name]), architecture)
    assert result.image.startswith(b"\x7fELF")
    assert name in result.resources


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_86", "sm_100"])
def test_all_functions_compile_together(architecture: str) -> None:
    kernels = "".join(kernel(name, body) for name, body in CALLS.items())
    assert set(nvrtc.compile_source(DEVICE_PRELUDE.read_text() + kernels, architecture).resources) == set(CALLS)


@needs_compiler
@pytest.mark.parametrize("checked", [False, True])
def test_functions_compile_for_a_cpu(checked: bool) -> None:
    library = compile_source("".join(kernel(name, body) for name, body in CALLS.items()), checked)
    assert set(library.kernels) == set(CALLS)


INTEGERS = """extern "C" __global__ void __launch_bounds__(64)
integers_TYPE(const TYPE* __restrict__ a, const TYPE* __restrict__ b, TYPE* __restrict__ y, int n)
{
    for (int i = threadIdx.x; i < n; i += 64) {
        y[i] = div_or_zero(a[i], b[i]);
        y[n + i] = rem_or_zero(a[i], b[i]);
        y[2 * n + i] = shift_left(a[i], b[i]);
        y[3 * n + i] = shift_right(a[i], b[i]);
        y[4 * n + i] = power(a[i], b[i]);
        y[5 * n + i] = minimum(a[i], b[i]);
        y[6 * n + i] = maximum(a[i], b[i]);
        y[7 * n + i] = popcount(a[i]);
    }
}
"""


def wrapped_power(base: int, exponent: int, dtype: np.dtype) -> int:
    """base^exponent modulo 2^bits; for a negative exponent the truncated reciprocal, 0 for base 0."""
    if exponent < 0:
        return base if base in (1, -1) and exponent % 2 else int(base in (1, -1))
    bits = dtype.itemsize * 8
    power = pow(base, exponent, 1 << bits)
    return power - (1 << bits) if power > np.iinfo(dtype).max else power


@needs_compiler
@pytest.mark.parametrize("name", ["i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64"])
def test_integer_arithmetic_is_that_of_the_kernel_language(name: str) -> None:
    dtype = np.dtype(name.replace("i", "int").replace("u", "uint").replace("uintnt", "uint"))
    limits, random = np.iinfo(dtype), np.random.default_rng(4)
    edges = np.array([limits.min, limits.max, 0, 1, 2, 3, 7, 31, 63, 64, *([-1, -2, -7] if limits.min else [])], dtype)
    wide = random.integers(limits.min, limits.max, 200, dtype, endpoint=True)
    a, b = (x.ravel().copy() for x in np.meshgrid(np.concatenate([edges, wide]), edges))
    y = np.zeros((8, len(a)), dtype)
    compile_source(INTEGERS.replace("TYPE", name)).launch(f"integers_{name}", 1, 64, 0, [a, b, y, len(a)])
    with np.errstate(all="ignore"):
        for row, op in enumerate(("div", "rem", "shl", "shr", "pow", "min", "max")):
            if op == "pow":
                continue
            expected = kernel_interpreter._binary(op, a, b)
            if op in ("div", "rem"):  # numpy's quotient of the least number by -1 is not defined
                kept = ~((a == limits.min) & (b == dtype.type(-1))) if limits.min else np.ones(len(a), np.bool_)
                np.testing.assert_array_equal(y[row][kept], expected[kept], op)
                np.testing.assert_array_equal(y[row][~kept], limits.min if op == "div" else 0)
            else:
                np.testing.assert_array_equal(y[row], expected, op)
    powers = [wrapped_power(int(x), int(e), dtype) for x, e in zip(a, b, strict=True)]
    np.testing.assert_array_equal(y[4], np.array(powers, dtype))
    unsigned = a.view(f"u{dtype.itemsize}")
    np.testing.assert_array_equal(y[7], np.bitwise_count(unsigned))


FLOATS = """extern "C" __global__ void __launch_bounds__(64)
floats_TYPE(const TYPE* __restrict__ a, const TYPE* __restrict__ b, TYPE* __restrict__ y, u64* __restrict__ z, int n)
{
    for (int i = threadIdx.x; i < n; i += 64) {
        y[i] = minimum(a[i], b[i]);
        y[n + i] = maximum(a[i], b[i]);
        y[2 * n + i] = sigmoid(a[i]);
        z[i] = to_u64(a[i]);
    }
}
"""


@needs_compiler
@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("double", np.float64)])
def test_float_arithmetic_is_that_of_the_kernel_language(name: str, dtype: type) -> None:
    special = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.5, 88.0, -104.0, 800.0, -800.0, 1.5e19, -3e9], dtype
    )
    a, b = (x.ravel().copy() for x in np.meshgrid(special, special))
    y, z = np.zeros((3, len(a)), dtype), np.zeros(len(a), np.uint64)
    compile_source(FLOATS.replace("TYPE", name)).launch(f"floats_{name}", 1, 64, 0, [a, b, y, z, len(a)])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(y[0], np.minimum(a, b))
        np.testing.assert_array_equal(y[1], np.maximum(a, b))
        zeros = (a == 0) & (b == 0)
        np.testing.assert_array_equal(np.signbit(y[0][zeros]), np.signbit(a[zeros]) | np.signbit(b[zeros]))
        np.testing.assert_allclose(y[2], kernel_interpreter.MATH["sigmoid"](a), rtol=1e-6)
        inside = np.abs(a) < 1e10
        np.testing.assert_array_equal(z[inside], a[inside].astype(np.int64).view(np.uint64))
        assert (z[a == dtype(1.5e19)] == int(dtype(1.5e19))).all()


DIVISION = """extern "C" __global__ void __launch_bounds__(64)
division(const i32* __restrict__ a, const i32* __restrict__ b, i32* __restrict__ y, int n)
{
    for (int i = threadIdx.x; i < n; i += 64) {
        y[i] = floor_div(a[i], b[i]);
        y[n + i] = floor_mod(a[i], b[i]);
    }
}
"""


@needs_compiler
def test_quotients_of_indices_round_down() -> None:
    a, b = (x.ravel().astype(np.int32) for x in np.meshgrid(np.arange(-20, 21), [-7, -3, -1, 1, 2, 5, 20]))
    y = np.zeros((2, len(a)), np.int32)
    compile_source(DIVISION).launch("division", 1, 64, 0, [a, b, y, len(a)])
    np.testing.assert_array_equal(y[0], a // b)
    np.testing.assert_array_equal(y[1], a % b)
