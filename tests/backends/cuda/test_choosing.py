"""Running sums, top-k, lists of chosen elements and scattered updates on a GPU, by the emulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from cuda_lowered import Array, lowered_graph, run_program
from onnx import helper
from onnxc.backends.cuda.source import render_kernels
from onnxc.compiler.driver import graph_of
from onnxc.compiler.options import Options
from onnxc.ir.program import Program
from onnxc.ir.target import Target
from single_node import model_of

TARGET = Target.parse("cuda:sm_90")


def program_of(
    op: str,
    inputs: Mapping[str, Array],
    constants: Mapping[str, Array],
    outputs: int,
    symbolic: bool,
    order: Sequence[str] = (),
    **attributes: Any,
) -> Program:
    names = [f"output{number}" for number in range(outputs)]
    node = helper.make_node(op, list(order) or [*inputs, *constants], names, **attributes)
    return lowered_graph(graph_of(model_of([node], inputs, constants, names, symbolic), Options()), TARGET)


def run_node(
    op: str,
    inputs: Mapping[str, Array],
    constants: Mapping[str, Array],
    outputs: int = 1,
    symbolic: bool = False,
    checked: bool = False,
    seed: int = 0,
    order: Sequence[str] = (),
    **attributes: Any,
) -> list[Array]:
    program = program_of(op, inputs, constants, outputs, symbolic, order, **attributes)
    return run_program(program, [inputs[value.name] for value in program.inputs], checked, seed)


# Running sums.


def running(x: Array, axis: int, reverse: bool, exclusive: bool) -> Array:
    wide = x.astype(np.float64) if x.dtype.kind == "f" else x
    wide = np.flip(wide, axis) if reverse else wide
    found = np.cumsum(wide, axis)
    if exclusive:
        found = found - wide
    return np.flip(found, axis) if reverse else found


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 50), 1), ((2, 1000), 1), ((2, 5000), 1), ((1, 40000), 1), ((7, 5, 9), 1), ((2, 2000, 3), 1)],
)
@pytest.mark.parametrize(("reverse", "exclusive"), [(0, 0), (1, 1)])
def test_running_sums(shape: tuple[int, ...], axis: int, reverse: int, exclusive: int) -> None:
    """By a warp, by a block, by many blocks; along memory and across it."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    constants = {"axis": np.array(axis)}
    small = x.size < 3000
    (found,) = run_node("CumSum", {"x": x}, constants, checked=small, reverse=reverse, exclusive=exclusive)
    wanted = running(x, axis, bool(reverse), bool(exclusive))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["int64", "int32", "float16", "float64"])
def test_running_sums_of_types(dtype: str) -> None:
    x = np.random.default_rng(0).integers(-3, 4, (3, 300)).astype(dtype)
    (found,) = run_node("CumSum", {"x": x}, {"axis": np.array(1)}, symbolic=dtype == "int32")
    np.testing.assert_array_equal(found, running(x, 1, False, False).astype(dtype))


def test_neighbours_of_a_line_move_together() -> None:
    x = np.zeros((2, 1024), np.float32)
    program = program_of("CumSum", {"x": x}, {"axis": np.array(1)}, 1, False)
    text = render_kernels(tuple(program.kernels.values()))
    assert "*(const Pack<float, 4>*)(x0" in text and "*(Pack<float, 4>*)(y0" in text and "shuffle_up" in text


# The best elements.


def best(x: Array, count: int, largest: bool, axis: int = -1) -> tuple[Array, Array]:
    """Ties in order of their numbers; NaN is greater than any number."""
    wide = x.astype(np.float64) if x.dtype.kind == "f" else x.astype(np.int64)
    wide = np.where(np.isnan(wide), np.inf, wide) if x.dtype.kind == "f" else wide
    order = np.argsort(-wide if largest else wide, axis=axis, kind="stable")
    order = np.take(order, np.arange(count), axis)
    return np.take_along_axis(x, order, axis), order


def check_best(x: Array, count: int, largest: bool = True, axis: int = -1, **how: Any) -> None:
    constants = {"k": np.array([count])}
    found = run_node("TopK", {"x": x}, constants, 2, axis=axis, largest=int(largest), **how)
    values, numbers = best(x, count, largest, axis)
    np.testing.assert_array_equal(found[1], numbers)
    np.testing.assert_array_equal(found[0], values)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (8, 2), (500, 5), (1000, 1000), (2500, 37), (9000, 1000)])
def test_best_elements(length: int, count: int) -> None:
    """Sorted whole, or selected and sorted; with many ties."""
    x = np.round(np.random.default_rng(0).standard_normal((3, length)) * 9).astype(np.float32)
    check_best(x, count, checked=length < 1000, seed=3)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float64", "int64", "int32", "int8", "uint8"])
@pytest.mark.parametrize("length", [40, 2100])
def test_best_elements_of_types(dtype: str, largest: bool, length: int) -> None:
    random = np.random.default_rng(0)
    low, high = (0, 200) if dtype == "uint8" else (-100, 100)
    check_best(random.integers(low, high, (2, length)).astype(dtype), 12, largest)


