"""DynamicQuantizeLinear spelt out, and convolutions of integers by weights that are wider than 8 bits."""

from __future__ import annotations

import numpy as np
import onnx
import onnxc
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from pass_checks import agree, filecheck, parsed, transformed
from single_node import assert_equal, compiled, model_of, reference, run_node

RANDOM = np.random.default_rng(11)
NODE = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])


def test_the_range_is_a_reduction_and_the_rest_elementwise() -> None:
    graph = parsed(
        """
        graph @g(%x: f32[n, 8]) -> (%q: u8[n, 8], %scale: f32[], %zero: u8[]) {
          %q, %scale, %zero = DynamicQuantizeLinear(%x) : u8[n, 8], f32[], u8[]
        }
        """
    )
    after = transformed("dynamic-ranges", graph)
    agree(graph, after)
    filecheck(
        """
        // CHECK-NOT: DynamicQuantizeLinear
        // CHECK: ReduceMin(%x)
        // CHECK: ReduceMax(%x)
        // CHECK: %scale = Where
        // CHECK: %zero = QuantizeLinear
        // CHECK: %q = QuantizeLinear(%x, %scale, %zero)
        """,
        str(after),
    )


@pytest.mark.parametrize("size", [1, 5, 1000, 70_001])
@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "tiny", "large"])
def test_the_quantized_tensor_is_that_of_onnx(size: int, kind: str) -> None:
    """Long ones are shared among threads, part by part."""
    x = RANDOM.standard_normal(size).astype(np.float32)
    changes = {"positive": np.abs(x), "negative": -np.abs(x), "tiny": x * 1e-30, "large": x * 1e37}
    x = changes.get(kind, x)
    model = model_of([NODE], {"x": x}, {}, NODE.output)
    assert_equal(compiled(model, {"x": x}), reference(model, {"x": x}))


def test_the_scale_of_zeros_is_1() -> None:
    """As in ONNX Runtime."""
    found = compiled(model_of([NODE], {"x": (x := np.zeros(9, np.float32))}, {}, NODE.output), {"x": x})
    assert_equal(found, [np.zeros(9, np.uint8), np.array(1, np.float32), np.array(0, np.uint8)])


