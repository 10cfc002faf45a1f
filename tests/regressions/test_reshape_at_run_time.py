"""Reshape to a shape that only the run tells: 0 keeps an extent, -1 takes what the others leave."""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from onnx import TensorProto, helper


def model(allowzero: int, elements: list[str]) -> bytes:
    """x [a, 3, 4] reshaped to what `elements` gives: the parts of the shape, each an input or "-1"."""
    nodes = [helper.make_node("Constant", [], ["-1"], value_ints=[-1])] if "-1" in elements else []
    nodes += [
        helper.make_node("Concat", elements, ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"], allowzero=allowzero),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", 3, 4])]
    inputs += [helper.make_tensor_value_info(e, TensorProto.INT64, [1]) for e in elements if e != "-1"]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(elements))]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [([0, -1], (2, 12)), ([-1, 0], (8, 3)), ([6, 4], (6, 4)), ([-1, 24], (1, 24)), ([3, -1], (3, 8))],
)
def test_zero_and_free_extents(shape: list[int], expected: tuple[int, ...]) -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    compiled = onnxc.compile(model(0, ["p", "q"]))
    result = compiled(x, *(np.array([number]) for number in shape))
    np.testing.assert_array_equal(result, x.reshape(expected))


def test_a_free_extent_that_the_model_fixes() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    compiled = onnxc.compile(model(0, ["p", "-1"]))
    for p in (0, 1, 3, 8):
        np.testing.assert_array_equal(compiled(x, np.array([p])), x.reshape(p or 2, -1))


def test_allowzero() -> None:
    x = np.empty((0, 3, 4), np.float32)
    compiled = onnxc.compile(model(1, ["p", "q", "r"]))
    assert compiled(x, np.array([5]), np.array([0]), np.array([7])).shape == (5, 0, 7)
