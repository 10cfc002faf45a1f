"""Gathers whose indices are gathered: a binary search, as exporters of quantile transforms write it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxc
import pytest
from onnx import helper, numpy_helper


def search(count: int) -> onnx.ModelProto:
    """Where each number lies among 0, 1, ... count - 1, by log2(count) steps."""
    nodes, low, step, constants = [], "zero", count // 2, {"zero": np.array(0)}
    constants["keys"] = np.arange(count, dtype=np.float32)
    while step:
        constants[f"step{step}"] = np.array(step)
        nodes += [
            helper.make_node("Add", [low, f"step{step}"], [f"middle{step}"]),
            helper.make_node("Gather", ["keys", f"middle{step}"], [f"key{step}"]),
            helper.make_node("LessOrEqual", [f"key{step}", "x"], [f"below{step}"]),
            helper.make_node("Where", [f"below{step}", f"middle{step}", low], [f"low{step}"]),
        ]
        low, step = f"low{step}", step // 2
    nodes.append(helper.make_node("Identity", [low], ["y"]))
    graph = helper.make_graph(
        nodes,
        "search",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.INT64, ["n"])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.mark.parametrize("count", (4, 64, 1024))
def test_binary_search(count: int) -> None:
    x = np.random.default_rng(count).uniform(0, count, 100).astype(np.float32)
    np.testing.assert_array_equal(onnxc.compile(search(count)).run({"x": x})["y"], np.floor(x))
