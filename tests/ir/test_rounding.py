"""f16 and bf16 are rounded at each operator, also inside a fused kernel."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnxc
import pytest
from onnx import TensorProto, helper, numpy_helper

TYPES = {"f16": (np.float16, TensorProto.FLOAT16), "bf16": (ml_dtypes.bfloat16, TensorProto.BFLOAT16)}


def chain(element: int, constant: np.ndarray) -> bytes:
    """(x * c + x) / c - x, all of one element type."""
    nodes = [
        helper.make_node("Mul", ["x", "c"], ["m"]),
        helper.make_node("Add", ["m", "x"], ["a"]),
        helper.make_node("Div", ["a", "c"], ["d"]),
        helper.make_node("Sub", ["d", "x"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, element, [257]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", value[:1], value[1:], [numpy_helper.from_array(constant, "c")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString()


@pytest.mark.parametrize("name", TYPES)
def test_fused_chain_rounds_as_its_operators_do(name: str) -> None:
    dtype, element = TYPES[name]
    x = np.random.default_rng(0).standard_normal(257).astype(dtype)
    c = np.array(1.7, dtype)
    executable = onnxc.compile(chain(element, c))
    assert executable.dump("kernels").count("kernel ") == 1
    expected = ((x * c + x) / c - x).astype(dtype)
    assert executable(x).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", TYPES)
def test_fused_chain_on_a_gpu(name: str, gpu: None) -> None:
    dtype, element = TYPES[name]
    x = np.random.default_rng(1).standard_normal(257).astype(dtype)
    c = np.array(0.3, dtype)
    result = np.asarray(onnxc.compile(chain(element, c), target="cuda")(x))
    assert result.tobytes() == ((x * c + x) / c - x).astype(dtype).tobytes()
