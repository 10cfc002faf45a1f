"""Matrix products on a GPU: every kind of kernel on the emulator against numpy, and what NVRTC makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda_lowered import aligned, run, text
from emulator import harness
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxc.backends.cuda import nvrtc, report
from onnxc.backends.cuda.kernels import gemm
from onnxc.backends.cuda.kernels.choose import Plan
from onnxc.backends.cuda.kernels.contraction import lowered as lowered_by
from onnxc.backends.cuda.kernels.problem import Problem, find_problem
from onnxc.backends.cuda.kernels.tiles import Tile
from onnxc.backends.cuda.schedules import schedule
from onnxc.backends.cuda.source import prelude
from onnxc.ir.dims import symbol
from onnxc.ir.functions import erf, maximum, where
from onnxc.ir.ops import REGISTRY
from onnxc.ir.scalars import Scalar
from onnxc.ir.target import Target
from onnxc.ir.tensors import Tensor, compute, inside, reduce_axes, reshaped, view
from onnxc.passes.regions import Lowered, Region
from onnxc.tools.bench_kernels import make_region

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)
M, N, K, B = symbol("M"), symbol("N"), symbol("K"), symbol("B")
DTYPES = {
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "tf32": np.float32, "f64": np.float64,
    "i32": np.int32,
}  # fmt: skip
needs_compiler = pytest.mark.skipif(harness.compiler() is None, reason="the emulator needs g++")
needs_nvrtc = pytest.mark.skipif(not nvrtc.is_available(), reason="NVRTC is not installed")


def numbers(shape: Sequence[int], kind: str) -> Array:
    """Whole numbers so small that sums of products are exact in any order."""
    return RANDOM.integers(-2, 3, shape).astype(DTYPES[kind])


def target(kind: str = "f32", architecture: str = "sm_90") -> Target:
    return replace(Target.parse(f"cuda:{architecture}"), products="tf32" if kind == "tf32" else "f32")


def permuted(x: Tensor, order: Sequence[int]) -> Tensor:
    back = [list(order).index(axis) for axis in range(x.rank)]
    return view(x, [x.shape[axis] for axis in order], lambda *i: tuple(i[axis] for axis in back))


def gelu(x: Tensor, bias: Tensor) -> Tensor:
    return ((x + bias) * (erf((x + bias) / 1.4142135) + 1.0)) * 0.5


def by_plan(region: Region, plan: Plan, chosen: Target) -> Lowered:
    """The kernels by this plan, whatever the model of costs says."""
    region, problem = prepared(region)
    region, loaders, made = gemm.operands(region, problem, chosen)
    lowered = lowered_by(region, problem.sums, loaders, plan)
    return replace(lowered, packed={**made.packed, **lowered.packed})


def prepared(region: Region) -> tuple[Region, Problem]:
    found = find_problem(region)
    assert found is not None and found[1] is not None
    return region, found[1]


def product_region(
    shape: tuple[Any, Any, Any],
    kind: str,
    left: bool = False,
    right: bool = False,
    constant: Array | None = None,
    epilogue: Any = None,
) -> Region:
    """Gemm of [m, depth] by [depth, n], either transposed, then a bias and ReLU; all addresses aligned."""
    m, n, depth = shape
    dtype = np.dtype(DTYPES[kind])
    second: Any = ((n, depth) if right else (depth, n), dtype) if constant is None else constant
    return aligned(
        make_region(
            "Gemm",
            [((depth, m) if left else (m, depth), dtype), second],
            {"transA": int(left), "transB": int(right)},
            [((n,), dtype)],
            epilogue or (lambda y, b: maximum(y + b, 0)),
        )
    )


def check(
    shape: tuple[int, int, int],
    kind: str = "f16",
    left: bool = False,
    right: bool = False,
    plan: Plan | None = None,
    known: bool = False,
    constant: bool = False,
    checked: bool = False,
    seed: int = 0,
) -> Lowered:
    """Runs max(a @ b + bias, 0) on the emulator; the sizes are known at run time only, unless `known`."""
    m, n, depth = shape
    a, b, bias = numbers((m, depth), kind), numbers((depth, n), kind), numbers((n,), kind)
    first, second = a.T if left else a, b.T if right else b
    sizes: Any = shape if known or constant else (M, N, K)
    sizes = (m if known else M, n, depth) if constant else sizes
    region = product_region(sizes, kind, left, right, np.ascontiguousarray(second) if constant else None)
    chosen = target(kind)
    lowered = schedule(region, chosen) if plan is None else by_plan(region, plan, chosen)
    assert lowered is not None
    values = {"M": m, "N": n, "K": depth}
    (result,) = run(region, lowered, chosen, [first, second, bias], values, checked, seed)
    sums = (a.astype(np.float64) @ b.astype(np.float64)).astype(DTYPES[kind])
    expected = np.maximum(sums.astype(np.float64) + bias.astype(np.float64), 0).astype(DTYPES[kind])
    np.testing.assert_array_equal(result, expected)
    return lowered


def tensor(rows: int, columns: int, depth: int, warps: tuple[int, int, int], stages: int, splits: int = 1) -> Plan:
    return Plan(Tile(rows, columns, depth, warps, stages), True, splits)


def lanes(rows: int, columns: int, depth: int, warps: tuple[int, int, int], stages: int, splits: int = 1) -> Plan:
    return Plan(Tile(rows, columns, depth, warps, stages), False, splits)


VARIANTS = {
    "wide": ("f16", tensor(64, 64, 32, (2, 2, 1), 4)),
    "deep": ("f16", tensor(32, 64, 64, (1, 2, 2), 3)),
    "flat": ("bf16", tensor(16, 32, 64, (1, 1, 4), 2)),
    "split": ("f16", tensor(32, 32, 32, (2, 1, 1), 3, 3)),
    "tf32": ("tf32", tensor(32, 32, 16, (1, 2, 1), 3)),
    "tf32-deep": ("tf32", tensor(32, 32, 32, (1, 1, 2), 2)),
    "f32": ("f32", lanes(64, 64, 8, (2, 1, 1), 3)),
    "f32-deep": ("f32", lanes(32, 32, 16, (1, 1, 4), 2)),
    "f64": ("f64", lanes(32, 32, 4, (1, 1, 2), 3)),
    "i32-split": ("i32", lanes(32, 32, 8, (1, 1, 1), 4, 2)),
}


@needs_compiler
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("left", "right"), [(False, False), (True, True), (True, False), (False, True)])
def test_tiles(name: str, left: bool, right: bool) -> None:
    """Edges on all sides, sizes that suit copies of 16 bytes."""
    kind, plan = VARIANTS[name]
    check((72, 40, 104), kind, left, right, plan, known=True)


@needs_compiler
@pytest.mark.parametrize("name", VARIANTS)
def test_tiles_where_only_the_run_tells_sizes(name: str) -> None:
    kind, plan = VARIANTS[name]
    check((37, 45, 51), kind, False, False, plan)


@needs_compiler
@pytest.mark.parametrize("name", VARIANTS)
def test_tiles_checked(name: str) -> None:
    """No races, no addresses outside the operands, in whatever order warps run."""
    kind, plan = VARIANTS[name]
    check((40, 40, 72), kind, name == "wide", True, plan, known=True, checked=True, seed=3)


@needs_compiler
@settings(max_examples=14)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(data.draw(st.integers(2, 140)) for _ in range(3))
    left, right, known, constant = (data.draw(st.booleans()) for _ in range(4))
    check(shape, kind, left, right, known=known, constant=constant)  # type: ignore[arg-type]


@needs_compiler
@pytest.mark.parametrize("kind", ["f32", "tf32"])
def test_real_numbers(kind: str) -> None:
    """True f32 keeps all its bits; tf32 has 10."""
    a, b = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((48, 200), (200, 56)))
    region = product_region((48, 56, 200), kind, epilogue=lambda y, b: y)
    lowered = schedule(region, target(kind))
    assert lowered is not None
    (result,) = run(region, lowered, target(kind), [a, b, np.zeros(56, np.float32)])
    expected = a.astype(np.float64) @ b.astype(np.float64)
    error = np.abs(result - expected).max() / np.abs(expected).max()
    assert error < 1e-6 if kind == "f32" else 1e-5 < error < 1e-3


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "kind", "right", "constant"),
    [
        ((1, 96, 768), "f16", False, True),
        ((4, 50, 200), "f16", True, False),
        ((3, 104, 203), "bf16", False, False),
        ((2, 97, 203), "f16", False, True),
        ((8, 40, 300), "f32", False, True),
        ((5, 264, 33), "f32", False, False),
        ((90, 3, 128), "f16", False, False),
        ((2, 20, 64), "f64", True, False),
        ((1, 33, 520), "i32", True, False),
    ],
)
@pytest.mark.parametrize("checked", [False, True])
def test_few_rows(shape: tuple[int, int, int], kind: str, right: bool, constant: bool, checked: bool) -> None:
    lowered = check(shape, kind, False, right, known=True, constant=constant, checked=checked)
    assert "few_rows" in text(lowered)


@needs_compiler
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_batches_and_permuted_outputs(known: bool, kind: str) -> None:
    """The products of attention: [batch, query, heads, width] read where it lies, heads brought back at the end."""
    batch, length, heads, width = 2, 19, 3, 16
    dtype = np.dtype(DTYPES[kind])
    q, key = numbers((batch, length, heads, width), kind), numbers((batch, length, heads, width), kind)
    scores = numbers((batch, heads, length, length), kind)
    shape: Any = q.shape if known else (B, N, heads, width)
    square: Any = scores.shape if known else (B, heads, N, N)
    sizes = {"B": batch, "N": length}
    region = make_region("Einsum", [(shape, dtype), (shape, dtype)], {"equation": "bqhd,bkhd->bhqk"})
    agree(region, [q, key], sizes, np.einsum("bqhd,bkhd->bhqk", *map(np.float64, (q, key))))
    region = make_region(
        "Einsum",
        [(square, dtype), (shape, dtype)],
        {"equation": "bhqk,bkhd->bhqd"},
        epilogue=lambda x: permuted(x, (0, 2, 1, 3)),
    )
    agree(region, [scores, q], sizes, np.einsum("bhqk,bkhd->bqhd", *map(np.float64, (scores, q))))


def agree(region: Region, inputs: Sequence[Array], sizes: Mapping[str, int], *expected: Array) -> Lowered:
    """Runs a region on the emulator."""
    region = aligned(region)
    lowered = schedule(region, target())
    assert lowered is not None
    results = run(region, lowered, target(), inputs, sizes)
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, wanted.astype(result.dtype))
    return lowered


@needs_compiler
@pytest.mark.parametrize("shapes", [((5, 24), (3, 24, 40)), ((3, 5, 24), (24, 40)), ((2, 1, 5, 24), (3, 24, 40))])
def test_broadcast_batches(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (numbers(shape, "f16") for shape in shapes)
    region = make_region("MatMul", [(a.shape, a.dtype), (b.shape, b.dtype)])
    agree(region, [a, b], {}, a.astype(np.float64) @ b.astype(np.float64))


@needs_compiler
@pytest.mark.parametrize("known", [True, False])
def test_two_outputs_and_heads_split(known: bool) -> None:
    batch, length, heads, width = 2, 7, 3, 16
    x, w, bias = numbers((batch, length, 48), "f16"), numbers((48, heads * width), "f16"), numbers((48,), "f16")
    shape: Any = x.shape if known else (B, N, 48)

    def epilogue(y: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        total = y + b
        return permuted(reshaped(total, (*y.shape[:2], heads, width)), (0, 2, 1, 3)), maximum(total, 0.0)

    total = x.astype(np.float64) @ w.astype(np.float64) + bias
    split = total.reshape(batch, length, heads, width).transpose(0, 2, 1, 3)
    region = make_region("MatMul", [(shape, x.dtype), w], extras=[bias], epilogue=epilogue)
    agree(region, [x, w, bias], {"B": batch, "N": length}, split, np.maximum(total, 0))


@needs_compiler
def test_epilogue_that_reads_other_elements() -> None:
    a, w = numbers((6, 16), "f32"), numbers((16, 40), "f32")
    region = make_region("MatMul", [(a.shape, "f4"), w], epilogue=lambda y: y - reduce_axes("max", y, (1,)))
    agree(region, [a, w], {}, a @ w - (a @ w).max(1, keepdims=True))


@needs_compiler
def test_operand_by_expression() -> None:
    """Padded on both sides: elements are computed, and zeros outside are not read."""
    x, w = numbers((9, 20), "f16"), numbers((24, 32), "f16")

    def padded(memory: Tensor) -> Tensor:
        def element(i: Any, j: Any) -> Scalar:
            return where(inside(j - 2, 20), memory.at((i, j - 2)), 0.0)

        return compute((9, 24), memory.dtype, element, memory)

    region = make_region(
        "MatMul",
        [(x.shape, x.dtype), w],
        define=lambda memory, weights: REGISTRY["MatMul"]([padded(memory), weights], {})[0],  # type: ignore[return-value]
    )
    wide = np.pad(x, ((0, 0), (2, 2))).astype(np.float64)
    agree(region, [x, w], {}, wide @ w.astype(np.float64))


@needs_compiler
@pytest.mark.parametrize("zero", [0, 3])
def test_integers(zero: int) -> None:
    """Bytes by tensor cores where they are multiplied as they are, else shifted by their zero point, lane by lane."""
    a, b = RANDOM.integers(-99, 99, (37, 70)).astype(np.int8), RANDOM.integers(-99, 99, (70, 48)).astype(np.int8)
    operands: list[Any] = [(a.shape, a.dtype), b, *([((), a.dtype)] if zero else [])]
    inputs = [a, b, *([np.array(zero, np.int8)] if zero else [])]
    lowered = agree(make_region("MatMulInteger", operands), inputs, {}, (np.int64(a) - zero) @ np.int64(b))
    assert ("mma_m16n8k32_s8s8" in text(lowered)) == (zero == 0)


@needs_compiler
@pytest.mark.parametrize("shape", [(0, 24, 16), (5, 0, 16), (5, 24, 0)])
def test_empty_sizes(shape: tuple[int, int, int]) -> None:
    check(shape, "f16")
    check(shape, "f32")


def blocks(plan: Plan, m: int, n: int) -> int:
    return -(-m // plan.tile.rows) * -(-n // plan.tile.columns) * plan.splits


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", ["f16", "tf32", "f32"])
def test_plans_fill_the_gpu(architecture: str, kind: str) -> None:
    """Large products by large tiles; small ones by enough blocks, of small tiles or parts of the depth."""
    chosen = target(kind, architecture)

    def plan(m: int, n: int, depth: int) -> Plan:
        region, problem = prepared(product_region((m, n, depth), kind))
        return gemm.plan_of(problem, gemm.operands(region, problem, chosen)[1], chosen)

    large = plan(4096, 4096, 4096).tile
    assert large.rows * large.columns >= (128 * 128 if kind != "f32" else 128 * 64)
    for m, n, depth in ((128, 768, 768), (128, 768, 3072), (64, 512, 2048), (196, 1024, 512)):
        small = plan(m, n, depth)
        assert blocks(small, m, n) >= chosen.multiprocessors // 2
        assert small.tile.stages * (small.tile.rows + small.tile.columns) * small.tile.depth * 2 <= chosen.shared_bytes
    assert plan(16, 4096, 4096).tile.rows == 16


def compiled(lowered: Lowered, architecture: str) -> tuple[int, str]:
    """Bytes that all kernels spill, and their SASS."""
    found = nvrtc.compile_source(prelude() + text(lowered), architecture)
    spilled = sum(each.spill_store_bytes + each.stack_bytes for each in found.resources.values())
    return spilled, report.sass(found.image) if report.has_disassembler() else ""


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("shape", "kind", "right"),
    [
        ((4096, 4096, 4096), "f16", False),
        ((M, 768, 768), "bf16", True),
        ((197, 768, 3072), "f16", False),
        ((16, 2304, 768), "f16", False),
        ((4096, 1024, 4096), "tf32", True),
        ((4096, 4096, 1024), "f32", False),
        ((1, 2304, 768), "f16", True),
    ],
)
def test_machine_code(architecture: str, shape: tuple[Any, int, int], kind: str, right: bool) -> None:
    """Nothing spilled; tensor cores, matrix loads and asynchronous copies."""
    lowered = schedule(product_region(shape, kind, right=right, epilogue=gelu), target(kind, architecture))
    assert lowered is not None
    spilled, sass = compiled(lowered, architecture)
    assert spilled == 0
    if sass and "few_rows" not in sass:
        assert "LDGSTS" in sass and ".128 " in sass
        assert ("HMMA" in sass) == (kind != "f32")
        assert ("LDSM" in sass) == (kind != "f32")
