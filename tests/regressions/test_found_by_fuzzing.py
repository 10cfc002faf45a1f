"""What fuzzing found, each shrunk to a few nodes and named."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxc
import pytest
from onnx import TensorProto, helper, numpy_helper
from single_node import assert_equal, model_of, reference, run_node


def test_shape_of_no_axes() -> None:
    """`start` and `end` may leave nothing, and a scalar has nothing."""
    for x, attributes in ((np.float32(3), {}), (np.zeros((2, 3), np.float32), {"start": 1, "end": -3})):
        for symbolic in (False, True):
            (found,) = run_node("Shape", {"x": np.asarray(x)}, symbolic=symbolic, **attributes)
            assert (found.dtype, found.shape) == (np.int64, (0,))


def test_tiles_of_an_empty_axis() -> None:
    """The axis of no elements is repeated too."""
    x = np.zeros((3, 0, 2), np.float64)
    for symbolic in (False, True):
        (found,) = run_node("Tile", {"x": x, "repeats": np.array([2, 3, 1])}, constant=["repeats"], symbolic=symbolic)
        assert found.shape == (6, 0, 2)


def test_name_of_an_output_of_unknown_size() -> None:
    """An output that is another name of a value whose size only the run tells keeps its own name."""
    x = np.array([3.0, 1.0, 3.0, 2.0], np.float32)
    nodes = [
        helper.make_node("Unique", ["x"], ["u"]),
        helper.make_node("Identity", ["u"], ["z"]),
        helper.make_node("NonZero", ["x"], ["u_count"]),
        helper.make_node("Identity", ["u_count"], ["places"]),
    ]
    model = model_of(nodes, {"x": x}, {}, ["z", "places"])
    found = onnxc.compile(model).run({"x": x})
    assert list(found) == ["z", "places"]
    assert_equal(list(found.values()), reference(model, {"x": x}))


def test_folded_erf_of_doubles() -> None:
    """What is folded is as exact as what is compiled; onnx.reference rounds Erf to f32."""
    x = np.array([-1.1628236650302777, 0.5, np.nan, np.inf])
    (folded,) = run_node("Erf", {"x": x}, constant=["x"])
    np.testing.assert_array_max_ulp(folded[:2], np.array([math.erf(v) for v in x[:2]]), 2)
    assert np.isnan(folded[2]) and folded[3] == 1
    (empty,) = run_node("Erf", {"x": x[:0]}, constant=["x"])
    assert empty.shape == (0,) and empty.dtype == np.float64


def test_space_to_depth_of_nothing() -> None:
    """Indices are divided by the number of channels, of which there are none."""
    x = np.zeros((4, 0, 6, 4), np.float32)
    for op, wanted in (("SpaceToDepth", (4, 0, 3, 2)), ("DepthToSpace", (4, 0, 12, 8))):
        for symbolic in (False, True):
            (found,) = run_node(op, {"x": x}, symbolic=symbolic, blocksize=2)
            assert found.shape == wanted


@pytest.mark.parametrize("op", ["LeakyRelu", "Selu", "HardSigmoid"])
def test_default_attributes_of_doubles(op: str) -> None:
    """Attributes are f32, their defaults too: 0.01 is 0.009999999776 for tensors of doubles."""
    x = np.linspace(-3, 3, 2 * 5 * 3 * 2).reshape(2, 5, 3, 2)
    nodes = [helper.make_node(op, ["x"], ["y"])]
    model = model_of(nodes, {"x": x}, {}, ["y"], opset=22)
    (found,), (wanted,) = onnxc.compile(model).run({"x": x}).values(), reference(model, {"x": x})
    np.testing.assert_allclose(found, wanted, rtol=1e-14)


def test_blocks_of_a_vector() -> None:
    """A vector's scales are a vector too, one for each block, the last of which may be shorter."""
    x, scale = np.array([10, 20, 30], np.uint8), np.array([0.5, 2.0], np.float32)
    (found,) = run_node("DequantizeLinear", {"x": x, "scale": scale}, axis=0, block_size=2)
    np.testing.assert_array_equal(found, np.array([5, 10, 60], np.float32))


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layer_of_features_known_at_the_run(op: str, gates: int) -> None:
    """How many features there are is told by the constant weights alone; the recurrent weights are an input."""
    random = np.random.default_rng(0)
    weights = {"w": random.random((1, gates * 3, 2), np.float32)}
    inputs = {"shape": np.array([4, 5, 2]), "r": random.random((1, gates * 3, 3), np.float32)}
    value = onnx.numpy_helper.from_array(np.array([0.5], np.float32))
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["x"], value=value),
        helper.make_node(op, ["x", "w", "r"], ["y"], hidden_size=3),
    ]
    model = model_of(nodes, inputs, weights, ["y"])
    (found,) = onnxc.compile(model).run(inputs).values()
    np.testing.assert_allclose(found, reference(model, inputs)[0], rtol=1e-5)


def test_guards_of_nested_selects() -> None:
    """Concatenations of slices of concatenations, 12 deep: what both ways of a select compute is found once."""
    nodes, last = [], "x"
    for level in range(12):
        nodes += [
            helper.make_node("Slice", [last, "one", "five"], [f"s{level}"]),
            helper.make_node("Concat", [f"s{level}", last], [f"c{level}"], axis=0),
            helper.make_node("Slice", [f"c{level}", "one", "nine"], [f"t{level}"]),
            helper.make_node("Sin", [f"t{level}"], [f"y{level}"]),
        ]
        last = f"y{level}"
    constants = {"one": np.array([1]), "five": np.array([5]), "nine": np.array([9])}
    inputs = {"x": np.linspace(0, 1, 8, dtype=np.float32)}
    model = model_of(nodes, inputs, constants, [last])
    (found,) = onnxc.compile(model).run(inputs).values()
    np.testing.assert_allclose(found, reference(model, inputs)[0], rtol=1e-5)


def test_large_integers_in_shape_arithmetic() -> None:
    """Small constants are computed as sizes are: exactly, also beyond the 53 bits of a float."""
    x = np.array([11363327242501776300, 17536870465794137657], np.uint64)
    nodes = [helper.make_node("CumSum", ["x", "axis"], ["y"], exclusive=1)]
    constants = [numpy_helper.from_array(x, "x"), numpy_helper.from_array(np.array(0), "axis")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.UINT64, [2])]
    graph = helper.make_graph(nodes, "g", [], outputs, constants)
    (y,) = onnxc.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])).run({}).values()
    np.testing.assert_array_equal(y, [0, x[0]])


def test_transposed_convolution_with_outputs_that_no_tap_reaches() -> None:
    x, w = np.ones((1, 5, 1), np.float32), np.arange(15, dtype=np.float32).reshape(5, 3, 1)
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], kernel_shape=[1], strides=[3])
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5, 1])]
    constants = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.ones(3, np.float32), "b")]
    graph = helper.make_graph([node], "g", inputs, [helper.make_empty_tensor_value_info("y")], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    np.testing.assert_array_equal(onnxc.compile(model)(x)[0, :, 0], w.sum((0, 2)) + 1)