def test_one_reduction_for_the_least_and_the_greatest() -> None:
    x = RANDOM.standard_normal((300, 300)).astype(np.float32)
    model = model_of([NODE], {"x": x}, {}, NODE.output)
    text = onnxc.compile(model, threads=2).dump("kernels")
    filecheck(
        """
        // CHECK: parallel for
        // CHECK: vector for
        // CHECK-NEXT: = {{min|max}}({{.*}}, x0[
        // CHECK-NEXT: = {{min|max}}({{.*}}, x0[
        // CHECK: parallel for
        // CHECK-NOT: {{min|max}}(a_{{.*}}, x0[
        """,
        text,
    )


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray]:
    """A ConvInteger with weights of any zero points, its inputs, and the result by sums of i64."""
    channels, filters = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    kernel = [draw(st.integers(1, 3)) for _ in range(2)]
    strides, pads = [draw(st.integers(1, 2)) for _ in range(2)], [draw(st.integers(0, 1)) for _ in range(4)]
    size = [draw(st.integers(k, 9)) for k in kernel]
    signed, per_filter = draw(st.booleans()), draw(st.booleans())
    random = np.random.default_rng(draw(st.integers(0, 999)))
    x = random.integers(0, 256, (draw(st.integers(1, 2)), channels, *size)).astype(np.uint8)
    info = np.iinfo(np.int8 if signed else np.uint8)
    w = random.integers(info.min, info.max + 1, (filters, channels, *kernel)).astype(info.dtype)
    zeros = random.integers(info.min, info.max + 1, filters if per_filter else 1).astype(info.dtype)
    zero = np.array(random.integers(0, 256), np.uint8)
    wide = np.pad(x.astype(np.int64) - int(zero), [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    windows = np.lib.stride_tricks.sliding_window_view(wide, kernel, (2, 3))[:, :, :: strides[0], :: strides[1]]
    wanted = np.einsum("nchwij,fcij->nfhw", windows, w.astype(np.int64) - zeros.reshape(-1, 1, 1, 1))
    node = helper.make_node("ConvInteger", ["x", "w", "zero", "zeros"], ["y"], strides=strides, pads=pads)
    constants = {"w": w, "zeros": zeros if per_filter else zeros.reshape(())}
    inputs = {"x": x, "zero": zero}
    return model_of([node], inputs, constants, ["y"]), inputs, wanted.astype(np.int32)


@settings(max_examples=20, deadline=None)
@given(convolutions())
def test_weights_wider_than_8_bits(case: tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray]) -> None:
    model, inputs, wanted = case
    (found,) = compiled(model, inputs)
    np.testing.assert_array_equal(found, wanted)


def test_sums_of_windows_stand_for_what_a_zero_point_is_beyond() -> None:
    weights = {"w": RANDOM.integers(0, 256, (4, 8, 3, 3)).astype(np.uint8)}
    graph = parsed(
        """
        graph @g(%x: u8[1, 8, 6, 6], %zero: u8[]) -> (%y: i32[1, 4, 6, 6]) {
          %w = constant @"w" : u8[4, 8, 3, 3]
          %point = constant 100 : u8[]
          %y = ConvInteger(%x, %w, %zero, %point) {pads = [1, 1, 1, 1]} : i32[1, 4, 6, 6]
        }
        """,
        weights,
    )
    filecheck(
        """
        // CHECK: %[[A:[\\w.]+]] = ConvInteger(%x, %{{[\\w.]+}}, %zero)
        // CHECK: ReduceSum
        // CHECK: %[[B:[\\w.]+]] = ConvInteger
        // CHECK: %y = Sub(%[[A]],
        """,
        str(transformed("wide-weights", graph)),
    )
    near = str(graph).replace("constant 100", "constant 128")
    assert "ReduceSum" not in str(transformed("wide-weights", parsed(near, weights)))


def test_a_convolution_quantized_at_run_time_is_that_of_onnx_runtime() -> None:
    """As ONNX Runtime's quantizer writes it; between the convolutions lie bytes, channels last."""
    x = RANDOM.standard_normal((1, 8, 12, 12)).astype(np.float32)
    nodes, constants, last = [], {}, "x"
    for number, filters in enumerate((24, 16)):
        w = RANDOM.integers(0, 256, (filters, 8 if number == 0 else 24, 3, 3)).astype(np.uint8)
        n = str(number)
        constants |= {"w" + n: w, "z" + n: np.array(90 + number, np.uint8), "s" + n: np.array(0.004, np.float32)}
        nodes += [
            helper.make_node("DynamicQuantizeLinear", [last], ["q" + n, "qs" + n, "qz" + n]),
            helper.make_node("ConvInteger", ["q" + n, "w" + n, "qz" + n, "z" + n], ["c" + n], pads=[1, 1, 1, 1]),
            helper.make_node("Cast", ["c" + n], ["f" + n], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["qs" + n, "s" + n], ["m" + n]),
            helper.make_node("Mul", ["f" + n, "m" + n], ["a" + n]),
            helper.make_node("Relu", ["a" + n], ["y" + n]),
        ]
        last = "y" + n
    model = model_of(nodes, {"x": x}, constants, [last], opset=21)
    executable = onnxc.compile(model)
    (found,) = executable.run({"x": x}).values()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": x})
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


def test_a_matrix_quantized_at_run_time() -> None:
    a, b = RANDOM.standard_normal((7, 40)).astype(np.float32), RANDOM.integers(0, 256, (40, 24)).astype(np.uint8)
    operands = {"A": a, "B": b, "b_scale": np.array(0.01, np.float32), "b_zero": np.array(77, np.uint8)}
    (found,) = run_node(
        "DynamicQuantizeMatMul", operands, constant=("B", "b_scale", "b_zero"), opset=21, domain="com.microsoft"
    )
    node = helper.make_node("DynamicQuantizeMatMul", list(operands), ["y"], domain="com.microsoft")
    model = model_of([node], {"A": a}, {n: x for n, x in operands.items() if n != "A"}, ["y"], opset=21)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(found, session.run(None, {"A": a})[0], rtol=1e-6, atol=1e-5)
