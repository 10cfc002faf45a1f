"""Quantized models in integers: the form that products take, and what is left alone with a remark."""

from __future__ import annotations

import numpy as np
import pytest
from onnxc.ir.text import parse_graph, print_graph
from pass_checks import agree, check, filecheck, parsed, random_inputs, transformed

RANDOM = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    return RANDOM.integers(-127, 128, shape).astype(np.int8)


def scales(count: int) -> np.ndarray:
    return RANDOM.uniform(1e-3, 1e-2, count).astype(np.float32)


CONVOLUTION = """
graph @g(%x: u8[1, 3, 6, 6], %r: u8[1, 4, 6, 6]) -> (%y: u8[1, 4, 6, 6]) {
  %s = constant 0.02 : f32[]
  %z = constant 100 : u8[]
  %zero = constant 0 : u8[]
  %w = constant @"w" : i8[4, 3, 3, 3]
  %ws = constant @"ws" : f32[4]
  %b = constant @"b" : i32[4]
  %bs = constant @"bs" : f32[4]
  %x.real = DequantizeLinear(%x, %s, %z) : f32[1, 3, 6, 6]
  %w.real = DequantizeLinear(%w, %ws) {axis = 0} : f32[4, 3, 3, 3]
  %b.real = DequantizeLinear(%b, %bs) {axis = 0} : f32[4]
  %c = Conv(%x.real, %w.real, %b.real) {kernel_shape = [3, 3], pads = [1, 1, 1, 1]} : f32[1, 4, 6, 6]
  %r.real = DequantizeLinear(%r, %s, %z) : f32[1, 4, 6, 6]
  %sum = Add(%c, %r.real) : f32[1, 4, 6, 6]
  %top = Relu(%sum) : f32[1, 4, 6, 6]
  %y = QuantizeLinear(%top, %s, %zero) : u8[1, 4, 6, 6]
}
"""


def convolution(bias_factor: float = 1.0) -> tuple[str, dict[str, np.ndarray]]:
    per_filter = scales(4)
    return CONVOLUTION, {
        "w": weights(4, 3, 3, 3), "ws": per_filter, "b": np.array([900, -40, 7, 0], np.int32),
        "bs": (np.float32(0.02) * per_filter * np.float32(bias_factor)).astype(np.float32),
    }  # fmt: skip


def test_a_convolution_sums_integers_with_its_bias() -> None:
    text, constants = convolution()
    before = parsed(text, constants)
    after = transformed("quantization", before)
    filecheck(
        """
        // CHECK: %[[SUM:.*]] = ConvInteger(%x, %w, %z) {kernel_shape = [3, 3], pads = [1, 1, 1, 1]} : i32[1, 4, 6, 6]
        // CHECK: %[[BIAS:.*]] = constant {{.*}} : i32[4, 1, 1]
        // CHECK: %[[TOTAL:.*]] = Add(%[[SUM]], %[[BIAS]]) : i32[1, 4, 6, 6]
        // CHECK: %[[REAL:.*]] = Cast(%[[TOTAL]]) {to = f32}
        // CHECK: %[[ONE:.*]] = constant 1.0
        // CHECK: %[[SCALED:.*]] = Mul(%[[REAL]], %{{.*}}) : f32[1, 4, 6, 6]
        // CHECK: %[[RESIDUAL:.*]] = Add(%[[SCALED]], %{{.*}})
        // CHECK-NOT: Relu
        // CHECK: %y = QuantizeLinear(%[[RESIDUAL]], %[[ONE]], %zero)
        """,
        print_graph(after),
    )
    agree(before, after)


def test_a_bias_of_another_scale_is_added_as_it_is() -> None:
    text, constants = convolution(bias_factor=1.5)
    before = parsed(text, constants)
    after = transformed("quantization", before)
    filecheck(
        """
        // CHECK: ConvInteger
        // CHECK-NOT: Add{{.*}}i32
        // CHECK: %c.scaled = Mul
        // CHECK: %c = Add(%c.scaled, %{{.*}}) : f32
        """,
        print_graph(after),
    )
    agree(before, after)


def test_exact_keeps_products_of_reals() -> None:
    text, constants = convolution()
    after = transformed("quantization{exact=True}", parsed(text, constants))
    filecheck("// CHECK: %c = Conv(\n// CHECK-NOT: ConvInteger\n", print_graph(after))


