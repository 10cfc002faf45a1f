"""ScatterElements, ScatterND and MaxUnpool against the loops of ONNX's documentation in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from single_node import Array, assert_equal, compiled, model_of, reference, run_node

COMBINED = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
REDUCTIONS = ("none", *COMBINED)
DTYPES = ("float32", "float64", "float16", "int32", "int64", "uint8")
shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def combine(reduction: str, result: Array, where: tuple[Any, ...], value: Array) -> None:
    result[where] = value if reduction == "none" else COMBINED[reduction](result[where], value)


def numbers(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 9, shape).astype(dtype)


@settings(max_examples=40, deadline=None)
@given(shapes, st.data())
def test_scatter_elements(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Negative indices, several updates of one element, fewer updates than elements along other axes."""
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    extents = tuple(data.draw(st.integers(0, extent + 2 * (a == axis % len(shape)))) for a, extent in enumerate(shape))
    seed, dtype = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(DTYPES))
    limit = shape[axis]
    indices = np.random.default_rng(seed).integers(-limit, limit, extents)
    indices = indices.astype(data.draw(st.sampled_from(["int32", "int64"])))
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    x, updates = numbers(shape, dtype, seed), numbers(extents, dtype, seed + 1)
    wanted = x.copy()
    for where in np.ndindex(extents):
        target = list(where)
        target[axis] = int(indices[where])
        combine(reduction, wanted, tuple(target), updates[where])
    operands = {"x": x, "indices": indices, "updates": updates}
    symbolic = data.draw(st.booleans())
    constant = data.draw(st.sampled_from([(), ("x",), ("indices",)]))
    found = run_node("ScatterElements", operands, constant=constant, symbolic=symbolic, axis=axis, reduction=reduction)
    assert_equal(found, [wanted])


@settings(max_examples=40, deadline=None)
@given(shapes, st.data())
def test_scatter_nd(shape: tuple[int, ...], data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, len(shape)))
    outer = tuple(data.draw(st.lists(st.integers(0, 4), min_size=0, max_size=2)))
    seed, dtype = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(DTYPES))
    random = np.random.default_rng(seed)
    indices = np.stack([random.integers(-d, d, outer) for d in shape[:depth]], -1).astype(np.int64)
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    x, updates = numbers(shape, dtype, seed), numbers((*outer, *shape[depth:]), dtype, seed + 1)
    wanted = x.copy()
    for where in np.ndindex(outer):
        combine(reduction, wanted, tuple(indices[where]), updates[where])
    operands = {"x": x, "indices": indices, "updates": updates}
    symbolic = data.draw(st.booleans()) and depth == indices.ndim  # the depth itself cannot be a symbol
    constant = data.draw(st.sampled_from([(), ("x",), ("indices",)])) if not symbolic else ("indices",)
    assert_equal(run_node("ScatterND", operands, constant=constant, symbolic=symbolic, reduction=reduction), [wanted])


def test_many_updates_are_shared_among_threads() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((64, 40, 32)).astype(np.float32)
    indices = random.integers(0, 40, (64, 50, 32))
    updates = random.standard_normal(indices.shape).astype(np.float32)
    model = model_of(
        [helper.make_node("ScatterElements", ["x", "i", "u"], ["y"], axis=1, reduction="max")],
        inputs := {"x": x, "i": indices, "u": updates},
        {},
        ["y"],
    )
    assert_equal(compiled(model, inputs), reference(model, inputs))


def test_what_feeds_a_scatter_and_what_follows_it() -> None:
    """The operands are computed, and the result goes on."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("ArgMax", ["x"], ["i"], axis=1, keepdims=1),
        helper.make_node("ReduceMax", ["x", "axes"], ["u"], keepdims=1),
        helper.make_node("ScatterElements", ["a", "i", "u"], ["s"], axis=1),
        helper.make_node("Exp", ["s"], ["y"]),
    ]
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    model = model_of(nodes, {"x": x}, {"axes": np.array([1])}, ["s", "y"], symbolic=True)
    for found, wanted in zip(compiled(model, {"x": x}), reference(model, {"x": x}), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("given_shape", [None, (2, 3, 7, 8)])
@pytest.mark.parametrize("symbolic", [False, True])
def test_max_unpool(given_shape: tuple[int, ...] | None, symbolic: bool) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 3, 6, 6)).astype(np.float32)
    pooling = helper.make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2, 2], strides=[2, 2])
    pooled, indices = reference(model_of([pooling], {"x": x}, {}, ["y", "i"]), {"x": x})
    node = helper.make_node(
        "MaxUnpool", ["y", "i", "s"][: 3 if given_shape else 2], ["z"], kernel_shape=[2, 2], strides=[2, 2]
    )
    constants = {"s": np.array(given_shape)} if given_shape else {}
    inputs = {"y": pooled, "i": indices}
    model = model_of([node], inputs, constants, ["z"], symbolic)
    wanted = np.zeros(given_shape or x.shape, np.float32)
    wanted[:, :, :6, :6] = np.where(np.isin(np.arange(x.size), indices).reshape(x.shape), x, 0)
    assert_equal(compiled(model, inputs), [wanted])


def test_an_unknown_reduction_is_refused() -> None:
    x = np.zeros(3, np.float32)
    with pytest.raises(onnxc.ModelError, match="median"):
        run_node("ScatterElements", {"x": x, "i": np.array([0]), "u": x[:1]}, reduction="median")
