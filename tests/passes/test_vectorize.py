"""Vectorised kernels compute what the scalar ones do, for every width, extent and kind of access."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_interpreter import run_kernel
from native_kernel import RUNNABLE, run_native
from onnxc.ir import loops
from onnxc.ir import scalars as s
from onnxc.ir.dims import Dim, dim_max, dim_min, evaluate, symbol
from onnxc.ir.dtypes import BOOL, F32, F64, I32, I64, U8, DType
from onnxc.ir.loops import Alias, Alloc, Define, For, If, Kernel, Let, Store
from onnxc.ir.scalars import Buffer, Scalar, load
from onnxc.ir.target import Target
from onnxc.passes.vectorize import Vectors, vectorize

V = symbol("v")
WIDTHS = [Vectors(128), Vectors(256), Vectors(512), Vectors(512, masked=True), Vectors(256, unroll=1, masked=True)]


def kernel(body: Sequence[loops.Statement], *buffers: Buffer, outputs: int = 1, sizes: tuple[str, ...] = ()) -> Kernel:
    """A kernel that writes the first `outputs` buffers."""
    return Kernel("k", buffers, tuple(buffer.name for buffer in buffers[:outputs]), sizes, tuple(body))


def arrays(original: Kernel, sizes: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Small whole numbers: sums of them are exact in any order."""
    random = np.random.default_rng(seed)
    found = {}
    for buffer in original.parameters:
        size = evaluate(buffer.size, sizes)
        low = 0 if buffer.dtype.kind in ("uint", "bool") else -4
        high = 2 if buffer.dtype == BOOL else 5
        found[buffer.name] = random.integers(low, high, size).astype(buffer.dtype.numpy)
    return found


def same(original: Kernel, vectors: Vectors, sizes: Mapping[str, int] | None = None, **fixed: np.ndarray) -> str:
    """Asserts that both forms of a kernel write the same; the vectorised text. `fixed` are given contents."""
    vectorised = vectorize(original, vectors)
    sizes = sizes or {}
    expected = {**arrays(original, sizes), **fixed}
    found = {name: array.copy() for name, array in expected.items()}
    run_kernel(original, expected, sizes)
    run_kernel(vectorised, found, sizes)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=str(vectorised))
    return str(vectorised)


def elementwise(
    extent: Dim, value: Callable[[Scalar], Scalar], dtype: DType = F32, sizes: tuple[str, ...] = ()
) -> Kernel:
    x, y = Buffer("x", dtype, extent), Buffer("y", dtype, extent)
    store = Store(y, V, value(load(x, V)))
    return kernel([For("v", extent, (store,), "vector")], y, x, sizes=sizes)


@pytest.mark.parametrize("vectors", WIDTHS)
@pytest.mark.parametrize("extent", [0, 1, 3, 4, 7, 8, 16, 20, 31, 100])
def test_elementwise_of_constant_extent(extent: int, vectors: Vectors) -> None:
    text = same(elementwise(extent, lambda x: x * x + 1), vectors)
    assert "vector for" not in text
    assert (extent < 4) or " : 4]" in text or " : 8]" in text or f" : {vectors.bits // 32}" in text


@pytest.mark.parametrize("vectors", WIDTHS)
@pytest.mark.parametrize("extent", [0, 1, 5, 15, 16, 17, 64, 131])
def test_elementwise_of_symbolic_extent(extent: int, vectors: Vectors) -> None:
    text = same(elementwise(symbol("n"), lambda x: x * x + 1, sizes=("n",)), vectors, {"n": extent})
    assert f" : {vectors.bits // 32}" in text


def test_bytes_use_all_lanes() -> None:
    assert "x[128*v+64 : 64]" in same(elementwise(640, lambda x: s.binary("max", x, s.const(3, U8)), U8), Vectors(512))


