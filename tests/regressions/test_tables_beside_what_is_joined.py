"""A function of bytes that is computed by a table, joined along channels with something else in one kernel.

The lanes that another part of the result takes were masked in the vectors of the table too, so that bytes were looked
up among zeros. A skip connection beside a quantised activation looks so.
"""

from __future__ import annotations

import numpy as np
import onnxc
import onnxruntime
import pytest
from onnx import helper, numpy_helper


@pytest.mark.parametrize("target", ["host", "x86-64-v4", "x86-64-v3", "x86-64"])
@pytest.mark.parametrize("order", [["a", "q"], ["q", "a"], ["q", "a", "q"]])
def test_channels_of_a_table_and_others(order: list[str], target: str) -> None:
    constants = {"s": np.float32(0.03), "t": np.float32(1 / 256), "z": np.uint8(100)}
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["x", "s", "z"], ["d"]),
            helper.make_node("Sigmoid", ["d"], ["e"]),
            helper.make_node("QuantizeLinear", ["e", "t", "z"], ["q"]),
            helper.make_node("Concat", order, ["y"], axis=2),
        ],
        "joined",
        [helper.make_tensor_value_info(n, 2, ["batch", 16, c]) for n, c in (("a", 16), ("x", 3))],
        [helper.make_tensor_value_info("y", 2, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    random = np.random.default_rng(0)
    inputs = {n: random.integers(0, 256, (2, 16, c)).astype(np.uint8) for n, c in (("a", 16), ("x", 3))}
    (wanted,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)
    (found,) = onnxc.compile(model, target=target, threads=1).run(inputs).values()
    np.testing.assert_array_equal(found, wanted)
