"""Kernels that move much and compute little, on the emulator: against numpy, and what their text must look like."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda_lowered import aligned, numbered, run, text
from onnxc.backends.cuda import nvrtc
from onnxc.backends.cuda.schedules import schedule
from onnxc.backends.cuda.source import prelude, render_kernel
from onnxc.ir.dims import Dim, evaluate, symbol
from onnxc.ir.target import Target
from onnxc.ir.tensors import Tensor, compute
from onnxc.passes.regions import Lowered, Region
from onnxc.tools.bench_kernels import make_region

Array = np.ndarray[Any, Any]
TARGET = Target.parse("cuda:sm_90")
M, N = symbol("m"), symbol("n")
BF16 = np.dtype(ml_dtypes.bfloat16)
TOLERANCES = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def array_of(shape: Sequence[int], dtype: Any, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "b":
        return random.random(shape) < 0.5
    if kind.kind in "iu":
        return random.integers(0, 100, shape).astype(kind)
    return (random.standard_normal(shape) * 2).astype(kind)


def lower(region: Region) -> tuple[Region, Lowered]:
    region = aligned(region)
    lowered = schedule(region, TARGET)
    assert lowered is not None
    return region, lowered


def check(
    region: Region,
    inputs: Sequence[Array],
    expected: Callable[..., Any],
    sizes: dict[str, int] | None = None,
    checked: bool = False,
    seed: int = 0,
) -> str:
    """Runs a region; `expected` takes the inputs, floats of them as f64. Returns the text."""
    region, lowered = lower(region)
    found = run(region, lowered, TARGET, inputs, sizes, checked, seed)
    wide = [x.astype(np.float64) if x.dtype.kind in "fV" else x for x in inputs]
    wanted = expected(*wide)
    for actual, exact in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        assert actual.shape == np.shape(exact)
        if actual.dtype.kind in "biu":
            np.testing.assert_array_equal(actual, exact)
        else:
            scale = max(1e-6, float(np.abs(exact).max(initial=0)))
            assert np.abs(actual.astype(np.float64) - exact).max(initial=0) <= TOLERANCES[actual.dtype.name] * scale
    return text(lowered)


def softmax(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def normal(x: Array, axes: Any, epsilon: float = 1e-5) -> Array:
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + epsilon)


# Elements each on its own.


@pytest.mark.parametrize(
    ("dtype", "pack"),
    [("f4", "float, 4"), ("f2", "f16, 8"), (BF16, "bf16, 8"), ("f8", "double, 2"), ("i8", "i64, 2"), ("i1", "i8, 16")],
)
def test_neighbours_are_moved_together(dtype: Any, pack: str) -> None:
    """16 bytes at a time; what the last axis does not fill is done one by one."""
    a, b = array_of((37, 11), dtype), array_of((37, 11), dtype, 1)
    source = check(make_region("Add", [(a.shape, dtype), (b.shape, dtype)]), [a, b], lambda a, b: a + b)
    assert source.count(f"*(const Pack<{pack}>*)(x") == 2
    assert source.count(f"*(Pack<{pack}>*)(y0") == 1


def test_types_of_several_widths() -> None:
    """Lanes by which the narrowest type moves 16 bytes, as long as the widest has no more than 64."""
    x = array_of((8, 64), "f4")
    source = check(make_region("Less", [((8, 64), "f4"), ((64,), "f4")]), [x, x[0]], lambda a, b: a < b)
    assert "*(Pack<u8, 16>*)(y0" in source
    assert source.count("*(const Pack<float, 4>*)(x0") == 4


@pytest.mark.parametrize(
    "shapes", [((6, 8), (8,)), ((6, 10), (10,)), ((5, 7), (7,)), ((4, 3, 8), (4, 1, 8)), ((4, 9), (4, 1)), ((3, 5), ())]
)
def test_broadcasting(shapes: Sequence[tuple[int, ...]]) -> None:
    a, b = (array_of(shape, "f4", seed) for seed, shape in enumerate(shapes))
    check(make_region("Mul", [(a.shape, "f4"), (b.shape, "f4")]), [a, b], lambda a, b: a * b)


@pytest.mark.parametrize("columns", [16, 19])
def test_alignment_that_only_the_run_tells(columns: int) -> None:
    """One kernel for rows that are a multiple of the lanes and for others."""
    a, b = array_of((5, columns), "f4"), array_of((columns,), "f4", 1)
    sizes = {"m": 5, "n": columns}
    source = check(make_region("Add", [((M, N), "f4"), ((N,), "f4")]), [a, b], lambda a, b: a + b, sizes, True)
    assert "if ((n % 4) == 0)" in source and "Pack<float, 4>" in source


def test_indices_are_taken_apart_once_per_thread() -> None:
    """Where nothing is broadcast there is one index and no division."""
    x = array_of((3, 4, 8), "f4")
    source = check(make_region("Exp", [(x.shape, "f4")]), [x], np.exp)
    assert "/" not in source.split("{", 1)[1] and "%" not in source


def test_unaligned_buffers_are_read_one_by_one() -> None:
    x = array_of((40, 8), "f4")
    region = make_region("Exp", [(x.shape, "f4")])
    lowered = schedule(region, TARGET)
    assert lowered is not None and "Pack" not in text(lowered)
    np.testing.assert_allclose(run(region, lowered, TARGET, [x])[0], np.exp(x), rtol=1e-5)


def test_windows_read_vectors() -> None:
    """Pooling of images whose channels lie side by side: the padding is a condition of all lanes."""
    shape = (2, 130, 130, 16)
    attributes = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2], "layout": "channels_last"}
    region, lowered = lower(make_region("MaxPool", [(shape, "f2")], attributes))
    assert re.search(r"\? \*\(const Pack<f16, \d>\*\)\(x0", text(lowered))
    x = array_of(shape, "f2")
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    expected = np.max([padded[:, i : i + 129 : 2, j : j + 129 : 2] for i in range(3) for j in range(3)], axis=0)
    np.testing.assert_array_equal(run(region, lowered, TARGET, [x])[0], expected)


def test_rows_are_gathered_by_vectors() -> None:
    x, rows = array_of((20, 24), "f2"), np.array([[3, -1], [0, 19], [7, 7]])
    source = check(make_region("Gather", [(x.shape, "f2"), (rows.shape, "i8")]), [x, rows], lambda x, rows: x[rows])
    # Elements that only move are not converted.
    assert "Pack<u16, 8>" in source and "f16_to_f32" not in source


def test_conditions_that_hold_for_all_lanes() -> None:
    """Parts that begin at a multiple of the lanes are read by vectors, others lane by lane."""

    def joined(a: Tensor, b: Tensor) -> Tensor:
        from onnxc.ir.ops import REGISTRY

        (found,) = REGISTRY["Concat"]((a, b), {"axis": 1})
        assert isinstance(found, Tensor)
        return found

    for width, vectors in ((8, True), (6, False)):
        a, b = array_of((5, width), "f4"), array_of((5, 12 - width), "f4", 1)
        region = make_region("Concat", [(a.shape, "f4"), (b.shape, "f4")], define=joined)
        source = check(region, [a, b], lambda a, b: np.concatenate([a, b], 1))
        assert ("*(const Pack<float, 4>*)(x0" in source) == vectors


# Reductions over rows.

NORMALISATIONS: dict[str, tuple[str, dict[str, Any], Callable[[Array], Any]]] = {
    "softmax": ("Softmax", {}, softmax),
    "log softmax": ("LogSoftmax", {}, lambda x: np.log(softmax(x))),
    "argmax": ("ArgMax", {"axis": -1}, lambda x: x.argmax(-1)[..., None]),
    "hardmax": ("Hardmax", {}, lambda x: (x.argmax(-1)[..., None] == np.arange(x.shape[-1])).astype(float)),
    "log sum exp": ("ReduceLogSumExp", {"axes": [-1]}, lambda x: np.log(np.exp(x).sum(-1, keepdims=True))),
    "mean": ("ReduceMean", {"axes": [-1]}, lambda x: x.mean(-1, keepdims=True)),
}


@pytest.mark.parametrize("columns", [1, 3, 10, 33, 64, 100, 768, 1025, 2500])
@pytest.mark.parametrize("name", ["softmax", "argmax"])
def test_rows(name: str, columns: int) -> None:
    """From several rows for a warp to a block for each."""
    op, attributes, expected = NORMALISATIONS[name]
    x = array_of((7, columns), "f4")
    check(make_region(op, [(x.shape, "f4")], attributes), [x], expected)


@pytest.mark.parametrize("name", NORMALISATIONS)
@pytest.mark.parametrize("dtype", ["f2", "f8"])
def test_rows_of_other_types(name: str, dtype: str) -> None:
    op, attributes, expected = NORMALISATIONS[name]
    x = np.random.default_rng(0).permutation(4 * 96).reshape(4, 96).astype(dtype) / 64
    check(make_region(op, [(x.shape, dtype)], attributes), [x], expected)


@pytest.mark.parametrize("columns", [6, 64, 130, 5000])
@pytest.mark.parametrize("name", ["softmax", "mean"])
def test_rows_whose_length_only_the_run_tells(name: str, columns: int) -> None:
    op, attributes, expected = NORMALISATIONS[name]
    x = array_of((3, columns), "f4")
    check(make_region(op, [((M, N), "f4")], attributes), [x], expected, {"m": 3, "n": columns})


@pytest.mark.parametrize(("columns", "times"), [(20000, 1), (30000, 3)])
def test_rows_too_long_for_registers(columns: int, times: int) -> None:
    """They lie in shared memory, and where that does not hold them either they are read again."""
    x = array_of((2, columns), "f4")
    source = check(make_region("Softmax", [(x.shape, "f4")]), [x], softmax, checked=True)
    assert loads(source, "x0") == times


@pytest.mark.parametrize("columns", [12, 256, 1000])
def test_layer_normalization(columns: int) -> None:
    x, scale, bias = array_of((5, columns), "f4"), array_of((columns,), "f4", 1), array_of((columns,), "f4", 2)
    shapes = [(x.shape, "f4"), (scale.shape, "f4"), (bias.shape, "f4")]
    check(make_region("LayerNormalization", shapes), [x, scale, bias], lambda x, s, b: normal(x, -1) * s + b)


@pytest.mark.parametrize("op", ["GroupNormalization", "InstanceNormalization"])
def test_groups_of_channels(op: str) -> None:
    x, scale, bias = array_of((2, 6, 5, 4), "f4"), array_of((6,), "f4", 1), array_of((6,), "f4", 2)
    groups = 3 if op == "GroupNormalization" else 6
    attributes = {"num_groups": 3} if op == "GroupNormalization" else {}

    def expected(x: Array, scale: Array, bias: Array) -> Array:
        grouped = normal(x.reshape(2, groups, -1), -1).reshape(x.shape)
        return grouped * scale[:, None, None] + bias[:, None, None]

    shapes = [(x.shape, "f4"), (scale.shape, "f4"), (bias.shape, "f4")]
    source = check(make_region(op, shapes, attributes), [x, scale, bias], expected)
    assert loads(source, "x0") == 1


def loads(source: str, name: str) -> int:
    """How often a text reads a buffer."""
    return len(re.findall(rf"\b{name}\[|\({name}(?: \+|\))", source))


@pytest.mark.parametrize(
    ("op", "operands"), [("Softmax", 1), ("LogSoftmax", 1), ("LayerNormalization", 3), ("RMSNormalization", 2)]
)
def test_memory_is_read_once(op: str, operands: int) -> None:
    """However many reductions there are; in accesses of 16 bytes."""
    shapes = [((64, 768), "f2"), *[((768,), "f2")] * (operands - 1)]
    _, lowered = lower(make_region(op, shapes))
    source = text(lowered)
    assert [loads(source, f"x{i}") for i in range(operands)] == [1] * operands
    assert source.count("*(const Pack<f16, 8>*)(") == operands and source.count("*(Pack<f16, 8>*)(y0") == 1
    assert source.count("expf") == ("Softmax" in op)  # What a sum was made of is kept too.


def test_outputs_of_rows_and_of_elements_share_a_kernel() -> None:
    def statistics(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        from onnxc.ir.ops.normalisation import layer_normalization

        total = x + others[1]
        return (*layer_normalization(total, others[0]), total)

    x, scale, skip = array_of((6, 48), "f4"), array_of((48,), "f4", 1), array_of((6, 48), "f4", 2)
    region = make_region(
        "Identity", [(x.shape, "f4")], extras=[(scale.shape, "f4"), (skip.shape, "f4")], epilogue=statistics
    )

    def expected(x: Array, scale: Array, skip: Array) -> tuple[Array, ...]:
        total = x + skip
        mean, spread = total.mean(-1, keepdims=True), total.var(-1, keepdims=True)
        return normal(total, -1) * scale, mean, 1 / np.sqrt(spread + 1e-5), total

    source = check(region, [x, scale, skip], expected, checked=True)
    assert source.count("__global__") == 1 and loads(source, "x0") == loads(source, "x2") == 1


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("shape", [(5, 20), (3, 100), (2, 520)])
def test_rows_without_races(shape: tuple[int, int], seed: int) -> None:
    x = array_of(shape, "f4")
    check(make_region("Softmax", [(shape, "f4")]), [x], softmax, checked=True, seed=seed)


# Reductions over other axes.


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 21, 64), (1, 300, 36), (3, 64, 130)])
@pytest.mark.parametrize("op", ["Softmax", "ReduceMax"])
def test_columns(op: str, shape: tuple[int, ...]) -> None:
    x = array_of(shape, "f4")
    if op == "Softmax":
        check(make_region(op, [(shape, "f4")], {"axis": 1}), [x], lambda x: softmax(x, 1))
    else:
        check(make_region(op, [(shape, "f4")], {"axes": [1]}), [x], lambda x: x.max(1, keepdims=True))


@pytest.mark.parametrize("sizes", [{"m": 40, "n": 3}, {"m": 9, "n": 200}])
def test_columns_whose_extents_only_the_run_tells(sizes: dict[str, int]) -> None:
    x = array_of((sizes["n"], sizes["m"]), "f4")
    region = make_region("ReduceSum", [((N, M), "f4")], {"axes": [0]})
    check(region, [x], lambda x: x.sum(0, keepdims=True), sizes, checked=True)


def test_columns_are_read_by_vectors() -> None:
    """Pooling over a whole image whose channels lie side by side."""
    x = array_of((2, 7, 7, 96), "f2")
    region = make_region("GlobalAveragePool", [(x.shape, "f2")], {"layout": "channels_last"})
    source = check(region, [x], lambda x: x.mean((1, 2), keepdims=True), checked=True)
    assert "*(const Pack<f16, 8>*)(x0" in source and "*(Pack<f16, 8>*)(y0" in source


@pytest.mark.parametrize(("shape", "axes"), [((90001,), [0]), ((2, 70000), [1]), ((6000, 20), [0])])
def test_few_long_reductions_are_shared_by_blocks(shape: tuple[int, ...], axes: list[int]) -> None:
    """In two steps, and to the same bits whatever order blocks and threads run in."""
    x = array_of(shape, "f4")
    region, lowered = lower(make_region("ReduceSum", [(shape, "f4")], {"axes": axes}))
    assert len(lowered.kernel_calls) == 2
    results = [run(region, lowered, TARGET, [x], seed=seed)[0] for seed in (0, 5)]
    np.testing.assert_array_equal(*results)
    np.testing.assert_allclose(results[0], x.astype(float).sum(axes[0], keepdims=True), rtol=1e-3, atol=1e-3)


def test_stages_of_few_long_rows() -> None:
    x = array_of((2, 300004), "f4")
    region, lowered = lower(make_region("Softmax", [(x.shape, "f4")]))
    assert len(lowered.kernel_calls) == 5
    np.testing.assert_allclose(run(region, lowered, TARGET, [x])[0], softmax(x), rtol=1e-4, atol=1e-9)


# Transposes.


@pytest.mark.parametrize(
    ("shape", "order", "dtype"),
    [
        ((40, 70), [1, 0], "f4"),
        ((64, 128), [1, 0], "f2"),
        ((100, 72), [1, 0], "f4"),
        ((3, 50, 34), [0, 2, 1], "f2"),
        ((128, 256), [1, 0], "i1"),
        ((2, 33, 3, 40), [0, 3, 2, 1], "f8"),
        ((2, 3, 20, 24), [0, 2, 3, 1], "f4"),
        ((40, 64), [1, 0], "?"),
    ],
)
def test_transposes(shape: tuple[int, ...], order: list[int], dtype: str) -> None:
    x = array_of(shape, dtype)
    region = make_region("Transpose", [(shape, dtype)], {"perm": order})
    source = check(region, [x], lambda x: x.transpose(order))
    short = shape[order[-1]] < 16
    assert ("barrier();" in source) != short


def test_tiles_are_moved_by_vectors() -> None:
    source = check(
        make_region("Transpose", [((64, 128), "f2")], {"perm": [1, 0]}), [array_of((64, 128), "f2")], np.transpose
    )
    assert "*(const Pack<u16, 8>*)(x0" in source and "*(Pack<u16, 8>*)(y0" in source
    assert "* 66" in source  # 64 elements of a row and 4 bytes more.


@pytest.mark.parametrize("sizes", [{"m": 33, "n": 70}, {"m": 1, "n": 5}])
def test_transposes_of_any_size(sizes: dict[str, int]) -> None:
    x = array_of((2, sizes["m"], sizes["n"]), "f4")
    region = make_region("Transpose", [((2, M, N), "f4")], {"perm": [0, 2, 1]})
    check(region, [x], lambda x: x.transpose(0, 2, 1), sizes, checked=True, seed=3)


def test_transposes_within_arithmetic() -> None:
    """What is read across memory is recognised by its strides, whatever is computed with it."""

    def both(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        def element(i: Dim, j: Dim) -> Any:
            return a.at((j, i)) * b.at((i, j)) + c.at((i,))

        return compute((64, 96), a.dtype, element, a, b, c)

    a, b, c = array_of((96, 64), "f4"), array_of((64, 96), "f4", 1), array_of((64,), "f4", 2)
    shapes = [(x.shape, "f4") for x in (a, b, c)]
    source = check(
        make_region("Sum", shapes, define=both), [a, b, c], lambda a, b, c: a.T * b + c[:, None], checked=True
    )
    assert loads(source, "x0") == 1 and "tile0" in source and "tile1" not in source


def test_evaluated_sizes() -> None:
    """Kernels of empty tensors are launched with no block at all."""
    for sizes in ({"m": 0, "n": 4}, {"m": 3, "n": 0}):
        x = array_of((sizes["m"], sizes["n"]), "f4")
        for region in (make_region("Exp", [((M, N), "f4")]), make_region("Softmax", [((M, N), "f4")])):
            region, lowered = lower(region)
            (found,) = run(region, lowered, TARGET, [x], sizes)
            assert found.shape == tuple(evaluate(d, sizes) for d in region.outputs[0][1].shape)


# As a GPU's own compiler sees them.


@pytest.mark.skipif(not nvrtc.is_available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("op", ["Softmax", "LayerNormalization", "columns"])
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_rows_keep_to_registers(op: str, dtype: str) -> None:
    """No spills, and so few registers that a thousand threads of a multiprocessor have them; across memory, where each
    keeps vectors, two thirds of that."""
    texts: dict[str, str] = {}
    for length in (768, 4096, 16384):
        if op == "columns":
            region = make_region("Softmax", [((8, length // 64, 512), dtype)], {"axis": 1})
        else:
            shapes = [((512, length), dtype), *[((length,), dtype)] * (2 * (op == "LayerNormalization"))]
            region = make_region(op, shapes)
        _, lowered = lower(region)
        for kernel in numbered(lowered):
            name = f"{kernel.name}_{length}"
            texts[name] = render_kernel(replace(kernel, name=name))
    for name, result in nvrtc.compile_kernels(prelude(), texts, "sm_90").items():
        found = result.resources[name]
        assert found.spill_store_bytes == found.spill_load_bytes == 0, name
        assert found.registers <= (96 if op == "columns" else 64), name
