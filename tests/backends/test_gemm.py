"""Matrix products by register tiles: every shape, epilogue and target against numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import run, spills, summing_loops
from onnxc.backends.cpu.kernels import gemm
from onnxc.backends.cpu.kernels.register_tile import choose_tile, fits
from onnxc.ir.dims import symbol
from onnxc.ir.dtypes import F32
from onnxc.ir.functions import erf, maximum
from onnxc.ir.ops import REGISTRY
from onnxc.ir.target import Target
from onnxc.ir.tensors import Tensor, reduce_axes, reshaped, view
from onnxc.passes.regions import Region
from onnxc.tools.bench_kernels import make_region

RANDOM = np.random.default_rng(0)
TARGETS = [name for name in ("host", "x86-64-v3", "x86-64") if name == "host" or Target.host().architecture == "x86_64"]
M, S, B = symbol("M"), symbol("S"), symbol("B")


def floats(*shape: int) -> np.ndarray:
    """Whole numbers, so that sums are exact in any order."""
    return RANDOM.integers(-4, 5, shape).astype(np.float32)


def permuted(x: Tensor, order: Sequence[int]) -> Tensor:
    back = [list(order).index(axis) for axis in range(x.rank)]
    return view(x, [x.shape[axis] for axis in order], lambda *i: tuple(i[axis] for axis in back))


def check(
    region: Region,
    inputs: Sequence[np.ndarray],
    sizes: Mapping[str, int],
    *expected: np.ndarray,
    target: str = "host",
) -> None:
    """Runs the schedule's kernels on the machine, and, where they are small, by the interpreter."""
    chosen = Target.parse(target)
    lowered = gemm.schedule(region, chosen)
    assert lowered is not None
    work = sum(array.size for array in inputs) * sum(array.size for array in expected)
    for interpret in (False, True) if work < 3000 else (False,):
        results = run(region, lowered, chosen, inputs, sizes, interpret)
        for result, wanted in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("known", [True, False])
@settings(max_examples=12, deadline=None)
@given(m=st.integers(0, 40), n=st.integers(2, 150), depth=st.integers(2, 70))
def test_constant_right_operand(target: str, known: bool, m: int, n: int, depth: int) -> None:
    m = max(m, int(known))
    a, w, bias, residual = floats(m, depth), floats(depth, n), floats(n), floats(m, n)
    rows: Any = m if known else M
    region = make_region(
        "MatMul",
        [((rows, depth), "f4"), w],
        extras=[bias, ((rows, n), "f4")],
        epilogue=lambda y, b, r: maximum(y + b + r, 0.0),
    )
    check(region, [a, w, bias, residual], {"M": m}, np.maximum(a @ w + bias + residual, 0), target=target)


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_gemm_attributes(target: str, data: st.DataObject) -> None:
    m, n, depth = (data.draw(st.integers(2, 40)) for _ in range(3))
    left, right = data.draw(st.booleans()), data.draw(st.booleans())
    a, b = floats(*((depth, m) if left else (m, depth))), floats(*((n, depth) if right else (depth, n)))
    c = floats(*data.draw(st.sampled_from([(n,), (m, 1), (m, n), (1,)])))
    attributes = {"transA": int(left), "transB": int(right), "alpha": 0.5, "beta": 2.0}
    constant = data.draw(st.booleans())
    second: Any = b if constant else (b.shape, "f4")
    expected = np.float32(0.5) * ((a.T if left else a) @ (b.T if right else b)) + np.float32(2) * c
    check(make_region("Gemm", [(a.shape, "f4"), second, c], attributes), [a, b, c], {}, expected, target=target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("batch", "length", "heads", "width"), [(1, 5, 2, 8), (2, 19, 3, 16), (1, 33, 2, 24)])