def test_one_kernel_for_each_convolution_and_only_bytes_between() -> None:
    """Two convolutions and a residual sum, each tensor with a scale of its own."""
    text = """
    graph @block(%x: u8[1, 8, 6, 6]) -> (%y: u8[1, 8, 6, 6]) {
      %s0 = constant 0.02 : f32[]
      %s1 = constant 0.05 : f32[]
      %s2 = constant 0.03 : f32[]
      %z = constant 100 : u8[]
      %w1 = constant @"w1" : i8[8, 8, 3, 3]
      %w2 = constant @"w2" : i8[8, 8, 3, 3]
      %ws = constant @"ws" : f32[8]
      %a = DequantizeLinear(%x, %s0, %z) : f32[1, 8, 6, 6]
      %v1 = DequantizeLinear(%w1, %ws) {axis = 0} : f32[8, 8, 3, 3]
      %c1 = Conv(%a, %v1) {pads = [1, 1, 1, 1]} : f32[1, 8, 6, 6]
      %r1 = Relu(%c1) : f32[1, 8, 6, 6]
      %q1 = QuantizeLinear(%r1, %s1, %z) : u8[1, 8, 6, 6]
      %d1 = DequantizeLinear(%q1, %s1, %z) : f32[1, 8, 6, 6]
      %v2 = DequantizeLinear(%w2, %ws) {axis = 0} : f32[8, 8, 3, 3]
      %c2 = Conv(%d1, %v2) {pads = [1, 1, 1, 1]} : f32[1, 8, 6, 6]
      %q2 = QuantizeLinear(%c2, %s2, %z) : u8[1, 8, 6, 6]
      %d2 = DequantizeLinear(%q2, %s2, %z) : f32[1, 8, 6, 6]
      %sum = Add(%d2, %a) : f32[1, 8, 6, 6]
      %top = Relu(%sum) : f32[1, 8, 6, 6]
      %y = QuantizeLinear(%top, %s2, %z) : u8[1, 8, 6, 6]
    }
    """
    constants = {"w1": weights(8, 8, 3, 3), "w2": weights(8, 8, 3, 3), "ws": scales(8)}
    after = transformed("quantization,fold,cleanup,fuse", parsed(text, constants))
    kernels = [node for node in after.nodes if node.op == "Fused"]
    assert [[inner.op for inner in kernel.regions["body"].nodes].count("ConvInteger") for kernel in kernels] == [1, 1]
    assert [str(value.dtype) for kernel in kernels for value in kernel.outputs] == ["u8", "u8"]
    assert all(value.dtype.bits <= 32 for kernel in kernels for value in kernel.inputs if value is not None)


def test_matrices_with_scales_by_column_and_by_row() -> None:
    check(
        "quantization",
        """
        // CHECK: %[[SUM:.*]] = MatMulInteger(%a, %b, _, %bz) : i32[2, 4, 5]
        // CHECK: %[[REAL:.*]] = Cast(%[[SUM]])
        // CHECK: %y = Mul(%[[REAL]], %{{.*}}) : f32[2, 4, 5]
        // CHECK: %[[SUM2:.*]] = MatMulInteger(%l, %r) : i32[3, 5]
        // CHECK: %p = Mul(
        graph @g(%a: i8[2, 4, 3], %b: u8[3, 5], %r: i8[4, 5]) -> (%y: f32[2, 4, 5], %p: f32[3, 5]) {
          %s = constant [0.02] : f32[1]
          %z = constant [0] : i8[1]
          %bs = constant [0.01, 0.02, 0.03, 0.04, 0.05] : f32[5]
          %bz = constant [1, 2, 3, 4, 5] : u8[5]
          %ls = constant [0.01, 0.02, 0.03] : f32[3]
          %l = constant [[1, 2, 3, 4], [5, 6, 7, 8], [-1, -2, -3, -4]] : i8[3, 4]
          %x = DequantizeLinear(%a, %s, %z) : f32[2, 4, 3]
          %w = DequantizeLinear(%b, %bs, %bz) : f32[3, 5]
          %y = MatMul(%x, %w) : f32[2, 4, 5]
          %u = DequantizeLinear(%l, %ls) {axis = 0} : f32[3, 4]
          %v = DequantizeLinear(%r, %s) : f32[4, 5]
          %p = MatMul(%u, %v) : f32[3, 5]
        }
        """,
    )


