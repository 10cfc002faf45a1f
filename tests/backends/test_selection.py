"""TopK, NonZero, Compress, Unique against numpy, and what follows a result whose size the data decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxc
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from single_node import Array, assert_equal, compiled, model_of, reference, run_node

DTYPES = ("float32", "float64", "float16", "int8", "int32", "int64", "uint8", "uint64", "bool")


def samples(shape: tuple[int, ...], dtype: str, seed: int, distinct: int = 5, special: bool = False) -> Array:
    """Few distinct values, so that there are equal ones; with NaN, infinities and both zeros where wanted."""
    random = np.random.default_rng(seed)
    values: Array = (random.integers(0, distinct, shape) - distinct // 2).astype(dtype)
    if special and values.dtype.kind == "f" and values.size:
        odd = np.array([np.nan, np.inf, -np.inf, -0.0], dtype)
        values = np.where(random.random(shape) < 0.3, random.choice(odd, shape), values).astype(dtype)
    return values


shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


def expected_top_k(x: Array, k: int, axis: int, largest: int) -> list[Array]:
    """By a stable sort in which NaN is the greatest."""
    ranks = np.unique(x, return_inverse=True, equal_nan=True)[1].reshape(x.shape)
    order = np.argsort(-ranks if largest else ranks, axis=axis, kind="stable")
    picked = np.take(order, np.arange(k), axis)
    return [np.take_along_axis(x, picked, axis), picked]


@settings(max_examples=40, deadline=None)
@given(shapes, st.data())
def test_top_k(shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    k = data.draw(st.integers(0, shape[axis]))
    x = samples(shape, data.draw(st.sampled_from(DTYPES[:-1])), data.draw(st.integers(0, 99)), 9, True)
    largest = data.draw(st.integers(0, 1))
    operands = {"x": x, "k": np.array([k])}
    constant = ["k"] if data.draw(st.booleans()) else []
    symbolic = data.draw(st.booleans())
    found = run_node("TopK", operands, 2, constant, symbolic, axis=axis, largest=largest)
    assert_equal(found, expected_top_k(x, k, axis, largest))


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize(("rows", "extent", "k"), [(1, 3000, 7), (40, 1000, 1), (3, 700, 700), (2, 257, 100)])
def test_top_k_of_long_lines(rows: int, extent: int, k: int, largest: int, symbolic: bool) -> None:
    """Long enough to be looked through by chunks, with a NaN somewhere."""
    x = np.random.default_rng(k).standard_normal((rows, extent)).astype(np.float32)
    x[0, extent // 2] = np.nan
    found = run_node("TopK", {"x": x, "k": np.array([k])}, 2, ["k"], symbolic, largest=largest)
    assert_equal(found, expected_top_k(x, k, -1, largest))


def test_more_elements_wanted_than_there_are() -> None:
    with pytest.raises(onnxc.IndexRangeError, match="TopK"):
        run_node("TopK", {"x": np.arange(5, dtype=np.float32), "k": np.array([9])}, 2)


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from(DTYPES), st.booleans(), st.integers(0, 99))
def test_non_zero(shape: tuple[int, ...], dtype: str, symbolic: bool, seed: int) -> None:
    x = samples(shape, dtype, seed, 3, True)
    assert_equal(run_node("NonZero", {"x": x}, symbolic=symbolic), [np.array(np.nonzero(x))])


@settings(max_examples=30, deadline=None)
@given(shapes, st.data())
def test_compress(shape: tuple[int, ...], data: st.DataObject) -> None:
    x = samples(shape, data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 99)))
    axis = data.draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    extent = x.size if axis is None else shape[axis]
    condition = np.array(data.draw(st.lists(st.booleans(), min_size=1, max_size=extent)))
    attributes = {} if axis is None else {"axis": axis}
    found = run_node("Compress", {"x": x, "condition": condition}, symbolic=data.draw(st.booleans()), **attributes)
    assert_equal(found, [np.compress(condition, x, axis)])


def expected_unique(x: Array, axis: int | None, is_sorted: int) -> list[Array]:
    values, first, inverse, counts = np.unique(x, True, True, True, axis)
    if not is_sorted:
        order = np.argsort(first)
        values, first, counts = np.take(values, order, axis or 0), first[order], counts[order]
        inverse = np.argsort(order)[inverse.reshape(-1)]
    return [values, first, inverse.reshape(-1), counts]


@settings(max_examples=40, deadline=None)
@given(shapes, st.data())
def test_unique(shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    x = samples(shape, data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 99)), 3, axis is None)
    is_sorted = data.draw(st.integers(0, 1))
    attributes: dict[str, Any] = {"sorted": is_sorted} | ({} if axis is None else {"axis": axis})
    found = run_node("Unique", {"x": x}, 4, symbolic=data.draw(st.booleans()), **attributes)
    assert_equal(found, expected_unique(x, axis, is_sorted))


def test_unique_of_many() -> None:
    x = np.random.default_rng(0).integers(0, 400, 5000)
    for is_sorted in (0, 1):
        assert_equal(run_node("Unique", {"x": x}, 4, sorted=is_sorted), expected_unique(x, None, is_sorted))


def after_non_zero(x: npt.NDArray[Any], symbolic: bool) -> tuple[Any, dict[str, Array]]:
    """Elements picked by NonZero and GatherND, then a reduction and a broadcast over their unknown number."""
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["mask"]),
        helper.make_node("NonZero", ["mask"], ["where"]),
        helper.make_node("Transpose", ["where"], ["pairs"], perm=[1, 0]),
        helper.make_node("GatherND", ["x", "pairs"], ["picked"]),
        helper.make_node("Exp", ["picked"], ["powers"]),
        helper.make_node("ReduceSum", ["powers"], ["total"], keepdims=1),
        helper.make_node("Div", ["powers", "total"], ["shares"]),
        helper.make_node("Unsqueeze", ["shares", "axes"], ["column"]),
        helper.make_node("MatMul", ["column", "ones"], ["table"]),
        helper.make_node("Shape", ["table"], ["size"]),
    ]
    constants = {"zero": np.zeros((), np.float32), "axes": np.array([1]), "ones": np.ones((1, 3), np.float32)}
    outputs = ["pairs", "shares", "table", "size"]
    return model_of(nodes, {"x": x}, constants, outputs, symbolic), {"x": x}


@pytest.mark.parametrize("symbolic", [False, True])
def test_sizes_found_by_the_run_go_on(symbolic: bool) -> None:
    random = np.random.default_rng(1)
    model, inputs = after_non_zero(random.standard_normal((6, 7)).astype(np.float32), symbolic)
    executable = onnxc.compile(model)
    sizes = [(6, 7), (6, 7), (2, 90), (1, 1)] if symbolic else [(6, 7)] * 3
    for shape in sizes:
        inputs = {"x": random.standard_normal(shape).astype(np.float32) + np.float32(0.1)}
        for found, wanted in zip(executable.run(inputs).values(), reference(model, inputs), strict=True):
            assert found.shape == wanted.shape
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_nothing_found() -> None:
    model, inputs = after_non_zero(np.full((3, 4), -1, np.float32), False)
    pairs, shares, table, size = compiled(model, inputs)
    assert pairs.shape == (0, 2) and shares.shape == (0,) and table.shape == (0, 3)
    np.testing.assert_array_equal(size, [0, 3])


def test_one_unknown_size_decides_another() -> None:
    """The elements that one mask picks are masked again."""
    nodes = [
        helper.make_node("Compress", ["x", "mask"], ["kept"]),
        helper.make_node("Greater", ["kept", "limit"], ["second"]),
        helper.make_node("Compress", ["kept", "second"], ["twice"]),
        helper.make_node("Concat", ["kept", "twice"], ["both"], axis=0),
        helper.make_node("TopK", ["both", "k"], ["values", "indices"], axis=0),
    ]
    random = np.random.default_rng(3)
    inputs = {"x": random.standard_normal(50).astype(np.float32), "mask": random.random(50) < 0.5}
    constants = {"limit": np.zeros((), np.float32), "k": np.array([3])}
    model = model_of(nodes, inputs, constants, ["kept", "twice", "values", "indices"])
    assert_equal(compiled(model, inputs), reference(model, inputs))


def test_onnx_runtime_agrees_about_unique_and_top_k() -> None:
    x = samples((40, 6), "float32", 5)
    nodes = [
        helper.make_node("Unique", ["x"], ["a", "b", "c", "d"], axis=0, sorted=0),
        helper.make_node("TopK", ["x", "k"], ["values", "indices"], axis=0),
    ]
    model = model_of(nodes, {"x": x}, {"k": np.array([9])}, ["a", "b", "c", "d", "values", "indices"], opset=21)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert_equal(compiled(model, {"x": x}), session.run(None, {"x": x}))


def test_text_is_run_by_python() -> None:
    text = np.array(["b", "a", "b"], object)
    model = model_of([helper.make_node("Unique", ["x"], ["y"])], {"x": text}, {}, ["y"])
    executable = onnxc.compile(model)
    assert executable(text).tolist() == ["a", "b"]
    with pytest.raises(onnxc.UnsupportedError, match="Unique"):
        executable.save("never.onnxc")
