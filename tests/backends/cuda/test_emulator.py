"""The emulator that the CUDA backend's tests stand on: right kernels give right results, planted faults are named."""

from __future__ import annotations

import ctypes
import re
import struct
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from emulator import samples
from emulator.harness import (
    DEVICE_PRELUDE,
    MAGIC,
    EmulationError,
    Library,
    compile_source,
    compiler,
    image_of,
    prototypes,
)
from onnxc.backends.cuda import nvrtc

pytestmark = pytest.mark.skipif(compiler() is None, reason="g++ is not installed: nothing compiles CUDA C for a CPU")
SEEDS = range(5)
MODES = pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def test_prototypes_are_read_from_the_text() -> None:
    relu, softmax = prototypes(samples.RELU + samples.SOFTMAX)
    assert (relu.name, relu.largest_block, relu.needs_fibers) == ("relu", 256, False)
    assert [(p.name, p.declaration) for p in relu.parameters] == [
        ("x0", "const float*"),
        ("y0", "float*"),
        ("n", "int"),
    ]
    assert softmax.needs_fibers
    # Text before the kernels may be called by any of them.
    assert prototypes("DEVICE void wait() { barrier(); }\n" + samples.RELU)[0].needs_fibers


@MODES
@pytest.mark.parametrize("seed", SEEDS)
def test_elementwise(checked: bool, seed: int) -> None:
    x, y = floats(1000), np.zeros(1000, np.float32)
    compile_source(samples.RELU, checked).launch("relu", 4, 256, 0, [x, y, 1000], seed)
    np.testing.assert_array_equal(y, np.maximum(x, 0))


@MODES
def test_vectors_and_64_bit_sizes(checked: bool) -> None:
    x, y = floats(512), np.zeros(512, np.float32)
    compile_source(samples.WIDE, checked).launch("twice", 2, 64, 0, [x, y, 512])
    np.testing.assert_array_equal(y, 2 * x)


@MODES
@pytest.mark.parametrize("seed", SEEDS)
def test_block_reduction(checked: bool, seed: int) -> None:
    x, y = floats(6, 300), np.zeros((6, 300), np.float32)
    # shuffle_down leaves the sum of a warp in its first lane, which is the one that is used.
    compile_source(samples.SOFTMAX, checked).launch("softmax", 6, 128, 16, [x, y, 300], seed)
    expected = np.exp(x - x.max(1, keepdims=True))
    np.testing.assert_allclose(y, expected / expected.sum(1, keepdims=True), rtol=1e-5)


