"""Rendered kernels compute what the kernel language means, on every level of the host's architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_interpreter import run_kernel
from native_kernel import (
    FLOATS,
    HOST,
    INTEGERS,
    RUNNABLE,
    N,
    V,
    X,
    Y,
    arithmetic,
    f32,
    kernel,
    run_native,
    samples,
)
from onnxc.backends.cpu.llvm import render_kernel
from onnxc.ir import loops as k
from onnxc.ir import scalars as s
from onnxc.ir.dims import Dim, dim_max, dim_min, floordiv, modulo, symbol
from onnxc.ir.dtypes import BF16, BOOL, BY_NAME, F16, F32, F64, I8, I16, I32, I64, U8, U16, U32, U64, DType
from onnxc.ir.errors import UnsupportedError
from onnxc.ir.scalars import Buffer, Scalar, load
from onnxc.ir.target import Target

targets = pytest.mark.parametrize("target", RUNNABLE, ids=str)


def assert_same(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], message: str = "") -> None:
    """Equality of every element, NaN equal to NaN in the narrow types too."""
    if found.dtype == BF16.numpy:
        found, expected = found.astype(np.float32), expected.astype(np.float32)
    np.testing.assert_array_equal(found, expected, err_msg=message)


def check(kernel: k.Kernel, target: Target, sizes: dict[str, int] | None = None, **buffers: Any) -> None:
    """Asserts that the compiled kernel writes what the interpreter does."""
    expected = {name: array.copy() for name, array in buffers.items()}
    run_kernel(kernel, expected, sizes, fused=target.fma)
    for at_start in (False, True):
        found = {name: array.copy() for name, array in buffers.items()}
        run_native(kernel, found, sizes, target, at_start=at_start)
        for name in kernel.outputs:
            assert_same(found[name], expected[name], f"{target}: {kernel}")


def check_expressions(values: Sequence[Scalar], target: Target, **inputs: Any) -> None:
    """Checks expressions of constant offsets, each stored to an output of its own."""
    outputs = [Buffer(f"y{i}", value.dtype, value.lanes) for i, value in enumerate(values)]
    loads = {part.buffer.name: part.buffer for v in values for part in s.walk(v) if isinstance(part, s.Load)}
    stores = [k.Store(output, 0, value) for output, value in zip(outputs, values, strict=True)]
    made = kernel(stores, *outputs, *loads.values(), outputs=len(outputs))
    results = {
        output.name: np.zeros(value.lanes, value.dtype.numpy) for output, value in zip(outputs, values, strict=True)
    }
    check(made, target, **results, **{name: inputs[name] for name in loads})


@targets
@pytest.mark.parametrize("dtype", [F32, F64, *INTEGERS, BOOL], ids=str)
def test_arithmetic(dtype: DType, target: Target) -> None:
    check_expressions(arithmetic(dtype, 1, 4, 64), target, a=samples(dtype, 64), b=samples(dtype, 64, 1))


@targets
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_half_arithmetic_rounds_where_it_is_stored(dtype: DType, target: Target) -> None:
    check_expressions(arithmetic(dtype, 1, 4, 16), target, a=samples(dtype, 64), b=samples(dtype, 64, 1))


@targets
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_all_half_values_convert_exactly(dtype: DType, target: Target) -> None:
    every = np.arange(65536, dtype=np.uint16).view(dtype.numpy)
    x, y, z = Buffer("x", dtype, 65536), Buffer("y", F32, 65536), Buffer("z", dtype, 65536)
    i = k.index_symbol("i", 65536)
    body = [k.For("i", 65536, (k.Store(y, i, s.cast(load(x, i, 8), F32)), k.Store(z, i, load(x, i, 8))), step=8)]
    found = {"x": every, "y": np.zeros(65536, np.float32), "z": np.zeros(65536, dtype.numpy)}
    run_native(kernel(body, y, z, x, outputs=2), found, target=target)
    np.testing.assert_array_equal(found["y"], every.astype(np.float32))
    np.testing.assert_array_equal(found["z"].view(np.uint16), every.view(np.uint16))


@targets
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("source", [F32, F64], ids=str)
def test_rounding_to_half_is_to_even_and_single(source: DType, dtype: DType, target: Target) -> None:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        half = np.arange(65536, dtype=np.uint16).view(dtype.numpy).astype(np.float64)
    finite = np.sort(half[np.isfinite(half)])
    middle = (finite[1:] + finite[:-1]) / 2
    tiny = np.spacing(middle.astype(source.numpy)).astype(np.float64)
    values = np.concatenate([middle, middle + tiny, middle - tiny, middle * (1 + 2**-40)]).astype(source.numpy)
    values = np.concatenate([values, np.array([np.inf, -np.inf, np.nan, 65519.99, 65520, 1e38], source.numpy)])
    values = values[: len(values) // 8 * 8]
    n = len(values)
    x, y, i = Buffer("x", source, n), Buffer("y", dtype, n), k.index_symbol("i", n)
    body = [k.For("i", n, (k.Store(y, i, s.cast(load(x, i, 8), dtype)),), step=8)]
    found = {"x": values, "y": np.zeros(n, dtype.numpy)}
    run_native(kernel(body, y, x), found, target=target)
    with np.errstate(over="ignore"):
        expected = values.astype(dtype.numpy)
    if dtype == BF16 and source == F64:  # ml_dtypes rounds twice, by way of f32: the nearest of two neighbours instead
        wide, nearest = values.astype(np.float64), found["y"].astype(np.float64)
        regular = np.isfinite(wide) & np.isfinite(nearest)
        place = np.clip(np.searchsorted(finite, wide[regular]), 1, len(finite) - 1)
        best = np.minimum(np.abs(wide[regular] - finite[place]), np.abs(wide[regular] - finite[place - 1]))
        np.testing.assert_array_equal(np.abs(wide[regular] - nearest[regular]), best)
    else:
        assert_same(found["y"], expected)


@targets
@pytest.mark.parametrize("lanes", [1, 16])
def test_casts(lanes: int, target: Target) -> None:
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
                values.append(s.cast(load(buffer, 0, lanes), wanted))
    check_expressions(values, target, **inputs)


@targets
def test_floats_wrap_into_narrow_integers(target: Target) -> None:
    x = np.array([300.7, -300.7, 70000.0, -1.0, 255.9, 128.0, -129.0, 3e9], np.float32)
    wide = x.astype(np.int64)
    for dtype in (I8, U8, I16, U16):
        y = np.zeros(7, dtype.numpy)
        body = [k.Store(Buffer("y", dtype, 7), i, s.cast(load(Buffer("x", F32, 8), i), dtype)) for i in range(7)]
        run_native(kernel(body, Buffer("y", dtype, 7), Buffer("x", F32, 8)), {"x": x, "y": y}, target=target)
        np.testing.assert_array_equal(y, wide[:7].astype(dtype.numpy))
    big = np.array([0.0, 1.0, 3e9, 4294967040.0, 1.8e19, 9.3e18, 9.2e18, 5.5], np.float32)
    for dtype, count in ((U32, 4), (U64, 8)):
        check_expressions([s.cast(load(Buffer("x", F32, 8), 0, count), dtype)], target, x=big)


@targets
def test_float_remainder_is_exact(target: Target) -> None:
    for dtype in (F32, F64):
        a = np.concatenate([samples(dtype, 60), np.array([1e9, 7.0, -7.0, 5.5], dtype.numpy)])
        b = np.concatenate([samples(dtype, 60, 5), np.array([0.3, 0.1, 0.7, np.inf], dtype.numpy)])
        values = [s.binary("rem", load(Buffer("a", dtype, 64), i), load(Buffer("b", dtype, 64), i)) for i in range(64)]
        check_expressions(values, target if target.fma else HOST, a=a, b=b)


@targets
def test_select_bitcast_shuffle_vector_and_horizontal(target: Target) -> None:
    a, b, i = Buffer("a", F32, 64), Buffer("b", F32, 64), Buffer("i", I32, 64)
    x, y, n = load(a, 0, 16), load(b, 0, 16), load(i, 0, 16)
    values = [
        s.select(x < y, x, y),
        s.select(load(a, 0) < load(b, 0), x, y),
        s.bitcast(x, I32),
        s.bitcast(n, F32),
        s.bitcast(load(Buffer("h", F16, 8), 0, 8), U16),
        s.bitcast(s.bitcast(load(Buffer("h", F16, 8), 0, 8), I16), F16),
        s.Shuffle(F32, 8, x, y, (0, 17, 2, 19, 31, 5, 5, 16)),
        s.Shuffle(F32, 1, x, y, (18,)),
        s.Shuffle(F32, 4, load(a, 3), load(b, 4), (0, 1, 1, 0)),
        s.Vector(F32, 4, (load(a, 3), s.const(2.0), load(b, 1), load(a, 0))),
        s.Vector(I64, 4, tuple(s.const(v, I64) for v in (1, -1, 2, 3))),
        s.Horizontal(BOOL, 1, "or", x < y),
        s.Horizontal(BOOL, 1, "and", x < y),
        s.widen(load(b, 7), 8) + load(a, 8, 8),
        s.binary("add", s.Lanes(I64, 16), s.const(3, I64)),
        *(s.Horizontal(I32, 1, op, n) for op in ("add", "mul", "min", "max", "and", "or")),
        *(s.Horizontal(F32, 1, op, x) for op in ("min", "max")),
        *(s.fma(load(a, 0, lanes), load(b, 0, lanes), load(a, 16, lanes)) for lanes in (1, 16)),
        *(base + s.Lanes(I64, lanes) < s.widen(limit, lanes) for lanes in (8, 64) for base, limit in LIMITS),
        *(s.Lanes(I64, lanes) < s.widen(limit, lanes) for lanes in (4, 16) for _, limit in LIMITS),
    ]
    inputs = {"a": samples(F32, 64), "b": samples(F32, 64, 1), "i": samples(I32, 64), "h": samples(F16, 8)}
    check_expressions(values, target, c=np.array([5, -9, 70, 11]), **inputs)


COUNTS = Buffer("c", I64, 4)
LIMITS = [(s.widen(load(COUNTS, 0), 1), load(COUNTS, i)) for i in (1, 2, 3)]


def test_horizontal_sums_are_trees_of_halves() -> None:
    x = np.random.default_rng(0).normal(0, 1, 8).astype(np.float32)
    tree = x
    while len(tree) > 1:
        tree = tree[: len(tree) // 2] + tree[len(tree) // 2 :]
    for target in RUNNABLE:
        y = np.zeros(1, np.float32)
        value = s.Horizontal(F32, 1, "add", load(Buffer("x", F32, 8), 0, 8))
        made = kernel([k.Store(Buffer("y", F32, 1), 0, value)], Buffer("y", F32, 1), Buffer("x", F32, 8))
        run_native(made, {"x": x, "y": y}, target=target)
        assert y[0] == tree[0]


@targets
@pytest.mark.parametrize("kind", ["serial", "parallel"])
@pytest.mark.parametrize("step", [1, 3])
def test_loops(kind: str, step: int, target: Target) -> None:
    made = kernel([k.For("v", N, (k.Store(Y, V, load(X, V) + 1.0),), kind, step)], Y, X, sizes=("n",))
    for n in (0, 1, 2, 100):
        check(made, target, {"n": n}, x=f32(n), y=np.zeros(n, np.float32))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_parallel_body_takes_what_it_needs_from_outside(threads: int) -> None:
    factor, stack = Buffer("factor", F32, 2, "register", 4), Buffer("stack", F32, 4, "stack")
    row, out = Buffer("row", F32, N), Buffer("out", F32, N)
    outer, shift = k.index_symbol("o", 3), symbol("shift", 0)
    body = [
        k.Alloc(factor),
        k.Alloc(stack),
        k.Store(factor, 1, load(Buffer("f", F32, 4), 0, 4)),
        k.Store(stack, 0, s.const(10.0)),
        k.For(
            "o",
            3,
            (
                k.Let("shift", outer * N),
                k.Alias(row, X, shift),
                k.Alias(out, Y, shift * 4),
                k.For(
                    "v",
                    N,
                    (
                        k.For("inner", 2, (k.Store(stack, 1, load(stack, 0)),), "parallel"),
                        k.Store(out, 4 * V, s.fma(load(row, V), load(factor, 1, 4), s.widen(load(stack, 0), 4))),
                        k.Store(Y, 4 * (shift + V), load(Y, 4 * (shift + V)) + s.cast(s.index(outer), F32)),
                    ),
                    "parallel",
                ),
            ),
        ),
    ]
    x, y = Buffer("x", F32, 3 * N), Buffer("y", F32, 12 * N)
    made = kernel(body, y, x, Buffer("f", F32, 4), sizes=("n",))
    buffers = {"x": f32(300), "y": np.zeros(1200, np.float32), "f": f32(4, seed=1)}
    expected = {name: array.copy() for name, array in buffers.items()}
    run_kernel(made, expected, {"n": 100}, fused=HOST.fma)
    run_native(made, buffers, {"n": 100}, threads=threads)
    np.testing.assert_array_equal(buffers["y"], expected["y"])


@targets
def test_statements(target: Target) -> None:
    """Let, While, If, Alias with another place, unrolled loops, registers with predicates, bools in memory."""
    i, j, double, chosen = symbol("i", 0, 19), symbol("j", 0, 3), symbol("double"), symbol("chosen")
    x, z, c, flag = Buffer("x", F32, 40), Buffer("z", F32, 80), Buffer("c", I64, 20), Buffer("flag", BOOL, 20)
    count, pair = Buffer("count", I64, 1, "register"), Buffer("pair", F32, 2, "register", 2)
    pointer, zeros = Buffer("pointer", F32, 4), Buffer("zeros", F32, 8)
    odd = s.index(modulo(i, 2)).equal(1)
    body = (
        k.Let("double", 2 * i),
        k.Let("chosen", load(c, i)),
        k.Define(count, s.const(0, I64)),
        k.While(load(count, 0) * load(count, 0) < s.index(i), (k.Store(count, 0, load(count, 0) + 1),)),
        k.If(odd, (k.Store(Y, i, s.cast(load(count, 0), F32)),), (k.Store(Y, i, load(x, double)),)),
        k.If(odd & load(flag, i), (k.Store(Y, i, s.const(-1.0)),)),
        k.Alias(pointer, x, 2 * i - 8, s.const(3, I64) < s.index(i), zeros),
        k.Alloc(pair),
        k.For("j", 4, (k.Store(pair, floordiv(j, 2), load(pointer, j, 2)),), "unrolled", 2),
        k.Store(z, 4 * i, load(pair, 0, 2) + load(pair, 1, 2)),
        k.Store(pair, 0, s.const(7.0, F32, 2), s.Vector(BOOL, 2, (odd, ~odd))),
        k.Store(pair, 1, s.const(9.0, F32, 2), s.widen(odd, 2)),
        k.Store(z, 4 * i + 2, load(pair, 0, 2) + load(pair, 1, 2)),
        k.Store(flag, i, load(x, chosen) < load(x, i), s.index(i) < 15),
    )
    made = kernel([k.For("i", 20, body)], Y, z, flag, x, c, zeros, outputs=3)
    made = k.Kernel(made.name, (replace(Y, size=20), *made.parameters[1:]), made.outputs, (), made.body)
    check(
        made,
        target,
        y=np.zeros(20, np.float32),
        z=np.zeros(80, np.float32),
        flag=samples(BOOL, 20),
        x=f32(40),
        c=np.arange(20)[::-1].copy(),
        zeros=np.zeros(8, np.float32),
    )


@targets
@pytest.mark.parametrize("dtype", [F32, I8, BOOL], ids=str)
def test_strided_and_masked_accesses(dtype: DType, target: Target) -> None:
    """Each access touches the first or the last element of its memory, and nothing beyond."""
    for lanes in (4, 16):
        for stride in (1, 2, 3, 4, 5, -1, -2, 0):
            span = abs(stride) * (lanes - 1) + 1
            first = span - 1 if stride < 0 else 0
            x, y, m = Buffer("x", dtype, span), Buffer("y", dtype, lanes * 6), Buffer("m", BOOL, lanes)
            step = Buffer("step", I64, 1)
            dynamic = symbol("stride", -5)
            mask, one = load(m, 0, lanes), load(m, 0)
            body = [
                k.Let("stride", load(step, 0)),
                k.Store(y, 0, load(x, first, lanes, None, stride)),
                k.Store(y, lanes, load(x, first, lanes, mask, stride)),
                k.Store(y, 2 * lanes, load(x, first, lanes, s.widen(one, lanes), stride)),
                k.Store(y, 3 * lanes, load(x, first, lanes, s.widen(~one, lanes), dynamic)),
                k.Store(y, 4 * lanes, load(x, first, lanes, None, dynamic)),
            ]
            if stride:
                z = Buffer("z", dtype, span)
                body += [k.Store(z, first, load(x, first, lanes, None, stride), None, stride)]
                body += [k.Store(z, first, load(x, 0, lanes), mask, stride)]
                body += [k.Store(z, first, load(x, 0, lanes), mask, dynamic)]
            else:
                z = Buffer("z", dtype, 1)
            check(
                kernel(body, y, z, x, m, step, outputs=2),
                target,
                x=samples(dtype, max(span, 1)) if stride else samples(dtype, 1),
                y=np.zeros(lanes * 6, dtype.numpy),
                z=np.zeros(z.size, dtype.numpy),
                m=samples(BOOL, lanes, stride + 5),
                step=np.array([stride]),
            )


@targets
def test_predicates_keep_loads_inside_memory(target: Target) -> None:
    """A row padded on both sides: the masked lanes, and scalars whose predicate is false, lie outside of it."""
    x, y = Buffer("x", F32, 10), Buffer("y", F32, 16)
    position = s.index(V - 3) + s.Lanes(I64, 16)
    inside = (s.const(-1, I64, 16) < position) & (position < s.const(10, I64, 16))
    scalar = (s.const(-1, I64) < s.index(V - 3)) & (s.index(V - 3) < s.const(10, I64))
    body = [
        k.For("v", 1, (k.Store(y, 0, load(x, V - 3, 16, inside)),)),
        k.For("v", 16, (k.Store(y, V, load(y, V) + load(x, V - 3, 1, scalar)),)),
        k.For("v", 16, (k.Store(y, V + 3, load(x, V), s.index(V) < 10),)),
    ]
    check(kernel(body, y, x), target, x=f32(10), y=np.zeros(16, np.float32))


@targets
@pytest.mark.parametrize("lanes", [1, 8])
def test_selects_do_not_read_what_they_do_not_choose(lanes: int, target: Target) -> None:
    x, w, y = Buffer("x", F32, 8), Buffer("w", F32, 16), Buffer("y", F32, 24)
    order = Buffer("order", I64, 4)
    i = k.index_symbol("i", 24 // lanes) * lanes
    place = s.index(i) + s.Lanes(I64, lanes) if lanes > 1 else s.index(i)

    def below(limit: int) -> Scalar:
        return place < s.const(limit, I64, lanes)

    joined = s.select(below(8), load(x, i, lanes), load(w, i - 8, lanes))
    nested = s.select(below(8), s.select(below(4), load(x, i, lanes), load(w, i, lanes)), joined)
    chosen = load(order, dim_min(floordiv(i, 8), 5))
    by_value = s.select(
        s.index(i) < 24, s.widen(load(x, s.as_dim(s.select(s.index(i) < 8, chosen, s.const(1, I64)))), lanes), joined
    )
    leaky = s.select(joined < s.const(0, F32, lanes), joined * s.const(0.1, F32, lanes), joined)
    safe = s.as_dim(s.select(s.index(i) < 24, chosen, load(order, i)))  # order ends at 4
    made = kernel([k.For("i", 24 // lanes, (k.Store(y, safe, joined),))], y, x, w, order)
    check(made, target, x=f32(8), w=f32(16, seed=1), y=np.zeros(24, np.float32), order=np.array([3, 2, 1, 0]))
    for value in (joined, nested, by_value, leaky):
        made = kernel([k.For("i", 24 // lanes, (k.Store(y, i, value),))], y, x, w, order)
        check(made, target, x=f32(8), w=f32(16, seed=1), y=np.zeros(24, np.float32), order=np.array([3, 2, 1, 0]))


def test_a_load_made_anyway_is_not_guarded() -> None:
    x = load(X, V, 16)
    leaky = s.select(x < s.const(0, F32, 16), x * s.const(0.1, F32, 16), load(X, V, 16))
    text = render_kernel(kernel([k.For("v", N, (k.Store(Y, V, leaky),), step=16)], Y, X, sizes=("n",)), HOST)
    assert "masked" not in text


def test_guards_do_not_multiply_with_depth() -> None:
    value = load(X, V, 1, load(Buffer("m", BOOL, N), V))
    for depth in range(40):
        value = s.select(load(Buffer("m", BOOL, N), V + depth), value + 1.0, value)
    text = render_kernel(
        kernel([k.For("v", N, (k.Store(Y, V, value),))], Y, X, Buffer("m", BOOL, N), sizes=("n",)), HOST
    )
    assert len(text.splitlines()) < 1000


dims = st.deferred(
    lambda: st.one_of(
        st.integers(-3, 20),
        st.sampled_from([symbol("a"), symbol("b"), symbol("c", None)]),
        st.builds(lambda x, y: x + y, dims, dims),
        st.builds(lambda x, y: x - y, dims, dims),
        st.builds(lambda x, y: x * y, dims, st.one_of(st.integers(-3, 4), st.just(symbol("a")))),
        st.builds(floordiv, dims, st.one_of(st.integers(1, 9), st.just(symbol("b", 1)))),
        st.builds(modulo, dims, st.integers(1, 9)),
        st.builds(dim_min, dims, dims),
        st.builds(dim_max, dims, dims),
    )
)


@settings(deadline=None, max_examples=40)
@given(st.lists(dims, min_size=1, max_size=8), st.integers(0, 9), st.integers(1, 9), st.integers(-9, 9))
def test_index_arithmetic(found: list[Dim], a: int, b: int, c: int) -> None:
    out = Buffer("y", I64, len(found))
    stores = [k.Store(out, place, s.index(dim)) for place, dim in enumerate(found)]
    check(kernel(stores, out, sizes=("a", "b", "c")), HOST, {"a": a, "b": b, "c": c}, y=np.zeros(len(found), np.int64))


def test_a_zero_divisor_of_an_empty_shape_does_not_trap() -> None:
    out = Buffer("y", I64, 1)
    found = {"y": np.zeros(1, np.int64)}
    made = kernel([k.Store(out, 0, s.index(floordiv(symbol("a"), symbol("b"))))], out, sizes=("a", "b"))
    run_native(made, found, {"a": 7, "b": 0})


def test_what_cannot_be_rendered_is_refused() -> None:
    narrow = Buffer("x", BY_NAME["i4"], 4)
    with pytest.raises(UnsupportedError, match="i4"):
        render_kernel(kernel([k.Store(narrow, 0, load(narrow, 1))], narrow), HOST)
    with pytest.raises(AssertionError, match="exp must be expanded"):
        render_kernel(kernel([k.Store(Y, 0, s.unary("exp", load(X, 0)))], Y, X), HOST)
    with pytest.raises(AssertionError, match="vector loop"):
        render_kernel(kernel([k.For("v", 4, (), "vector")], Y), HOST)
    with pytest.raises(AssertionError, match="no constant size"):
        render_kernel(kernel([k.Alloc(Buffer("s", F32, N, "stack"))], Y, sizes=("n",)), HOST)


def test_names_of_any_kind() -> None:
    names = 'a/b:0"\\', "größe", "5x", ".6"
    x, y = Buffer(names[0], F32, 4), Buffer(names[2], F32, 4)
    body = [k.For(names[3], symbol(names[1]), (k.Store(y, symbol(names[3]), load(x, symbol(names[3]))),))]
    made = k.Kernel("fused conv/1", (y, x), (y.name,), (names[1],), tuple(body))
    found = {y.name: np.zeros(4, np.float32), x.name: f32(4)}
    run_native(made, found, {names[1]: 4})
    np.testing.assert_array_equal(found[y.name], found[x.name])