@pytest.mark.parametrize("flags", ["", "transB = 1", "transA = 1", "transA = 1, transB = 1, alpha = 0.5, beta = 2.0"])
def test_gemm(flags: str) -> None:
    first = "6, 4" if "transA" in flags else "4, 6"
    flags = f" {{{flags}}}" if flags else ""
    second, axis = ((5, 6), 0) if "transB" in flags else ((6, 5), 1)
    text = f"""
    // CHECK: MatMulInteger(
    // CHECK-NOT: Gemm
    // CHECK: %y =
    graph @g(%a: u8[{first}], %c: f32[5]) -> (%y: f32[4, 5]) {{
      %s = constant 0.02 : f32[]
      %z = constant 7 : u8[]
      %w = constant @"w" : i8[{second[0]}, {second[1]}]
      %ws = constant @"ws" : f32[5]
      %x = DequantizeLinear(%a, %s, %z) : f32[{first}]
      %v = DequantizeLinear(%w, %ws) {{axis = {axis}}} : f32[{second[0]}, {second[1]}]
      %y = Gemm(%x, %v, %c){flags} : f32[4, 5]
    }}
    """
    check("quantization", text, {"w": weights(*second), "ws": scales(5)})


def test_weights_of_four_bits_become_bytes() -> None:
    check(
        "quantization",
        """
        // CHECK: %[[BYTES:.*]] = constant {{.*}} : i8[2, 2]
        // CHECK: MatMulInteger(%a, %[[BYTES]])
        graph @g(%a: u8[3, 2]) -> (%y: f32[3, 2]) {
          %s = constant 0.5 : f32[]
          %w = constant [[-8, 7], [3, 0]] : i4[2, 2]
          %x = DequantizeLinear(%a, %s) : f32[3, 2]
          %v = DequantizeLinear(%w, %s) : f32[2, 2]
          %y = MatMul(%x, %v) : f32[3, 2]
        }
        """,
    )


LEFT = {
    "its second operand is not quantized": ("u8[2, 3]", "f32[3, 3]", "%a, %s", ""),
    "its first operand is quantized to u16, not to 8 bits": ("u16[2, 3]", "i8[3, 3]", "%a, %s", "%b, %s"),
    "the scale of its first operand differs along an axis that is summed, or by matrix": (
        "u8[2, 3]", "i8[3, 3]", "%a, %three", "%b, %s",
    ),
    "the scale of its second operand differs along an axis that is summed, or by matrix": (
        "u8[2, 3]", "i8[3, 3]", "%a, %s", "%b, %three",
    ),
    "its sums may not fit i32": ("u8[2, 80000]", "i8[80000, 3]", "%a, %s", "%b, %s"),
}  # fmt: skip


@pytest.mark.parametrize("reason", LEFT)
def test_what_does_not_fit_is_left_with_a_remark(reason: str) -> None:
    left, right, first, second = LEFT[reason]
    axis = " {axis = 0}" if second.endswith("%three") else ""
    real = "f32" + left[left.index("[") :], "f32" + right[right.index("[") :]
    dequantized = f"%w = DequantizeLinear({second}){axis} : {real[1]}" if second else f"%w = Neg(%b) : {real[1]}"
    text = f"""
    graph @g(%a: {left}, %b: {right}) -> (%y: f32[2, 3]) {{
      %s = constant 0.5 : f32[]
      %three = constant [0.5, 0.25, 1.0] : f32[3]
      %x = DequantizeLinear({first}) : {real[0]}
      {dequantized}
      %y = MatMul(%x, %w) : f32[2, 3]   // from "product"
    }}
    """
    after = transformed("quantization", parsed(text))
    shown = print_graph(after)
    assert f'// from "product"; left in f32: {reason}\n' in shown
    assert parse_graph(shown) == after  # a remark is no part of the graph


def test_operators_that_have_no_form_of_integers_say_so() -> None:
    text = """
    graph @g(%a: u8[1, 2, 3, 3]) -> (%y: f32[1, 2, 4, 4]) {
      %s = constant 0.5 : f32[]
      %w = constant [[[[1, 2], [3, 4]], [[1, 2], [3, 4]]], [[[1, 2], [3, 4]], [[1, 2], [3, 4]]]] : i8[2, 2, 2, 2]
      %x = DequantizeLinear(%a, %s) : f32[1, 2, 3, 3]
      %v = DequantizeLinear(%w, %s) : f32[2, 2, 2, 2]
      %y = ConvTranspose(%x, %v) : f32[1, 2, 4, 4]
    }
    """
    shown = print_graph(transformed("quantization", parsed(text)))
    assert "// left in f32: there is no ConvTranspose of integers" in shown