def test_attention(target: str, known: bool, batch: int, length: int, heads: int, width: int) -> None:
    """Both products of attention: a right operand that is transposed in registers, and one read in place."""
    q, key = floats(batch, length, heads, width), floats(batch, length, heads, width)
    scores = floats(batch, heads, length, length)
    shape: Any = q.shape if known else (B, S, heads, width)
    square: Any = scores.shape if known else (B, heads, S, S)
    sizes = {} if known else {"B": batch, "S": length}
    region = make_region(
        "Einsum", [(shape, "f4"), (shape, "f4")], {"equation": "bqhd,bkhd->bhqk"}, epilogue=lambda x: x * 0.125
    )
    check(region, [q, key], sizes, np.einsum("bqhd,bkhd->bhqk", q, key) * np.float32(0.125), target=target)
    region = make_region(
        "Einsum",
        [(square, "f4"), (shape, "f4")],
        {"equation": "bhqk,bkhd->bhqd"},
        epilogue=lambda x: permuted(x, (0, 2, 1, 3)),
    )
    check(region, [scores, q], sizes, np.einsum("bhqk,bkhd->bqhd", scores, q), target=target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("known", [True, False])
def test_heads_split_and_two_outputs(target: str, known: bool) -> None:
    batch, length, heads, width = 2, 7, 3, 16
    x, w, bias = floats(batch, length, heads * width), floats(heads * width, heads * width), floats(heads * width)
    shape: Any = x.shape if known else (B, S, heads * width)

    def epilogue(y: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        total = y + b
        return permuted(reshaped(total, (*y.shape[:2], heads, width)), (0, 2, 1, 3)), maximum(total, 0.0), y

    product = x @ w
    split = (product + bias).reshape(batch, length, heads, width).transpose(0, 2, 1, 3)
    region = make_region("MatMul", [(shape, "f4"), w], extras=[bias], epilogue=epilogue)
    sizes = {} if known else {"B": batch, "S": length}
    check(region, [x, w, bias], sizes, split, np.maximum(product + bias, 0), product, target=target)


def test_empty_sizes() -> None:
    w = floats(8, 20)
    region = make_region("MatMul", [((B, S, 8), "f4"), w])
    check(region, [floats(0, 5, 8), w], {"B": 0, "S": 5}, np.zeros((0, 5, 20), np.float32))
    both = make_region("Einsum", [((S, M), "f4"), ((M, B), "f4")], {"equation": "sm,mb->sb"})
    for s, m, b in [(3, 0, 5), (0, 3, 5), (3, 5, 0), (3, 5, 70)]:
        left, right = floats(s, m), floats(m, b)
        check(both, [left, right], {"S": s, "M": m, "B": b}, left @ right)


@pytest.mark.parametrize("dtype", ["f2", "f8"])
def test_other_element_types(dtype: str) -> None:
    a, w = floats(9, 30).astype(dtype), floats(30, 21).astype(dtype)
    check(
        make_region("MatMul", [((M, 30), dtype), w]), [a, w], {"M": 9}, (a.astype("f8") @ w.astype("f8")).astype(dtype)
    )


def test_epilogue_that_reads_other_elements() -> None:
    a, w = floats(6, 10), floats(10, 40)
    region = make_region("MatMul", [(a.shape, "f4"), w], epilogue=lambda y: y - reduce_axes("max", y, (1,)))
    product = a @ w
    check(region, [a, w], {}, product - product.max(1, keepdims=True))


def test_operand_that_cannot_be_read_in_place() -> None:
    """Rows of the left operand are every second half of a row in memory: a copy of it comes first."""
    x, w = floats(8, 12), floats(6, 40)

    def halves(memory: Tensor) -> Tensor:
        return view(memory, (4, 12 // 2), lambda i, j: ((4 * i + 3 * (j % 2)) // 2, j))

    region = make_region(
        "MatMul",
        [(x.shape, "f4"), w],
        define=lambda memory, weights: REGISTRY["MatMul"]([halves(memory), weights], {})[0],  # type: ignore[return-value]
    )
    memory, weights = region.operands
    assert memory is not None
    region = replace(region, operands=(halves(memory), weights))
    host = Target.host()
    lowered = gemm.schedule(region, host)
    assert lowered is not None and len(lowered.calls) == 2
    (result,) = run(region, lowered, host, [x, w])
    i, j = np.indices((4, 6))
    np.testing.assert_array_equal(result, x[(4 * i + 3 * (j % 2)) // 2, j] @ w)


def test_vector_by_matrix() -> None:
    """One row: a matrix is read in place where its rows lie contiguous, else left to the loop nest."""
    x, b = floats(37), floats(37, 70)
    check(make_region("MatMul", [(x.shape, "f4"), (b.shape, "f4")]), [x, b], {}, x @ b)
    other = make_region("Einsum", [((37,), "f4"), ((70, 37), "f4")], {"equation": "k,nk->n"})
    assert gemm.schedule(other, Target.host()) is None


def biased(x: Tensor, bias: Tensor) -> Tensor:
    return x + bias


def gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Its constants are as many as the sums: LLVM must know which of them are in the hotter loop."""
    return ((x + bias) * (erf((x + bias) / 1.4142135) + 1.0)) * 0.5


@pytest.mark.parametrize("target", ["x86-64-v4", "x86-64-v3", "x86-64", "aarch64"])
@pytest.mark.parametrize("epilogue", [biased, gelu])
@pytest.mark.parametrize(("m", "n", "depth"), [(128, 768, 768), (49, 2048, 512), (M, 1000, 512), (1, 1000, 512)])
def test_summing_loops_do_not_spill(target: str, epilogue: Any, m: Any, n: int, depth: int) -> None:
    chosen = Target.parse(target)
    region = make_region("MatMul", [((m, depth), "f4"), floats(depth, n)], extras=[floats(n)], epilogue=epilogue)
    lowered = gemm.schedule(region, chosen)
    assert lowered is not None
    loops = summing_loops(lowered, chosen)
    assert loops
    assert not [loop for loop in loops if spills(loop)]


@pytest.mark.parametrize("target", ["x86-64-v4", "x86-64-v3", "x86-64", "aarch64"])
def test_tile_has_registers_and_wastes_little(target: str) -> None:
    chosen = Target.parse(target)
    lanes = chosen.lanes(32)
    for rows in (1, 7, 49, 128, 196, M):
        for columns in (lanes, 5 * lanes, 768, 1000):
            tile = choose_tile(rows, columns, 512, F32, chosen)
            assert fits(tile.rows, tile.vectors, chosen)
            if isinstance(rows, int) and rows >= 49:
                assert tile.rows * tile.vectors >= 6 or columns == lanes
