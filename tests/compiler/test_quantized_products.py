"""Quantized models compiled: beside what ONNX defines, in reals, a result is another byte at most now and then."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxc
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxc.compiler.options import Options, target_of

RARE = 1e-3
"""The share of bytes that may be another one."""


@dataclass
class Building:
    """A model in the form that quantizers write: QuantizeLinear and DequantizeLinear around each operator."""

    random: np.random.Generator
    dtype: type = np.uint8
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    count: int = 0

    def constant(self, array: np.ndarray) -> str:
        self.count += 1
        self.constants.append(numpy_helper.from_array(np.asarray(array), f"c{self.count}"))
        return f"c{self.count}"

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        self.count += 1
        self.nodes.append(helper.make_node(op, inputs, [f"v{self.count}"], **attributes))
        return f"v{self.count}"

    def quantize(self, x: str, scale: float, zero: int) -> tuple[str, list[str]]:
        parameters = [self.constant(np.float32(scale)), self.constant(np.array(zero, self.dtype))]
        return self.node("QuantizeLinear", x, *parameters), parameters

    def between(self, x: str, scale: float, zero: int) -> str:
        q, parameters = self.quantize(x, scale, zero)
        return self.node("DequantizeLinear", q, *parameters)

    def weights(self, *shape: int, axis: int = 0, zero: bool = False) -> tuple[str, np.ndarray]:
        """Dequantized weights, and their scales along the axis."""
        values = self.random.integers(-127, 128, shape).astype(np.int8)
        scales = self.random.uniform(2e-3, 9e-3, shape[axis]).astype(np.float32)
        points = self.random.integers(-9, 10, shape[axis]).astype(np.int8) if zero else np.zeros(shape[axis], np.int8)
        parameters = [self.constant(array) for array in (values, scales, points)]
        return self.node("DequantizeLinear", *parameters, axis=axis), scales

    def bias(self, scales: np.ndarray) -> str:
        values = self.random.integers(-2000, 2000, scales.shape).astype(np.int32)
        return self.node("DequantizeLinear", self.constant(values), self.constant(scales), axis=0)

    def convolution(self, x: str, scale: float, channels: tuple[int, int], kernel: int, **attributes: object) -> str:
        group = attributes.get("group", 1)
        assert isinstance(group, int)
        w, scales = self.weights(channels[1], channels[0] // group, kernel, kernel)
        bias = self.bias((np.float32(scale) * scales).astype(np.float32))
        return self.node("Conv", x, w, bias, pads=[kernel // 2] * 4, **attributes)

    def model(self, shape: tuple[int, ...], result: str, kind: int) -> ModelProto:
        graph = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(result, kind, None)], self.constants,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def defined(model: ModelProto, x: np.ndarray) -> np.ndarray:
    """What the operators give one by one, by ONNX Runtime without graph optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0])


def assert_rarely_another_byte(model: ModelProto, x: np.ndarray, reference: bool = False) -> None:
    """Asserts that bytes differ by one step at most, and few of them."""
    actual = onnxc.compile(model)(x)
    expected = [defined(model, x)]
    if reference:
        expected.append(np.asarray(ReferenceEvaluator(model).run(None, {"x": x})[0]))
    for bytes_defined in expected:
        assert actual.dtype == bytes_defined.dtype
        assert actual.shape == bytes_defined.shape
        steps = np.abs(actual.astype(np.int32) - bytes_defined.astype(np.int32))
        assert steps.max(initial=0) <= 1
        assert np.count_nonzero(steps) <= max(RARE * steps.size, 1)
        assert len(np.unique(bytes_defined)) > 40  # not all saturated


def kind_of(dtype: type) -> int:
    return TensorProto.UINT8 if dtype is np.uint8 else TensorProto.INT8