def test_products_of_reals_carry_no_remark() -> None:
    text = """
    graph @g(%a: f32[2, 3], %b: f32[3, 3]) -> (%y: f32[2, 3]) {
      %y = MatMul(%a, %b) : f32[2, 3]
    }
    """
    assert "left in" not in print_graph(transformed("quantization", parsed(text)))


def test_operators_of_quantized_tensors_take_the_same_form() -> None:
    text = """
    graph @g(%x: u8[1, 3, 6, 6], %m: u8[4, 3], %o: u8[1, 4, 6, 6]) ->
            (%y: u8[1, 4, 6, 6], %p: i8[4, 2], %sum: u8[1, 4, 6, 6]) {
      %s = constant 0.02 : f32[]
      %z = constant 100 : u8[]
      %w = constant @"w" : i8[4, 3, 3, 3]
      %ws = constant @"ws" : f32[4]
      %wz = constant [0, 0, 0, 0] : i8[4]
      %b = constant [900, -40, 7, 0] : i32[4]
      %y = QLinearConv(%x, %s, %z, %w, %ws, %wz, %s, %z, %b) {pads = [1, 1, 1, 1]} : u8[1, 4, 6, 6]
      %v = constant [[1, 2], [-3, 4], [5, -6]] : i8[3, 2]
      %vz = constant 3 : i8[]
      %p = QLinearMatMul(%m, %s, %z, %v, %s, %vz, %s, %vz) : i8[4, 2]
      %sum = com.microsoft.QLinearAdd(%y, %s, %z, %o, %s, %z, %s, %z) : u8[1, 4, 6, 6]
    }
    """
    constants = {"w": weights(4, 3, 3, 3), "ws": scales(4)}
    after = transformed("quantization{exact=True}", parsed(text, constants))
    filecheck(
        """
        // CHECK: ConvInteger(%x, %w, %z) {pads = [1, 1, 1, 1]} : i32
        // CHECK: Add{{.*}} : i32[1, 4, 6, 6]
        // CHECK: %y = QuantizeLinear(%y.scaled, %s, %z)
        // CHECK: MatMulInteger(%m, %v, %z, %vz) : i32[4, 2]
        // CHECK: %p = QuantizeLinear(%p.scaled, %s, %vz) : i8[4, 2]
        // CHECK: %sum = QuantizeLinear(%sum.real, %s, %z)
        // CHECK-NOT: QLinear
        """,
        print_graph(after),
    )
    inputs = random_inputs(after)
    assert set(inputs) == {"x", "m", "o"}


@pytest.mark.parametrize("attributes", ["pads = [1, 1, 1, 1]", "pads = [1, 1, 1, 1], count_include_pad = 1", ""])
def test_an_average_of_bytes_is_a_convolution_by_ones(attributes: str) -> None:
    extent = 5 if attributes else 3
    attributes = ", ".join(filter(None, ("kernel_shape = [3, 3]", attributes)))
    text = f"""
    // CHECK: %[[ONES:.*]] = constant {{{{.*}}}} : i8[2, 1, 3, 3]
    // CHECK: ConvInteger(%x, %[[ONES]], %z) {{{{.*}}}}group = 2
    // CHECK-NOT: AveragePool
    graph @g(%x: u8[1, 2, 5, 5]) -> (%y: f32[1, 2, {extent}, {extent}]) {{
      %s = constant 0.5 : f32[]
      %z = constant 100 : u8[]
      %a = DequantizeLinear(%x, %s, %z) : f32[1, 2, 5, 5]
      %y = AveragePool(%a) {{{attributes}}} : f32[1, 2, {extent}, {extent}]
    }}
    """
    check("quantization", text)


def test_weights_that_training_quantizes_in_the_graph_are_integers() -> None:
    """Quantization-aware training exports real weights with their quantization behind them."""
    text = """
    // CHECK: %[[WEIGHTS:.*]] = constant {{.*}} : i8[4, 2]
    // CHECK: MatMulInteger(%q, %{{.*}}, %z)
    // CHECK: %y = QuantizeLinear
    graph @g(%x: f32[3, 4]) -> (%y: u8[3, 2]) {
      %s = constant 0.02 : f32[]
      %z = constant 100 : u8[]
      %w = constant [[0.25, -0.5], [0.75, 0.3], [0.1, -1.0], [0.5, 0.0]] : f32[4, 2]
      %ws = constant [0.01, 0.02] : f32[2]
      %wz = constant [0, 0] : i8[2]
      %q = QuantizeLinear(%x, %s, %z) : u8[3, 4]
      %a = DequantizeLinear(%q, %s, %z) : f32[3, 4]
      %wq = QuantizeLinear(%w, %ws, %wz) : i8[4, 2]
      %wd = DequantizeLinear(%wq, %ws, %wz) : f32[4, 2]
      %p = MatMul(%a, %wd) : f32[3, 2]
      %y = QuantizeLinear(%p, %s, %z) : u8[3, 2]
    }
    """
    check("fold{dequantize=False},quantization,cleanup", text)


