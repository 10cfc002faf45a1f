"""Resize to a size that only the run tells may be to one element, whose place some modes define apart."""

from __future__ import annotations

import numpy as np
import onnxc
import onnxruntime
import pytest
from onnx import TensorProto, helper


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("place", ["pytorch_half_pixel", "tf_crop_and_resize", "align_corners"])
def test_sizes_of_the_run(mode: str, place: str) -> None:
    nodes = [helper.make_node("Resize", ["x", "roi", "", "s"], ["y"], mode=mode, coordinate_transformation_mode=place)]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, "h", "w"]),
        helper.make_tensor_value_info("s", TensorProto.INT64, [4]),
    ]
    roi = helper.make_tensor("roi", TensorProto.FLOAT, [8], [0, 0, 0.1, 0.2, 1, 1, 0.7, 0.9])
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [roi])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()
    compiled, session = onnxc.compile(model), onnxruntime.InferenceSession(model)
    for size in ((3, 1), (1, 1), (1, 6), (5, 7)):
        fed = {"x": np.random.default_rng(0).random((1, 1, 4, 5), np.float32), "s": np.array([1, 1, *size])}
        np.testing.assert_allclose(compiled.run(fed)["y"], session.run(None, fed)[0], rtol=1e-5, atol=1e-5)
