"""Kernels rendered to CUDA C compute what the kernel language means; the text is one that people can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from emulator import harness
from kernel_interpreter import MATH, run_kernel
from native_kernel import FLOATS, INTEGERS, arithmetic, kernel, samples
from onnxc.backends.cuda.launch import launch_of
from onnxc.backends.cuda.source import render_kernel
from onnxc.ir import loops as k
from onnxc.ir import scalars as s
from onnxc.ir.dims import Dim, dim_max, dim_min, floordiv, modulo, symbol
from onnxc.ir.dtypes import BF16, BOOL, F16, F32, F64, I64, DType
from onnxc.ir.errors import UnsupportedError
from onnxc.ir.scalars import Buffer, Scalar, load

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="kernels are emulated by g++, which is not there")


def check(
    made: k.Kernel, sizes: dict[str, int] | None = None, tolerance: dict[str, float] | None = None, **buffers: Any
) -> None:
    """Asserts that the emulated kernel writes what the interpreter does."""
    expected = {name: array.copy() for name, array in buffers.items()}
    run_kernel(made, expected, sizes, fused=True)
    found = {name: array.copy() for name, array in buffers.items()}
    launch = launch_of(made)
    library = harness.compile_source(render_kernel(made))
    arguments = [*(found[p.name] for p in made.parameters), *((sizes or {})[name] for name in made.sizes)]
    library.launch(made.name, 1, launch.threads, launch.shared_bytes, arguments)
    for name in made.outputs:
        wanted = expected[name]
        kind = np.float32 if wanted.dtype == BF16.numpy else wanted.dtype
        ulps = (tolerance or {}).get(name, 0)
        if ulps:
            space = np.spacing(np.abs(wanted.astype(np.float64)).astype(kind)).astype(np.float64)
            far = np.abs(found[name].astype(np.float64) - wanted.astype(np.float64)) > ulps * space
            both_nan = np.isnan(found[name].astype(np.float64)) & np.isnan(wanted.astype(np.float64))
            assert not (far & ~both_nan & ~(found[name] == wanted)).any(), (name, found[name][far], wanted[far])
        else:
            np.testing.assert_array_equal(found[name].astype(kind), wanted.astype(kind), err_msg=f"{name}: {made}")


def check_expressions(values: Sequence[Scalar], ulps: float = 0, **inputs: Any) -> None:
    """Checks expressions of constant offsets, each stored to an output of its own."""
    outputs = [Buffer(f"y{i}", value.dtype, value.lanes) for i, value in enumerate(values)]
    loads = {part.buffer.name: part.buffer for v in values for part in s.walk(v) if isinstance(part, s.Load)}
    stores = [k.Store(output, 0, value) for output, value in zip(outputs, values, strict=True)]
    made = kernel(stores, *outputs, *loads.values(), outputs=len(outputs))
    results = {o.name: np.zeros(v.lanes, v.dtype.numpy) for o, v in zip(outputs, values, strict=True)}
    tolerance = dict.fromkeys(results, ulps)
    check(made, None, tolerance, **results, **{name: inputs[name] for name in loads})


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, BOOL], ids=str)
def test_arithmetic(dtype: DType) -> None:
    check_expressions(arithmetic(dtype, 1, 4, 64), a=samples(dtype, 64), b=samples(dtype, 64, 1))


def test_casts() -> None:
    values: list[Scalar] = []
    inputs = {}
    for source in (*FLOATS, *INTEGERS, BOOL):
        buffer = Buffer(f"x_{source}", source, 16)
        random = np.random.default_rng(3)
        low, high = (-100, 100) if source.kind in ("float", "int") else (0, 200 if source.kind == "uint" else 2)
        whole = random.integers(low, high, 16)
        inputs[buffer.name] = (whole + random.random(16) if source.is_float else whole).astype(source.numpy)
        for wanted in (*FLOATS, *INTEGERS, BOOL):
            if wanted != source and not (source.is_float and wanted.kind == "uint"):
                values.append(s.cast(load(buffer, 0, 16), wanted))
    check_expressions(values, **inputs)


def test_floats_become_narrow_integers_as_on_a_cpu() -> None:
    x = Buffer("x", F32, 8)
    values = [s.cast(load(x, 0, 8), dtype) for dtype in INTEGERS]
    check_expressions(values, x=np.array([-1.5, -0.5, 0.5, 1.5, 100.7, 3.0, 0.0, 7.99], np.float32))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_mathematical_functions(dtype: DType) -> None:
    x = Buffer("x", dtype, 32)
    values = [s.unary(op, load(x, 0, 32)) for op in MATH]
    numbers = np.concatenate([np.linspace(-0.99, 0.99, 24), [0, 1.5, -3, 20, -20, np.inf, -np.inf, np.nan]])
    check_expressions(values, ulps=4, x=numbers.astype(dtype.numpy))


def test_half_values_survive_and_round_once() -> None:
    for dtype in (F16, BF16):
        every = np.arange(65536, dtype=np.uint16).view(dtype.numpy)
        x, y, z = Buffer("x", dtype, 65536), Buffer("y", F32, 65536), Buffer("z", dtype, 65536)
        i = k.index_symbol("i", 65536)
        body = [k.For("i", 65536, (k.Store(y, i, s.cast(load(x, i), F32)), k.Store(z, i, load(x, i))))]
        made = kernel(body, y, z, x, outputs=2)
        library = harness.compile_source(render_kernel(made))
        wide, same = np.zeros(65536, np.float32), np.zeros(65536, dtype.numpy)
        library.launch("k", 1, 1, 0, [wide, same, every])
        np.testing.assert_array_equal(wide, every.astype(np.float32))
        np.testing.assert_array_equal(same.view(np.uint16), every.view(np.uint16))


N = symbol("n", 0, 1000)
DIMS: dict[str, Dim] = {
    "floor": floordiv(N - 7, 3),
    "remainder": modulo(N - 20, 6),
    "smallest": dim_min(N, 10, 3 * N - 4),
    "largest": dim_max(N - 5, 0),
    "product": N * N - 2 * N + 1,
    "by_size": floordiv(100, N),
}


@pytest.mark.parametrize("n", [0, 1, 5, 11])
def test_index_arithmetic(n: int) -> None:
    y = Buffer("y", I64, len(DIMS))
    stores = [k.Store(y, position, s.index(dim)) for position, dim in enumerate(DIMS.values())]
    if n == 0:
        stores = stores[:-1]
    check(kernel(stores, y, sizes=("n",)), {"n": n}, y=np.zeros(len(DIMS), np.int64))


def test_control_flow_and_private_memory() -> None:
    x, y = Buffer("x", F32, N), Buffer("y", F32, N)
    total, count = Buffer("total", F32, 1, "register"), Buffer("count", I64, 1, "register")
    scratch = Buffer("scratch", F32, 8, "stack")
    i, j = k.index_symbol("i", N), k.index_symbol("j", 8)
    body = [
        k.Define(total, s.const(0.0)),
        k.Alloc(scratch),
        k.For("j", 8, (k.Store(scratch, j, s.cast(s.index(j), F32)),), "unrolled"),
        k.For("i", N, (k.Store(total, 0, load(total, 0) + load(x, i)),)),
        k.Define(count, s.const(0, I64)),
        k.While(
            s.binary("lt", load(count, 0), s.index(N)),
            (
                k.Let("at", load(count, 0)),
                k.If(
                    load(x, symbol("at", 0, N - 1)) < 0.0,
                    (k.Store(y, symbol("at", 0, N - 1), load(total, 0)),),
                    (k.Store(y, symbol("at", 0, N - 1), load(scratch, modulo(symbol("at", 0, N - 1), 8))),),
                ),
                k.Store(count, 0, s.binary("add", load(count, 0), s.const(1, I64))),
            ),
        ),
    ]
    x_values = np.random.default_rng(0).integers(-9, 9, 21).astype(np.float32)
    check(kernel(body, y, x, sizes=("n",)), {"n": 21}, x=x_values, y=np.zeros(21, np.float32))


def test_loads_that_a_condition_forbids_are_not_made() -> None:
    x, y = Buffer("x", F32, N), Buffer("y", F32, N + 4)
    i = k.index_symbol("i", N + 4)
    inside = s.binary("and", s.index(2) <= s.index(i), s.binary("lt", s.index(i - 2), s.index(N)))
    value = s.select(inside, s.unary("exp", load(x, i - 2)), s.const(-1.0))
    made = kernel([k.For("i", N + 4, (k.Store(y, i, value),))], y, x, sizes=("n",))
    check(made, {"n": 3}, {"y": 2}, x=np.ones(3, np.float32), y=np.zeros(7, np.float32))


def test_aligned_vectors_are_single_accesses() -> None:
    x, y = Buffer("x", F16, 64), Buffer("y", F32, 64)
    wide = s.cast(load(x, 0, 16, aligned=True), F32)
    made = kernel([k.Store(y, 0, wide, aligned=True)], y, x)
    text = render_kernel(made)
    assert text.count("Pack<f16, 8>*") == 2 and text.count("Pack<float, 4>*") == 4
    values = np.random.default_rng(1).standard_normal(64).astype(np.float16)
    check(made, None, x=values, y=np.zeros(64, np.float32))


def test_kernels_with_a_grid_and_threads() -> None:
    x, y = Buffer("x", F32, N), Buffer("y", F32, N)
    rows = floordiv(N + 127, 128)
    number = k.index_symbol("tile", rows) * 128 + k.index_symbol("thread", 128)
    at = symbol("at", 0, N - 1)
    inside = s.binary("lt", s.index(symbol("at", 0)), s.index(N))
    body = (k.Let("at", number), k.If(inside, (k.Store(y, at, load(x, at) * 2.0),)))
    made = kernel([k.For("tile", rows, (k.For("thread", 128, body, "block"),), "grid")], y, x, sizes=("n",))
    made = replace(made, name="twice", origin=("scale", "also"))
    text = render_kernel(made)
    assert text == (
        '// from "scale", "also"\n'
        'extern "C" __global__ void __launch_bounds__(128)\n'
        "twice(float* __restrict__ y, const float* __restrict__ x, int n)\n"
        "{\n"
        "    const int tile = blockIdx.x;\n"
        "    const int thread = threadIdx.x;\n"
        "    const int at = thread + tile * 128;\n"
        "    if (at < n) {\n"
        "        y[at] = x[at] * 2.0f;\n"
        "    }\n"
        "}\n"
    )
    values, result = np.arange(300, dtype=np.float32), np.zeros(300, np.float32)
    harness.compile_source(text).launch("twice", 3, 128, 0, [result, values, 300])
    np.testing.assert_array_equal(result, values * 2)


def test_large_buffers_have_wide_indices() -> None:
    x, y = Buffer("x", F32, 1 << 32), Buffer("y", F32, 1 << 32)
    i = k.index_symbol("i", 1 << 32)
    made = kernel([k.For("i", 1 << 32, (k.Store(y, i, load(x, i)),))], y, x)
    assert launch_of(made).index_bits == 64
    assert "for (i64 i = 0; i < 4294967296; ++i)" in render_kernel(made)


def test_types_without_arithmetic_are_refused() -> None:
    x = Buffer("x", DType("f8e4m3fn", 17, 8, "float"), 4)
    with pytest.raises(UnsupportedError, match="f8e4m3fn"):
        render_kernel(kernel([k.Store(x, 0, load(x, 1))], x))