def test_a_step_covers_a_flat_index_that_is_split() -> None:
    """v // 64 is the same in all lanes of a step, so the channel's bias is a scalar."""
    x, y, bias = Buffer("x", F32, 640), Buffer("y", F32, 640), Buffer("bias", F32, 10)
    body = [For("v", 640, (Store(y, V, load(x, V) + load(bias, V // 64)),), "vector")]
    assert "bias[floordiv(v, 2)]" in same(kernel(body, y, x, bias), Vectors(512, unroll=1))


@pytest.mark.parametrize("vectors", WIDTHS)
@pytest.mark.parametrize(
    "offset", [V * 3, V * symbol("n"), 49 - V, V // 3, (V * 7) % 50, dim_min(V + 5, 30), V * 0 + 2]
)
def test_accesses(offset: Dim, vectors: Vectors) -> None:
    x, y, z = Buffer("x", F32, 250), Buffer("y", F32, 50), Buffer("z", F32, 50)
    value = (load(x, offset) + 1) * load(z, V) - load(z, 49 - V)
    same(kernel([For("v", 50, (Store(y, 49 - V, value),), "vector")], y, x, z, sizes=("n",)), vectors, {"n": 5})


@pytest.mark.parametrize("vectors", WIDTHS)
def test_index_values(vectors: Vectors) -> None:
    y = Buffer("y", I64, 45)
    value = s.index(V * 3 + 2) * s.index(V // 4) + s.index(dim_max(V, 20)) - s.index(V * V)
    same(kernel([For("v", 45, (Store(y, V, value),), "vector")], y), vectors)


@pytest.mark.parametrize("vectors", WIDTHS)
def test_gather_by_loaded_index(vectors: Vectors) -> None:
    table, rows, y = Buffer("table", F32, 40), Buffer("rows", I64, 37), Buffer("y", F32, 37)
    row = symbol("row", 0, 9)
    value = load(table, row * 4 + 1) * s.cast(s.index(row), F32) + load(table, row * 4 + 2)
    body = (Let("row", load(rows, V)), Store(y, V, value))
    rows_array = np.random.default_rng(1).integers(0, 10, 37)
    same(kernel([For("v", 37, body, "vector")], y, table, rows), vectors, rows=rows_array)


@pytest.mark.parametrize("vectors", WIDTHS)
def test_indices_computed_from_loaded_values(vectors: Vectors) -> None:
    """Nothing is read for lanes beyond the extent, neither elements nor what decides where they are."""
    table, rows, y = Buffer("table", F32, 40), Buffer("rows", I64, 22), Buffer("y", F32, 22)
    loaded, none = load(rows, V), s.const(-1, I64)
    row = s.select(loaded.equal(none), loaded - loaded, loaded)
    wrapped = s.select(row < 0, row + 10, row)
    element = load(table, s.as_dim(wrapped, 0, 9) * 4 + V // 8)
    value = s.select(loaded.equal(none), s.const(5.0), element + s.cast(s.index(V // 3), F32))
    rows_array = np.random.default_rng(1).integers(-10, 10, 22)
    text = same(kernel([For("v", 22, (Store(y, V, value),), "vector")], y, table, rows), vectors, rows=rows_array)
    assert "vector(" in text


@pytest.mark.parametrize("vectors", WIDTHS)
def test_padding_guards_loads(vectors: Vectors) -> None:
    """Loads outside the input are made neither by vectors nor by gathers."""
    x, y = Buffer("x", F32, 30), Buffer("y", F32, 50)
    inside = (s.index(V - 10) >= s.const(0, I64)) & (s.index(V) < s.const(40, I64))
    value = s.select(inside, load(x, V - 10) * 2 + load(x, 39 - V) + load(x, (V - 10) * (V - 10) // 31), s.const(7))
    same(kernel([For("v", 50, (Store(y, V, value),), "vector")], y, x), vectors)


def test_loads_known_to_be_inside_are_not_masked() -> None:
    x, y = Buffer("x", F32, 64), Buffer("y", F32, 64)
    value = s.select(s.const(0.0) < load(y, V), load(x, V), s.const(1.0))
    assert " if " not in same(kernel([For("v", 64, (Store(y, V, value),), "vector")], y, x), Vectors(512))


@pytest.mark.parametrize("vectors", WIDTHS)
@pytest.mark.parametrize("extent", [1, 7, 64, 200, "n"])
def test_sum_and_sum_of_squares_with_a_row_buffer(extent: Dim | str, vectors: Vectors) -> None:
    size = symbol("n") if isinstance(extent, str) else extent
    x, y, row = Buffer("x", F32, size), Buffer("y", F32, 3), Buffer("row", F32, size, "stack")
    total, squares, top = (Buffer(name, F32, 1, "register") for name in ("total", "squares", "top"))
    body: list[loops.Statement] = [
        Define(total, s.const(5.0)),
        Define(squares, s.const(0.0)),
        Define(top, s.const(-math.inf)),
        Alloc(row),
        For(
            "v",
            size,
            (
                Store(row, V, load(x, V) + 1),
                Store(total, 0, load(total, 0) + load(x, V)),
                Store(squares, 0, s.fma(load(x, V), load(x, V), load(squares, 0))),
                Store(top, 0, s.binary("max", load(row, V), load(top, 0))),
            ),
            "vector",
        ),
        Store(y, 0, load(total, 0)),
        Store(y, 1, load(squares, 0)),
        Store(y, 2, load(top, 0)),
    ]
    text = same(kernel(body, y, x, sizes=("n",)), vectors, {"n": 77})
    assert "horizontal_max" in text or extent in (1, 7)


def test_long_sums_have_independent_accumulators() -> None:
    total, x, y = Buffer("total", F32, 1, "register"), Buffer("x", F32, 1000), Buffer("y", F32, 1)
    update = Store(total, 0, load(total, 0) + load(x, V))
    body: list[loops.Statement] = [
        Define(total, s.const(0.0)),
        For("v", 1000, (update,), "vector"),
        Store(y, 0, load(total, 0)),
    ]
    text = same(kernel(body, y, x), Vectors(256))
    assert text.count("var total_lanes") == 4


@pytest.mark.parametrize("vectors", WIDTHS)
@pytest.mark.parametrize("op", ["add", "mul", "min", "max"])
def test_columns_reduced_over_rows(op: str, vectors: Vectors) -> None:
    """The kept axis is vectorised, the reduced one serial: the accumulator becomes a vector."""
    x, y, acc = Buffer("x", I32, 6 * 29), Buffer("y", I32, 29), Buffer("acc", I32, 1, "register")
    r = symbol("r")
    body = (
        Define(acc, s.const(s.IDENTITY[op](I32), I32)),
        For("r", 6, (Store(acc, 0, s.binary(op, load(acc, 0), load(x, r * 29 + V))),)),
        Store(y, V, load(acc, 0)),
    )
    assert "horizontal" not in same(kernel([For("v", 29, body, "vector")], y, x), vectors)


def test_kept_columns_take_four_registers_a_step() -> None:
    x, y, acc = Buffer("x", F32, 6 * 100), Buffer("y", F32, 100), Buffer("acc", F32, 1, "register")
    update = Store(acc, 0, load(acc, 0) + load(x, symbol("r") * 100 + V))
    body = (Define(acc, s.const(0.0)), For("r", 6, (update,)), Store(y, V, load(acc, 0)))
    assert "x[100*r : 64]" in same(kernel([For("v", 100, body, "vector")], y, x), Vectors(512))


@pytest.mark.parametrize("vectors", WIDTHS)
def test_private_arrays_and_conditions(vectors: Vectors) -> None:
    x, y, window = Buffer("x", F32, 60), Buffer("y", F32, 40), Buffer("window", F32, 4, "stack")
    r, n = symbol("r"), symbol("n")
    body = (
        Alloc(window),
        For("r", 4, (Store(window, r, load(x, V + r * 5)),)),
        If(s.index(n) < s.const(3, I64), (Store(window, 2, s.const(9.0)),), (Store(window, 1, load(x, V)),)),
        For("r", 3, (Store(window, r, load(window, r) - load(window, r + 1)),), "unrolled"),
        Store(y, V, load(window, 0) * load(window, 2)),
    )
    for size in (2, 4):
        same(kernel([For("v", 40, body, "vector")], y, x, sizes=("n",)), vectors, {"n": size})


@pytest.mark.parametrize("vectors", WIDTHS)
def test_registers_chosen_by_an_unrolled_loop(vectors: Vectors) -> None:
    x, y, acc = Buffer("x", F32, 3 * 70), Buffer("y", F32, 3), Buffer("acc", F32, 3, "register")
    r = symbol("r")
    update = For("r", 3, (Store(acc, r, load(acc, r) + load(x, r * 70 + V)),), "unrolled")
    body: list[loops.Statement] = [
        Alloc(acc),
        For("r", 3, (Store(acc, r, s.const(1.0)),), "unrolled"),
        For("v", 70, (update,), "vector"),
        For("r", 3, (Store(y, r, load(acc, r)),), "unrolled"),
    ]
    assert "horizontal_add" in same(kernel(body, y, x), vectors)


@pytest.mark.parametrize("vectors", WIDTHS)
def test_pointers(vectors: Vectors) -> None:
    x, y, row, column = Buffer("x", F32, 200), Buffer("y", F32, 40), Buffer("row", F32), Buffer("column", F32)
    body = (Alias(row, x, 40), Alias(column, x, V * 3 + 1), Store(y, V, load(row, V) + load(column, 1) * 2))
    same(kernel([For("v", 40, body, "vector")], y, x), vectors)


@pytest.mark.parametrize("vectors", WIDTHS)
def test_what_cannot_be_vectorised_stays_serial(vectors: Vectors) -> None:
    x, y, best = Buffer("x", F32, 40), Buffer("y", F32, 40), Buffer("best", F32, 1, "register")
    running = Store(best, 0, load(best, 0) + load(x, V))
    body: list[loops.Statement] = [
        Define(best, s.const(0.0)),
        For("v", 40, (running, Store(y, V, load(best, 0))), "vector"),
    ]
    assert "serial for v < 40" in same(kernel(body, y, x), vectors)
    branch = If(s.const(0.0) < load(x, V), (Store(y, V, load(x, V)),))
    assert "serial for v < 40" in same(kernel([For("v", 40, (branch,), "vector")], y, x), vectors)


def test_predicated_stores_and_steps() -> None:
    x, y = Buffer("x", F32, 100), Buffer("y", F32, 100)
    store = Store(y, V * 2, load(x, V), s.const(0.0) < load(x, V + 1))
    for vectors in WIDTHS:
        same(kernel([For("v", 49, (store,), "vector", 2)], y, x), vectors)


def test_sums_into_memory_chosen_by_an_inner_loop_stay_serial() -> None:
    x, y = Buffer("x", F32, 40), Buffer("y", F32, 3)
    j = symbol("j")
    update = Store(y, j, load(y, j) + load(x, V))
    assert "serial for v < 40" in same(kernel([For("v", 40, (For("j", 3, (update,)),), "vector")], y, x), Vectors(256))


def test_a_fixed_element_written_by_every_iteration_is_refused() -> None:
    y = Buffer("y", F32, 3)
    body = For("j", 3, (Store(y, symbol("j"), s.const(1.0)),))
    with pytest.raises(AssertionError, match="every iteration"):
        vectorize(kernel([For("v", 40, (body,), "vector")], y), Vectors(256))


def padded_window() -> Kernel:
    """Reads around the border, a reversed and a strided load, a gather, an index as value, and two reductions."""
    n = symbol("n")
    x, y, t, rows = Buffer("x", F32, n), Buffer("y", F32, n), Buffer("t", F32, 2), Buffer("rows", I64, n)
    total, top = Buffer("total", F32, 1, "register"), Buffer("top", F32, 1, "register")
    inside = (s.index(V - 2) >= s.const(0, I64)) & (s.index(V) < s.index(n - 1))
    around = s.select(inside, load(x, V - 2) + load(x, V + 1), s.const(3.0))
    gathered = load(x, s.as_dim(s.binary("max", load(rows, V), s.const(0, I64)), 0, n - 1))
    value = s.fma(around, load(x, n - 1 - V), gathered) + s.cast(s.index(V * 2 + V // 3), F32)
    body: list[loops.Statement] = [
        Define(total, s.const(0.0)),
        Define(top, s.const(-math.inf)),
        For("v", n, (Store(y, V, value), Store(total, 0, load(total, 0) + load(y, V))), "vector"),
        For("v", n // 2, (Store(top, 0, s.binary("max", load(top, 0), load(y, V * 2))),), "vector"),
        Store(t, 0, load(total, 0)),
        Store(t, 1, load(top, 0)),
    ]
    return kernel(body, y, t, x, rows, outputs=2, sizes=("n",))


@pytest.mark.parametrize("target", RUNNABLE, ids=str)
@pytest.mark.parametrize("at_start", [False, True])
def test_compiled(target: Target, at_start: bool) -> None:
    """Nothing outside the buffers is touched: they lie beside pages that may not be read."""
    original = padded_window()
    for size in (1, 7, 16, 50, 150):
        expected = arrays(original, {"n": size})
        expected["rows"] = np.random.default_rng(2).integers(-3, size, size)
        found = {name: array.copy() for name, array in expected.items()}
        run_kernel(original, expected, {"n": size})
        run_native(vectorize(original, Vectors.of(target)), found, {"n": size}, target, at_start=at_start)
        for name in ("y", "t"):
            np.testing.assert_array_equal(found[name], expected[name])


LEAVES = st.sampled_from(["x", "z", "strided", "index", "uniform", "flipped", "gathered"])


def test_a_chain_of_selects_is_walked_once() -> None:
    """As roundings to float8 make it: by every path through it, this took hours."""

    def chain(x: Scalar) -> Scalar:
        value = x
        for limit in range(30):
            inside = s.binary("and", value < limit, -value < limit)
            value = s.select(inside, value * 2 - value, s.select(value < 0, value + 1, value - 1))
        return value

    vectorised = vectorize(elementwise(40, chain), Vectors(256))
    (store,) = {each for each in loops.walk(vectorised.body) if isinstance(each, Store)}
    assert 100 < sum(1 for _ in s.walk(store.value)) < 1000


OPERATIONS = st.sampled_from(["add", "sub", "mul", "min", "max", "select", "fma"])


@st.composite
def expressions(draw: st.DrawFn, extent: Dim, depth: int = 3) -> Scalar:
    """A random f32 expression of the loop index."""
    if depth == 0 or draw(st.integers(0, 4)) == 0:
        x, z = Buffer("x", F32, 400), Buffer("z", F64, 400)
        return {
            "x": load(x, V + draw(st.integers(0, 9))),
            "z": s.cast(load(z, V), F32),
            "strided": load(x, V * 3),
            "index": s.cast(s.index(V * draw(st.integers(-2, 2)) + V // draw(st.integers(2, 40))), F32),
            "uniform": load(x, symbol("n")),
            "flipped": load(x, extent - V),
            "gathered": load(x, (V * 5) % 16),
        }[draw(LEAVES)]
    op = draw(OPERATIONS)
    a, b = draw(expressions(extent, depth - 1)), draw(expressions(extent, depth - 1))
    if op == "select":
        return s.select(a < b, a, draw(expressions(extent, depth - 1)))
    return s.fma(a, b, s.const(2.0)) if op == "fma" else s.binary(op, a, b)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(WIDTHS), st.integers(0, 120), st.booleans())
def test_random_kernels(data: st.DataObject, vectors: Vectors, size: int, fixed: bool) -> None:
    extent: Dim = size if fixed else symbol("n")
    total, y, t = Buffer("total", F32, 1, "register"), Buffer("y", F32, 121), Buffer("t", F32, 1)
    first, second = data.draw(expressions(extent)), data.draw(expressions(extent))
    body: list[loops.Statement] = [
        Define(total, s.const(1.0)),
        For("v", extent, (Store(y, V, first), Store(total, 0, s.binary("max", load(total, 0), second))), "vector"),
        Store(t, 0, load(total, 0)),
    ]
    buffers = (y, t, Buffer("x", F32, 400), Buffer("z", F64, 400))
    same(kernel(body, *buffers, outputs=2, sizes=("n",)), vectors, {"n": size})