@pytest.mark.parametrize("length", [60, 2100])
def test_zeros_and_what_is_no_number(length: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, length)).astype(np.float32)
    x[:, ::7], x[:, 3::7], x[:, 4::7] = np.nan, -0.0, 0.0
    check_best(x, 30, True)
    check_best(x, 30, False)


def test_best_elements_across_memory_and_of_any_size() -> None:
    x = np.random.default_rng(0).integers(0, 50, (2, 70, 3)).astype(np.float32)
    check_best(x, 9, axis=1, checked=True)
    check_best(x, 9, axis=1, symbolic=True)


# Elements that a condition chooses.


@pytest.mark.parametrize(("shape", "share"), [((4, 500), 0.3), ((3, 70, 50), 0.9), ((10,), 0.0), ((2, 3), 1.0)])
@pytest.mark.parametrize("symbolic", [False, True])
def test_numbers_of_what_is_not_zero(shape: tuple[int, ...], share: float, symbolic: bool) -> None:
    x = np.random.default_rng(0).random(shape) < share
    (found,) = run_node("NonZero", {"x": x}, {}, symbolic=symbolic, checked=x.size < 3000)
    np.testing.assert_array_equal(found, np.array(np.nonzero(x)))


@pytest.mark.parametrize(("axis", "length"), [(0, 25), (1, 3000), (None, 500)])
def test_compressed(axis: int | None, length: int) -> None:
    random = np.random.default_rng(0)
    x, condition = random.standard_normal((30, 3000)).astype(np.float32), random.random(length) < 0.4
    attributes = {} if axis is None else {"axis": axis}
    (found,) = run_node("Compress", {"x": x, "condition": condition}, {}, **attributes)
    np.testing.assert_array_equal(found, np.compress(condition, x, axis))


# Updates.

COMBINED = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def scattered(x: Array, where: Sequence[tuple[Any, ...]], values: Sequence[Array], reduction: str) -> Array:
    """One update after another."""
    result = x.copy()
    for index, value in zip(where, values, strict=True):
        result[index] = value if reduction == "none" else COMBINED[reduction](result[index], value)
    return result


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reduction", ["none", *COMBINED])
def test_scattered_elements(reduction: str, axis: int) -> None:
    """The last of several updates of an element counts; sums of floats are formed in order, to the same bits."""
    random = np.random.default_rng(0)
    x, updates = (random.standard_normal(shape).astype(np.float32) for shape in ((9, 12), (7, 10)))
    indices = random.integers(-x.shape[axis], x.shape[axis], updates.shape)
    where = [tuple(int(indices[i]) if a == axis else i[a] for a in range(2)) for i in np.ndindex(updates.shape)]
    wanted = scattered(x, where, updates.reshape(-1), reduction)
    inputs = {"x": x, "indices": indices, "updates": updates}
    for seed in (0, 3):
        (found,) = run_node("ScatterElements", inputs, {}, axis=axis, reduction=reduction, checked=True, seed=seed)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float16"])
@pytest.mark.parametrize("reduction", ["none", "add", "max"])
def test_scattered_slices(reduction: str, dtype: str) -> None:
    random = np.random.default_rng(0)
    x, updates = (random.integers(0, 9, shape).astype(dtype) for shape in ((6, 5, 4), (8, 4)))
    indices = np.stack([random.integers(-6, 6, 8), random.integers(-5, 5, 8)], -1)
    wanted = scattered(x, [tuple(row) for row in indices], list(updates), reduction)
    inputs = {"x": x, "indices": indices, "updates": updates}
    (found,) = run_node("ScatterND", inputs, {}, reduction=reduction)
    np.testing.assert_array_equal(found, wanted)


def test_indices_known_to_differ_take_one_launch() -> None:
    x, updates = np.zeros((6, 4), np.float32), np.ones((3, 4), np.float32)
    order = ["x", "indices", "updates"]
    launches = []
    for rows in ([[1], [4], [0]], [[1], [4], [1]]):
        inputs, constants = {"x": x, "updates": updates}, {"indices": np.array(rows)}
        program = program_of("ScatterND", inputs, constants, 1, False, order)
        launches.append(sum(len(segment) for segment in program.segments))
        (found,) = run_program(program, [x, updates])
        np.testing.assert_array_equal(found, scattered(x, [tuple(row) for row in rows], list(updates), "none"))
    assert launches == [2, 4]  # A copy, the updates; before them what says whose each destination is.


def test_unpooled() -> None:
    x = np.arange(1, 5, dtype=np.float32).reshape(1, 1, 2, 2)
    indices = np.array([5, 7, 13, 15]).reshape(1, 1, 2, 2)
    (found,) = run_node("MaxUnpool", {"x": x, "i": indices}, {}, kernel_shape=[2, 2], strides=[2, 2], checked=True)
    wanted = np.zeros(16, np.float32)
    wanted[[5, 7, 13, 15]] = [1, 2, 3, 4]
    np.testing.assert_array_equal(found.reshape(-1), wanted)
