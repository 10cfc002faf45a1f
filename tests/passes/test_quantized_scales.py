"""Scales of quantization moved into products: what is folded, what is left, and how often a value becomes another."""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxc.ir.text import print_graph
from pass_checks import filecheck, parsed, transformed

RANDOM = np.random.default_rng(0)
PRODUCT = """
graph @g(%x: u8[5, 64]) -> (%y: {kind}[5, 8]) {{
  %s = constant 0.02 : f32[]
  %w = constant @"w" : i8[64, 8]
  %t = constant 0.3 : f32[]
  %zero = constant 3 : {kind}[]
  %x.real = DequantizeLinear(%x, %s) : f32[5, 64]
  %w.real = DequantizeLinear(%w, %s) : f32[64, 8]
  %p = MatMul(%x.real, %w.real) : f32[5, 8]
  %a = Relu(%p) : f32[5, 8]
  %y = QuantizeLinear(%a, %t, %zero) : {kind}[5, 8]
}}
"""
WEIGHTS = RANDOM.integers(-127, 128, (64, 8)).astype(np.int8)


def test_the_scale_goes_into_the_product() -> None:
    after = transformed("quantization", parsed(PRODUCT.format(kind="u8"), {"w": WEIGHTS}))
    filecheck(
        """
        // CHECK: MatMulInteger
        // CHECK: %[[ONE:.*]] = constant 1.0
        // CHECK: Mul(
        // CHECK: QuantizeLinear(%{{.*}}, %[[ONE]], %zero)
        """,
        print_graph(after),
    )


@pytest.mark.parametrize(("pipeline", "kind"), [("quantization{exact=True}", "u8"), ("quantization", "i16")])
def test_where_it_stays(pipeline: str, kind: str) -> None:
    """Exact results, and those of so many steps that the last bit of a real decides of many."""
    after = transformed(pipeline, parsed(PRODUCT.format(kind=kind), {"w": WEIGHTS}))
    filecheck("// CHECK: QuantizeLinear(%{{.*}}, %t, %zero)", print_graph(after))


def test_few_values_become_others_by_one_step() -> None:
    """Of a product that is quantized, against the definition in f64."""
    rows, depth, columns = 400, 96, 200
    x, w = RANDOM.integers(0, 256, (rows, depth)).astype(np.uint8), RANDOM.integers(-127, 128, (depth, columns))
    scale, step, own = np.float32(0.0173), np.float32(0.371), RANDOM.uniform(1e-3, 2e-3, columns).astype(np.float32)
    constants = {"sx": scale, "w": w.astype(np.int8), "sw": own, "t": step, "z": np.uint8(128)}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "sx"], ["xr"]),
        helper.make_node("DequantizeLinear", ["w", "sw"], ["wr"], axis=1),
        helper.make_node("MatMul", ["xr", "wr"], ["p"]),
        helper.make_node("QuantizeLinear", ["p", "t", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [rows, columns])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    found = onnxc.compile(model)(x).astype(int)
    real = (x.astype(np.int64) @ w) * (np.float64(scale) * own.astype(np.float64)) / np.float64(step)
    wanted = np.clip(np.rint(real) + 128, 0, 255).astype(int)
    assert np.abs(found - wanted).max() <= 1
    assert np.mean(found != wanted) < 1e-3