CONVOLUTIONS = {
    "3x3": ((16, 24), 3, {}),
    "1x1": ((24, 40), 1, {}),
    "strided": ((16, 16), 3, {"strides": [2, 2]}),
    "grouped": ((16, 32), 3, {"group": 4}),
    "depthwise": ((32, 32), 3, {"group": 32}),
    "of an image": ((3, 16), 5, {"strides": [2, 2]}),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_with_bias_and_activation(name: str, dtype: type) -> None:
    channels, kernel, attributes = CONVOLUTIONS[name]
    b = Building(np.random.default_rng(1), dtype)
    low = int(np.iinfo(dtype).min)
    x = b.between("x", 0.02, low + 120)
    y = b.node("Relu", b.convolution(x, 0.02, channels, kernel, **attributes))
    y, _ = b.quantize(y, 0.05 if name != "depthwise" else 0.004, low)
    model = b.model((1, channels[0], 14, 14), y, kind_of(dtype))
    image = b.random.normal(size=(1, channels[0], 14, 14)).astype(np.float32)
    assert_rarely_another_byte(model, image, reference=name == "3x3")


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_a_residual_block(dtype: type) -> None:
    b = Building(np.random.default_rng(2), dtype)
    low = int(np.iinfo(dtype).min)
    x = b.between("x", 0.02, low + 128)
    first = b.between(b.node("Relu", b.convolution(x, 0.02, (16, 16), 1)), 0.03, low)
    second = b.between(b.convolution(first, 0.03, (16, 16), 3), 0.04, low + 128)
    y, _ = b.quantize(b.node("Relu", b.node("Add", second, x)), 0.05, low)
    model = b.model((1, 16, 28, 28), y, kind_of(dtype))
    assert_rarely_another_byte(model, b.random.normal(size=(1, 16, 28, 28)).astype(np.float32))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_a_product_with_weights(op: str, zero: bool) -> None:
    b = Building(np.random.default_rng(3))
    x = b.between("x", 0.02, 131)
    w, scales = b.weights(*((80, 48) if op == "MatMul" else (48, 80)), axis=1 if op == "MatMul" else 0, zero=zero)
    if op == "MatMul":
        y = b.node("Add", b.node("MatMul", x, w), b.constant(b.random.normal(size=48).astype(np.float32)))
    else:
        y = b.node("Gemm", x, w, b.bias((np.float32(0.02) * scales).astype(np.float32)), transB=1)
    y, _ = b.quantize(y, 0.08, 120)
    model = b.model((70, 80), y, TensorProto.UINT8)
    assert_rarely_another_byte(model, b.random.normal(size=(70, 80)).astype(np.float32), reference=True)


def test_a_product_of_two_activations() -> None:
    """Scores of attention: both factors are made at run time, one is transposed."""
    b = Building(np.random.default_rng(4))
    query, key = b.between("x", 0.02, 120), b.between(b.node("Mul", "x", b.constant(np.float32(0.7))), 0.015, 131)
    y, _ = b.quantize(b.node("MatMul", query, b.node("Transpose", key, perm=[0, 1, 3, 2])), 0.1, 128)
    model = b.model((1, 3, 40, 32), y, TensorProto.UINT8)
    assert_rarely_another_byte(model, b.random.normal(size=(1, 3, 40, 32)).astype(np.float32))


def test_products_in_two_steps_of_a_real_result() -> None:
    """A result that is not quantized is that of exact sums: nearer to the real one than sums in f32."""
    b = Building(np.random.default_rng(5))
    w, _ = b.weights(300, 20, axis=1)
    y = b.node("MatMul", b.between("x", 0.02, 100), w)
    model = b.model((9, 300), y, TensorProto.FLOAT)
    x = b.random.normal(size=(9, 300)).astype(np.float32)
    np.testing.assert_allclose(onnxc.compile(model)(x), defined(model, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("exact", [False, True])
def test_operators_of_quantized_tensors_are_what_onnx_defines(exact: bool) -> None:
    random = np.random.default_rng(6)
    constants = {
        "s": np.float32(0.02), "z": np.uint8(120), "w": random.integers(-127, 128, (24, 16, 3, 3)).astype(np.int8),
        "ws": random.uniform(2e-3, 9e-3, 24).astype(np.float32), "wz": np.zeros(24, np.int8),
        "ys": np.float32(0.05), "yz": np.uint8(100), "b": random.integers(-2000, 2000, 24).astype(np.int32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("QLinearConv", ["q", "s", "z", "w", "ws", "wz", "ys", "yz", "b"], ["y"], pads=[1] * 4),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 16, 14, 14))],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = random.normal(size=(1, 16, 14, 14)).astype(np.float32)
    actual = onnxc.compile(model, exact=exact)(x)
    np.testing.assert_array_equal(actual, ReferenceEvaluator(model).run(None, {"x": x})[0])


def test_exact_allows_no_other_method() -> None:
    usual, exact = (target_of(Options("x86-64-v4", exact=exact)) for exact in (False, True))
    assert (usual.winograd, usual.strassen) == (True, 1)
    assert (exact.winograd, exact.strassen) == (False, 0)


def test_exact_keeps_the_products_of_reals() -> None:
    """What differs from exact sums differs from integers too: exact, the results are those of the same model in f32."""
    b = Building(np.random.default_rng(7))
    w, _ = b.weights(300, 20, axis=1)
    y = b.node("MatMul", b.between("x", 0.02, 100), w)
    model = b.model((9, 300), y, TensorProto.FLOAT)
    x = b.random.normal(size=(9, 300)).astype(np.float32)
    exact, integers = onnxc.compile(model, exact=True)(x), onnxc.compile(model)(x)
    assert np.any(exact != integers)
    np.testing.assert_allclose(exact, integers, rtol=2e-5, atol=2e-5)