def operands(name: str, m: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices a [m, k] and b [n, k] as the kernel takes them, and the product."""
    random = np.random.default_rng(3)
    if name.endswith("8"):
        a, b = random.integers(-128, 128, (2, max(m, n), k), dtype=np.int8)
        a, b = a[:m].copy(), b[:n].copy()
        left, right = (x.view(np.uint8) if kind == "u" else x for x, kind in ((a, name[0]), (b, name[2])))
        return a, b, left.astype(np.int32) @ right.T.astype(np.int32)
    dtype = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32}[name]
    a, b = random.normal(size=(m, k)).astype(dtype), random.normal(size=(n, k)).astype(dtype)
    left, right = a.astype(np.float32), b.astype(np.float32)
    if name == "tf32":  # the lower 13 bits do not count
        left, right = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (left, right))
    return a, b, left.astype(np.float64) @ right.T.astype(np.float64)


@MODES
@pytest.mark.parametrize("name", samples.GEMM_TYPES)
def test_matrix_multiplication(name: str, checked: bool) -> None:
    library = compile_source(samples.gemm(name), checked)
    m, n, k = 50, 40, 192
    a, b, expected = operands(name, m, n, k)
    for seed in SEEDS:
        c = np.zeros((m, n), expected.dtype if expected.dtype == np.int32 else np.float32)
        library.launch(f"gemm_{name}", 4, 64, samples.GEMM_SHARED_BYTES, [a, b, c, m, n, k], seed, 1 + seed % 2)
        np.testing.assert_allclose(c, expected, atol=1e-4 if c.dtype == np.float32 else 0)


@MODES
def test_transposed_matrices(checked: bool) -> None:
    a, b, c = floats(16, 16).astype(np.float16), floats(16, 16).astype(np.float16)[::-1].copy(), floats(16, 16)
    compile_source(samples.TRANSPOSED, checked).launch("transposed", 1, 32, 1024, [a, b, c])
    np.testing.assert_allclose(c, a.astype(np.float32) @ b.astype(np.float32), atol=1e-5)


@MODES
@pytest.mark.parametrize("os_threads", [1, 2])
def test_atomic_updates(checked: bool, os_threads: int) -> None:
    n = 1000
    places = np.random.default_rng(1).integers(0, 7, n).astype(np.int32)
    sums, least, halves, products = (
        np.zeros(7, np.float32),
        np.zeros(7, np.int8),
        np.zeros(7, np.float16),
        np.ones(7, np.int64),
    )
    arguments = [places, np.ones(n, np.float32), sums, least, halves, products, n]
    compile_source(samples.SCATTER, checked).launch("scatter", 8, 128, 0, arguments, seed=3, os_threads=os_threads)
    counts = np.bincount(places, minlength=7)
    np.testing.assert_array_equal(sums, counts)
    np.testing.assert_array_equal(halves, counts)
    np.testing.assert_array_equal(least, [(np.flatnonzero(places == i) % 256 - 128).min() for i in range(7)])
    np.testing.assert_array_equal(
        products, np.array([pow(3, int(c), 1 << 64) for c in counts], np.uint64).view(np.int64)
    )


WARP = """extern "C" __global__ void __launch_bounds__(64)
warp(const i64* __restrict__ x0, i64* __restrict__ y0, u32* __restrict__ y1)
{
    const int thread = threadIdx.x;
    const i64 value = x0[thread];
    const i64 v1 = shuffle_xor(value, 5);
    const i64 v2 = shuffle_down(value, 3);
    const i64 v3 = shuffle_up(value, 3);
    const i64 v4 = shuffle(value, thread * 7);
    const u32 v5 = ballot(value > 0);
    y0[thread * 4] = v1;
    y0[thread * 4 + 1] = v2;
    y0[thread * 4 + 2] = v3;
    y0[thread * 4 + 3] = v4;
    y1[thread] = v5;
}
"""


@MODES
@pytest.mark.parametrize("seed", SEEDS)
def test_values_of_other_lanes(checked: bool, seed: int) -> None:
    x = np.random.default_rng(5).integers(-(1 << 60), 1 << 60, 64)
    y, votes = np.zeros((64, 4), np.int64), np.zeros(64, np.uint32)
    compile_source(WARP, checked).launch("warp", 1, 64, 0, [x, y, votes], seed)
    lane = np.arange(32)
    down, up = np.where(lane + 3 < 32, lane + 3, lane), np.where(lane >= 3, lane - 3, lane)
    for begin in (0, 32):
        warp = x[begin : begin + 32]
        expected = np.stack([warp[lane ^ 5], warp[down], warp[up], warp[lane * 7 % 32]], 1)
        np.testing.assert_array_equal(y[begin : begin + 32], expected)
        assert (votes[begin : begin + 32] == sum(1 << i for i in range(32) if warp[i] > 0)).all()


CONVERSIONS = """extern "C" __global__ void __launch_bounds__(32)
conversions(const float* __restrict__ x0, const double* __restrict__ x1, u16* __restrict__ y0, u32* __restrict__ y1,
            float* __restrict__ y2, int n)
{
    for (int i = blockIdx.x * 32 + threadIdx.x; i < n; i += 32 * 16) {
        y0[i * 4] = f32_to_f16(x0[i]);
        y0[i * 4 + 1] = f32_to_bf16(x0[i]);
        y0[i * 4 + 2] = f64_to_f16(x1[i]);
        y0[i * 4 + 3] = f64_to_bf16(x1[i]);
        y1[i * 3] = pack_f16(x0[i], 1.0f);
        y1[i * 3 + 1] = pack_bf16(1.0f, x0[i]);
        y1[i * 3 + 2] = f32_to_tf32(x0[i]);
        y2[i * 2] = f16_to_f32((f16)i);
        y2[i * 2 + 1] = bf16_to_f32((bf16)i);
    }
}
"""


def test_narrow_floats() -> None:
    n = 1 << 16
    random = np.random.default_rng(2)
    with np.errstate(all="ignore"):
        x = random.integers(0, 1 << 32, n).astype(np.uint32).view(np.float32)
        x[: n // 2] = random.normal(size=n // 2) * 2.0 ** random.integers(-30, 20, n // 2)
        x = np.where(np.isnan(x), np.float32(1), x)
        x[:4] = [np.inf, -np.inf, 65520, -0.0]
        # Near the middle of two f16 or bf16, where rounding twice goes wrong.
        wide = x.astype(np.float16).astype(np.float64) * (1 + 2.0**-11) * (1 + random.choice([-1, 0, 1], n) * 2.0**-40)
        wide = np.where(np.isfinite(wide), wide, 0)
        halves, words, back = np.zeros((n, 4), np.uint16), np.zeros((n, 3), np.uint32), np.zeros((n, 2), np.float32)
        compile_source(CONVERSIONS).launch("conversions", 16, 32, 0, [x, wide, halves, words, back, n])
        f16, bf16 = x.astype(np.float16).view(np.uint16), x.astype(ml_dtypes.bfloat16).view(np.uint16)
        np.testing.assert_array_equal(halves[:, 0], f16)
        np.testing.assert_array_equal(halves[:, 1], bf16)
        np.testing.assert_array_equal(halves[:, 2], wide.astype(np.float16).view(np.uint16))
        # Rounded to odd in 40 bits, by integers: exact for numbers of this size.
        bits = (wide.view(np.uint64) >> 32).astype(np.uint32) | ((wide.view(np.uint64) & 0xFFFFFFFF) != 0)
        odd = (bits.astype(np.uint64) << 32).view(np.float64).astype(np.float32)
        np.testing.assert_array_equal(halves[:, 3], odd.astype(ml_dtypes.bfloat16).view(np.uint16))
        np.testing.assert_array_equal(words[:, 0], f16.astype(np.uint32) | 0x3C00_0000)
        np.testing.assert_array_equal(words[:, 1], bf16.astype(np.uint32) << 16 | 0x3F80)
        tf32 = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        np.testing.assert_array_equal(words[:, 2], np.where(np.isinf(x), x.view(np.uint32), tf32))
        every = np.arange(n, dtype=np.uint16)
        np.testing.assert_array_equal(back[:, 0], every.view(np.float16).astype(np.float32))
        np.testing.assert_array_equal(back[:, 1], every.view(ml_dtypes.bfloat16).astype(np.float32))


@MODES
def test_barriers_of_a_warp(checked: bool) -> None:
    x, y = floats(64), np.zeros(64, np.float32)
    compile_source(samples.NEIGHBOURS, checked).launch("neighbours", 1, 64, 256, [x, y])
    np.testing.assert_array_equal(y.reshape(2, 32), np.roll(x.reshape(2, 32), -1, 1))


@MODES
@pytest.mark.parametrize("seed", SEEDS)
def test_memory_of_the_grid_across_barriers(checked: bool, seed: int) -> None:
    """What another thread has written before a barrier is read after it, though the pointer is restricted."""
    text = """extern "C" __global__ void __launch_bounds__(64)
    swap(float* __restrict__ y0, float* __restrict__ y1)
    {
        const int thread = threadIdx.x;
        y0[thread] = -1.0f;
        barrier();
        y0[thread ^ 33] = (float)thread;
        barrier();
        y1[thread] = y0[thread];
    }
    """
    y = [np.zeros(64, np.float32), np.zeros(64, np.float32)]
    compile_source(text, checked).launch("swap", 1, 64, 0, y, seed)
    np.testing.assert_array_equal(y[1], np.arange(64) ^ 33)


@pytest.mark.skipif(not nvrtc.is_available(), reason="nvidia-cuda-nvrtc is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_same_texts_compile_for_a_gpu(architecture: str) -> None:
    texts = [samples.RELU, samples.WIDE, samples.SOFTMAX, samples.SCATTER, samples.NEIGHBOURS, samples.TRANSPOSED, WARP]
    texts += [samples.gemm(name) for name in samples.GEMM_TYPES]
    result = nvrtc.compile_source(DEVICE_PRELUDE.read_text() + "".join(texts), architecture)
    assert set(result.resources) == {kernel.name for kernel in prototypes("".join(texts))}


def test_library_as_a_driver_uses_it() -> None:
    """By name, with CUDA's parameter buffer; an error has a text."""
    image = image_of(samples.RELU)
    assert image.startswith(MAGIC) and image.endswith(b"\0")
    code = ctypes.CDLL(image[len(MAGIC) : -1].decode())
    code.emulator_error.restype = ctypes.c_char_p
    x, y = floats(300), np.zeros(300, np.float32)
    three = ctypes.c_uint * 3
    buffer = struct.pack("<QQi", x.ctypes.data, y.ctypes.data, 300)
    assert code.emulated_relu(buffer, three(2, 1, 1), three(256, 1, 1), ctypes.c_ulong(0)) == 0
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    assert code.emulated_relu(buffer, three(1, 1, 1), three(512, 1, 1), ctypes.c_ulong(0)) == 1
    assert code.emulator_error() == b"kernel relu: a block of 512 threads, at most 256 can be"


# ---- Planted faults ----


def report_of(library: Library, name: str, grid: int, threads: int, shared: int, arguments: list, seed: int = 0) -> str:
    with pytest.raises(EmulationError) as caught:
        library.launch(name, grid, threads, shared, arguments, seed)
    return str(caught.value)


def changed(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


def relu_report(new: str, checked: bool, n: int = 1024) -> str:
    text = changed(samples.RELU, "y0[i] = maximum(x0[i], 0.0f);", new)
    return report_of(compile_source(text, checked), "relu", 4, 256, 0, [floats(n), floats(n), n])


def softmax_report(old: str, new: str, checked: bool = True) -> str:
    library = compile_source(changed(samples.SOFTMAX, old, new), checked)
    return report_of(library, "softmax", 2, 128, 16, [floats(2, 300), floats(2, 300), 300])


def test_missing_barrier() -> None:
    report = softmax_report("    barrier();  // all have read the maxima\n", "")
    assert "kernel softmax, block 0, thread" in report
    assert "data race: write, and a read by block 0, thread" in report
    assert re.search(r"shared memory \+\d+ \(of 16 bytes\)", report)
    assert "part[thread / 32] = sum;" in report  # the line of the text


def test_missing_barrier_of_a_warp() -> None:
    library = compile_source(changed(samples.NEIGHBOURS, "    warp_barrier();\n", ""), checked=True)
    report = report_of(library, "neighbours", 1, 64, 256, [floats(64), floats(64)])
    assert "data race: read, and a write" in report or "data race: write, and a read" in report


def test_missing_wait() -> None:
    text = changed(samples.gemm("f16"), "copy_async_wait<1>();", "")
    a, b, _ = operands("f16", 32, 32, 64)
    arguments = [a, b, floats(32, 32), 32, 32, 64]
    report = report_of(compile_source(text, checked=True), "gemm_f16", 1, 64, 8192, arguments)
    assert "no copy_async_wait has waited" in report and "load_matrix_x4(left" in report
    # Without the checks, the tile is what shared memory holds at first.
    compile_source(text).launch("gemm_f16", 1, 64, 8192, arguments)
    assert np.isnan(arguments[2]).all()


@MODES
def test_divergent_barrier(checked: bool) -> None:
    new = "if (thread < 32) {\n        barrier();\n    } else {\n        barrier();\n    }  // two"
    report = softmax_report("barrier();  // all have read the maxima", new, checked)
    assert "divergent barrier: this thread is at the one of line" in report


@MODES
def test_barrier_that_some_threads_never_reach(checked: bool) -> None:
    report = softmax_report(
        "barrier();  // all have read the maxima", "if (thread >= 64) return;\n    barrier();", checked
    )
    assert "threads 0-63 wait at barrier, line 20; threads 64-127 have returned" in report


@MODES
def test_collective_of_half_a_warp(checked: bool) -> None:
    old = "top = maximum(top, shuffle_xor(top, step));"
    report = softmax_report(old, f"if (thread % 32 < 16) {old}", checked)
    assert "threads 0-15" in report and "shuffle_xor, line 11" in report


@MODES
def test_different_collectives_in_a_warp(checked: bool) -> None:
    old = "top = maximum(top, shuffle_xor(top, step));"
    new = f"if (thread % 2) {old} else {old.replace('xor', 'down')}"
    assert "divergent warp: this lane is at" in softmax_report(old, new, checked)


def test_collective_of_an_incomplete_warp() -> None:
    report = report_of(compile_source(samples.SOFTMAX), "softmax", 1, 100, 16, [floats(300), floats(300), 300])
    assert "shuffle_xor in a warp of 4 threads" in report or "cannot go on" in report


@MODES
def test_read_past_the_end(checked: bool) -> None:
    report = relu_report("y0[i] = x0[i + 1];", checked)
    assert "block 3, thread 255: read outside of all buffers: x0 + 4096 bytes (x0 has 4096)" in report
    assert "9: y0[i] = x0[i + 1];" in report


@MODES
def test_read_before_the_beginning(checked: bool) -> None:
    assert "thread 0: read outside of all buffers: x0 - 4 bytes" in relu_report("y0[i] = x0[i - 1];", checked)


def test_read_past_the_end_of_a_small_buffer() -> None:
    assert "thread 3: read outside of all buffers: x0 + 16 bytes" in relu_report("y0[i] = x0[i + 1];", True, n=4)


@MODES
def test_write_past_the_end(checked: bool) -> None:
    assert "write outside of all buffers: y0 + 4096 bytes" in relu_report("y0[i + 1] = x0[i];", checked)


def test_write_just_past_the_end_of_a_small_buffer() -> None:
    assert "a write just outside of y0, which has 16 bytes" in relu_report("y0[i + 1] = x0[i];", False, n=4)


@MODES
def test_write_to_a_constant_parameter(checked: bool) -> None:
    assert "write to the read-only x0 + 0 bytes" in relu_report("y0[i] = 0.0f; ((float*)x0)[i] = 1.0f;", checked)


@MODES
@pytest.mark.parametrize(
    ("old", "new", "what", "line"),
    [
        ("(y0 + i) =", "(y0 + i + 1) =", "write of 16 bytes: y0 + 4", 7),
        ("(x0 + i);", "(x0 + i + 2);", "read of 16 bytes: x0 + 8", 6),
    ],
)
def test_misaligned_vector(checked: bool, old: str, new: str, what: str, line: int) -> None:
    library = compile_source(changed(samples.WIDE, old, new), checked)
    report = report_of(library, "twice", 1, 64, 0, [floats(512), floats(512), 256])
    assert "thread 0: " in report and f"line {line}" in report
    assert f"misaligned {what} bytes" in report


@MODES
def test_misaligned_copy(checked: bool) -> None:
    text = changed(samples.gemm("f16"), "copy_async_16(to, a +", "copy_async_16(to, a + 1 +")
    a, b, _ = operands("f16", 33, 32, 64)
    report = report_of(compile_source(text, checked), "gemm_f16", 1, 64, 8192, [a, b, floats(32, 32), 32, 32, 64])
    assert "misaligned source of an asynchronous copy of 16 bytes: a + 2 bytes" in report


@MODES
def test_copy_from_outside_of_the_buffer(checked: bool) -> None:
    a, b, _ = operands("f16", 32, 32, 128)
    # A row more than there is; the copy is made, and found, at the wait, but named where it was asked for.
    text = changed(samples.gemm("f16"), "from, row + r < m", "from + k, true")
    report = report_of(compile_source(text, checked), "gemm_f16", 1, 64, 8192, [a, b, floats(32, 32), 32, 32, 128])
    assert "read outside of all buffers: a + 8192 bytes (a has 8192)" in report and "copy_async_16(to, a +" in report


@MODES
def test_too_little_shared_memory(checked: bool) -> None:
    a, b, _ = operands("f16", 32, 32, 64)
    arguments = [a, b, floats(32, 32), 32, 32, 64]
    report = report_of(compile_source(samples.gemm("f16"), checked), "gemm_f16", 1, 64, 2048, arguments)
    assert "asynchronous copy of 16 bytes at shared memory +2048 (of 2048 bytes)" in report


@MODES
def test_write_past_the_shared_memory(checked: bool) -> None:
    library = compile_source(changed(samples.NEIGHBOURS, "row[thread] = x0", "row[thread + 32] = x0"), checked)
    report = report_of(library, "neighbours", 1, 64, 256, [floats(64), floats(64)])
    assert "shared memory +256 (of 256 bytes)" in report


BESIDE = """
extern "C" __global__ void __launch_bounds__(32) where(long long* y0) { y0[0] = (long long)shared_memory(); }
extern "C" __global__ void __launch_bounds__(32) write_behind(float* y0) { y0[4] = 1.0f; }
"""


@pytest.mark.parametrize("shared_bytes", [0, 256])
def test_a_buffer_beside_the_shared_memory(shared_bytes: int) -> None:
    """The system may map a buffer right behind the shared memory, which is none for many a kernel: CI met both."""
    library = compile_source(BESIDE, True)
    shared = np.zeros(1, np.int64)
    library.launch("where", 1, 1, 0, [shared])
    # Memory that is only named: the write is reported before it is made.
    buffer = SimpleNamespace(address=int(shared[0]) + 64 * 1024, size=16, protect=lambda writable: None)
    with pytest.raises(EmulationError, match=r"write outside of all buffers: y0 \+ 16 bytes \(y0 has 16\)"):
        library._run(
            "write_behind",
            struct.pack("<Q", buffer.address),
            1,
            1,
            shared_bytes,
            (0, 1),
            [(buffer, shared, True, "y0")],
        )


def test_race_between_blocks() -> None:
    assert "data race: write, and a write by block 0, thread" in relu_report("if (thread == 0) y0[0] = x0[i];", True)


def test_race_between_threads_on_memory_of_the_grid() -> None:
    report = relu_report("y0[i] = x0[i] + y0[i ^ 1];", True)
    assert "data race: " in report and "y0 + " in report


def test_update_that_is_not_atomic() -> None:
    text = changed(samples.SCATTER, "atomic_add(sums + places[i], values[i]);", "sums[places[i]] += values[i];")
    zeros = [np.zeros(7, dtype) for dtype in (np.float32, np.int8, np.float16, np.int64)]
    arguments = [np.zeros(256, np.int32), np.ones(256, np.float32), *zeros, 256]
    report = report_of(compile_source(text, checked=True), "scatter", 2, 128, 0, arguments)
    assert "data race: read, and a write by block 0, thread 0" in report and "sums + 0 bytes" in report


@MODES
def test_division_by_zero(checked: bool) -> None:
    assert "a division of integers by zero" in relu_report("y0[i] = x0[i] + (float)(n / (i - 5));", checked)


def test_text_that_does_not_compile() -> None:
    with pytest.raises(EmulationError, match=r"kernels\.cu:9:.*undeclared|not declared"):
        compile_source(changed(samples.RELU, "x0[i], 0.0f", "x1[i], 0.0f"))


def test_arguments_that_do_not_fit() -> None:
    library = compile_source(samples.RELU)
    with pytest.raises(TypeError, match="x0 points to float, an array of float64"):
        library.launch("relu", 1, 256, 0, [np.zeros(4), floats(4), 4])
    with pytest.raises(TypeError, match="takes 3 arguments"):
        library.launch("relu", 1, 256, 0, [floats(4), floats(4)])