def test_a_tensor_that_several_read_is_stored_once_as_bytes() -> None:
    """Its reals are made where they are read, next to what they are added to."""
    text = """
    graph @g(%x: f32[4, 8], %r: f32[4, 8]) -> (%a: f32[4, 8], %b: f32[4, 8], %c: f32[4, 8]) {
      %s = constant 0.02 : f32[]
      %z = constant 100 : u8[]
      %w = constant @"w" : i8[8, 8]
      %t = Tanh(%x) : f32[4, 8]
      %q = QuantizeLinear(%t, %s, %z) : u8[4, 8]
      %d = DequantizeLinear(%q, %s, %z) : f32[4, 8]
      %v = DequantizeLinear(%w, %s) : f32[8, 8]
      %a = MatMul(%d, %v) : f32[4, 8]
      %p = MatMul(%d, %v) : f32[4, 8]
      %b = Add(%p, %d) : f32[4, 8]
      %e = Softmax(%r) : f32[4, 8]
      %c = Mul(%e, %d) : f32[4, 8]
    }
    """
    after = transformed("quantization,fold,fuse", parsed(text, {"w": weights(8, 8)}))
    kernels = [node for node in after.nodes if node.op == "Fused"]
    made = {value.name: str(value.dtype) for kernel in kernels for value in kernel.outputs}
    assert made == {"q": "u8", "a": "f32", "b": "f32", "c": "f32"}


def test_quantization_of_another_domain_is_the_same() -> None:
    """ONNX Runtime's quantizer writes its own domain where asked to, or where types came to ONNX later."""
    text = """
    graph @g(%x: u8[3, 4], %b: i8[4, 2]) -> (%y: u8[3, 2]) {
      %s = constant 0.02 : f32[]
      %z = constant 100 : u8[]
      %a = com.microsoft.DequantizeLinear(%x, %s, %z) : f32[3, 4]
      %w = com.microsoft.DequantizeLinear(%b, %s) : f32[4, 2]
      %p = MatMul(%a, %w) : f32[3, 2]
      %y = com.microsoft.QuantizeLinear(%p, %s, %z) : u8[3, 2]
    }
    """
    after = transformed("canonicalize,quantization", parsed(text))
    filecheck(
        "// CHECK: MatMulInteger(%x, %b, %z)\n// CHECK-NOT: microsoft\n// CHECK: %y = QuantizeLinear",
        print_graph(after),
    )


@pytest.mark.parametrize(("scale", "divided"), [(0.02, True), (0.0213, False)])
def test_a_residual_sum_that_often_lies_between_two_steps_is_divided_as_defined(scale: float, divided: bool) -> None:
    """0.2 a + 0.02 b lies in the middle of two steps of 0.2 for every tenth b: the last bit of a quotient decides."""
    text = f"""
    graph @g(%x: u8[4, 8], %r: u8[4, 8]) -> (%y: u8[4, 8]) {{
      %s = constant {scale} : f32[]
      %t = constant 0.2 : f32[]
      %z = constant 100 : u8[]
      %w = constant @"w" : i8[8, 8]
      %a = DequantizeLinear(%x, %s, %z) : f32[4, 8]
      %v = DequantizeLinear(%w, %s) : f32[8, 8]
      %p = MatMul(%a, %v) : f32[4, 8]
      %q = QuantizeLinear(%p, %t, %z) : u8[4, 8]
      %d = DequantizeLinear(%q, %t, %z) : f32[4, 8]
      %b = DequantizeLinear(%r, %s, %z) : f32[4, 8]
      %sum = Add(%d, %b) : f32[4, 8]
      %y = QuantizeLinear(%sum, %t, %z) : u8[4, 8]
    }}
    """
    after = transformed("quantization,cleanup", parsed(text, {"w": weights(8, 8)}))
    last = next(node for node in after.nodes if node.outputs[0].name == "y")
    scale_read = after.constant(last.inputs[1])
    assert scale_read is not None
    assert float(scale_read) == pytest.approx(0.2 if divided else 1.0)
