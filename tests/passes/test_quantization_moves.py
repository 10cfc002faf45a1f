"""Quantizing and dequantizing move through what moves elements or picks the largest, and cancel; functions of bytes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from onnxc.ir.dtypes import BY_NAME
from onnxc.ir.graph import Graph
from onnxc.ir.text import print_graph
from pass_checks import agree, filecheck, parsed, transformed

RANDOM = np.random.default_rng(0)


def check(checks: str, text: str, constants: Mapping[str, np.ndarray] | None = None) -> Graph:
    """Runs the pass, exact, and compares with the CHECK lines; all bytes of the inputs give the same as before."""
    before = parsed(text, constants)
    after = transformed("quantization{exact=True},cleanup", before)
    filecheck(checks, print_graph(after))
    inputs = {}
    for value in before.inputs:
        shape = tuple(int(extent) for extent in value.shape if isinstance(extent, int))
        if value.dtype.is_float:
            inputs[value.name] = (RANDOM.normal(size=shape) * 3).astype(value.dtype.numpy)
        else:
            low, high = value.dtype.limits if value.dtype.bits == 8 else (0, 4)
            inputs[value.name] = RANDOM.integers(low, high, shape, endpoint=True).astype(value.dtype.numpy)
    agree(before, after, inputs=inputs)
    return after


SCALES = (
    "%s = constant 0.02 : f32[]\n  %t = constant 0.05 : f32[]\n  %z = constant 100 : u8[]\n  %none = constant 0 : u8[]"
)


def graph(signature: str, *lines: str) -> str:
    body = "\n  ".join(lines)
    return f"graph @g{signature} {{\n  {SCALES}\n  {body}\n}}"


def test_movement_moves_bytes_and_the_pair_around_it_is_nothing() -> None:
    check(
        """
        // CHECK: %[[MOVED:.*]] = Reshape(%x) {shape = [3, 8]} : u8[3, 8]
        // CHECK-NEXT: %y = Transpose(%[[MOVED]]) {perm = [1, 0]} : u8[8, 3]
        // CHECK-NEXT: }
        """,
        graph(
            "(%x: u8[2, 3, 4]) -> (%y: u8[8, 3])",
            "%a = DequantizeLinear(%x, %s, %z) : f32[2, 3, 4]",
            "%b = Reshape(%a) {shape = [3, 8]} : f32[3, 8]",
            "%c = Transpose(%b) {perm = [1, 0]} : f32[8, 3]",
            "%y = QuantizeLinear(%c, %s, %z) : u8[8, 3]",
        ),
    )


def test_a_pair_of_two_scales_stays() -> None:
    check(
        "// CHECK: DequantizeLinear(%x, %s, %z)\n// CHECK: %y = QuantizeLinear(%{{.*}}, %t, %z)",
        graph(
            "(%x: u8[6]) -> (%y: u8[6])",
            "%a = DequantizeLinear(%x, %s, %z) : f32[6]",
            "%y = QuantizeLinear(%a, %t, %z) : u8[6]",
        ),
    )


def test_the_largest_of_a_window_is_that_of_the_bytes() -> None:
    check(
        "// CHECK: %y = MaxPool(%x) {{.*}} : u8\n// CHECK-NOT: Linear",
        graph(
            "(%x: u8[1, 2, 5, 5]) -> (%y: u8[1, 2, 3, 3])",
            "%a = DequantizeLinear(%x, %s, %z) : f32[1, 2, 5, 5]",
            "%b = MaxPool(%a) {kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]} : f32[1, 2, 3, 3]",
            "%y = QuantizeLinear(%b, %s, %z) : u8[1, 2, 3, 3]",
        ),
    )


def test_parts_of_other_scales_are_quantized_before_they_are_joined() -> None:
    check(
        """
        // CHECK-DAG: %[[OTHER:.*]] = QuantizeLinear(%{{.*}}, %s, %z)
        // CHECK: %y = Concat(%x, %{{.*}}) {axis = 0} : u8[5, 3]
        // CHECK-NOT: Linear
        """,
        graph(
            "(%x: u8[2, 3], %o: u8[3, 3]) -> (%y: u8[5, 3])",
            "%a = DequantizeLinear(%x, %s, %z) : f32[2, 3]",
            "%b = DequantizeLinear(%o, %t, %z) : f32[3, 3]",
            "%c = Concat(%a, %b) {axis = 0} : f32[5, 3]",
            "%y = QuantizeLinear(%c, %s, %z) : u8[5, 3]",
        ),
    )


def test_parts_of_one_scale_are_joined_as_bytes() -> None:
    check(
        """
        // CHECK: %[[ALL:.*]] = Concat(%x, %o) {axis = 0} : u8[5, 3]
        // CHECK: %y = DequantizeLinear(%[[ALL]], %s, %z)
        """,
        graph(
            "(%x: u8[2, 3], %o: u8[3, 3]) -> (%y: f32[5, 3])",
            "%a = DequantizeLinear(%x, %s, %z) : f32[2, 3]",
            "%b = DequantizeLinear(%o, %s, %z) : f32[3, 3]",
            "%y = Concat(%a, %b) {axis = 0} : f32[5, 3]",
        ),
    )


def test_scales_along_an_axis_follow_a_transpose() -> None:
    check(
        """
        // CHECK: %[[T:.*]] = Transpose(%x) {perm = [2, 0, 1]} : u8[3, 2, 4]
        // CHECK: %y = DequantizeLinear(%[[T]], %c) {axis = 0}
        """,
        graph(
            "(%x: u8[2, 4, 3]) -> (%y: f32[3, 2, 4])",
            "%c = constant [0.5, 0.25, 0.125] : f32[3]",
            "%a = DequantizeLinear(%x, %c) {axis = 2} : f32[2, 4, 3]",
            "%y = Transpose(%a) {perm = [2, 0, 1]} : f32[3, 2, 4]",
        ),
    )


def test_a_border_of_zeros_is_one_of_zero_points() -> None:
    check(
        "// CHECK: %[[ZERO:.*]] = constant 100 : u8[]\n// CHECK: %y = Pad(%x, _, %{{.*}}) {pads = [1, 2]} : u8[9]",
        graph(
            "(%x: u8[6]) -> (%y: u8[9])",
            "%a = DequantizeLinear(%x, %s, %z) : f32[6]",
            "%b = Pad(%a) {pads = [1, 2]} : f32[9]",
            "%y = QuantizeLinear(%b, %s, %z) : u8[9]",
        ),
    )


def test_rows_of_a_table_are_gathered_as_bytes() -> None:
    check(
        "// CHECK: %[[ROWS:.*]] = Gather(%table, %i) : u8[4, 3]\n// CHECK: %y = DequantizeLinear(%[[ROWS]], %s, %z)",
        graph(
            "(%i: i64[4]) -> (%y: f32[4, 3])",
            '%table = constant @"table" : u8[5, 3]',
            "%a = DequantizeLinear(%table, %s, %z) : f32[5, 3]",
            "%y = Gather(%a, %i) : f32[4, 3]",
        ),
        {"table": RANDOM.integers(0, 256, (5, 3)).astype(np.uint8)},
    )


@pytest.mark.parametrize(
    ("operator", "kept"),
    [("Relu(%x)", False), ("Clip(%x, %low, %high)", False), ("Clip(%x, %low, %middle)", True), ("Neg(%x)", True)],
)
def test_a_clip_to_the_range_of_the_type_is_nothing(operator: str, kept: bool) -> None:
    name = operator.split("(")[0]
    check(
        f"// CHECK: {name}\n// CHECK: QuantizeLinear"
        if kept
        else f"// CHECK-NOT: {name}\n// CHECK: %y = QuantizeLinear(%x",
        graph(
            "(%x: f32[40]) -> (%y: u8[40])",
            "%low = constant 0.0 : f32[]",
            "%middle = constant 1.0 : f32[]",
            "%high = constant 6.0 : f32[]",
            f"%a = {operator} : f32[40]",
            "%y = QuantizeLinear(%a, %s, %none) : u8[40]",
        ),
    )


def test_a_relu_above_the_least_byte_stays() -> None:
    check(
        "// CHECK: Relu",
        graph(
            "(%x: f32[40]) -> (%y: u8[40])",
            "%a = Relu(%x) : f32[40]",
            "%y = QuantizeLinear(%a, %s, %z) : u8[40]",
        ),
    )


def test_a_relu_of_what_has_no_negative_bytes_is_nothing() -> None:
    check(
        "// CHECK-NOT: Relu\n// CHECK: %y = Neg",
        graph(
            "(%x: u8[40]) -> (%y: f32[40])",
            "%a = DequantizeLinear(%x, %s, %none) : f32[40]",
            "%b = Relu(%a) : f32[40]",
            "%y = Neg(%b) : f32[40]",
        ),
    )


@pytest.mark.parametrize("source", ["u8", "i8"])
@pytest.mark.parametrize("result", ["u8", "i8"])
def test_an_activation_is_a_table(source: str, result: str) -> None:
    """With zero points of both types, and every byte as an input."""
    points = {"u8": 100, "i8": -20}
    text = graph(
        f"(%x: {source}[400]) -> (%y: {result}[400])",
        f"%zx = constant {points[source]} : {source}[]",
        f"%zy = constant {points[result]} : {result}[]",
        "%a = DequantizeLinear(%x, %t, %zx) : f32[400]",
        "%b = Sigmoid(%a) : f32[400]",
        "%c = Mul(%a, %b) : f32[400]",
        f"%y = QuantizeLinear(%c, %s, %zy) : {result}[400]",
    )
    after = check(
        f"""
        // CHECK: %[[TABLE:.*]] = constant @{{{{.*}}}} : {result}[256]
        // CHECK: %y = Gather(%[[TABLE]], %{{{{.*}}}}) {{axis = 0}} : {result}[400]
        // CHECK-NOT: Sigmoid
        """,
        text,
    )
    every = {"x": np.resize(np.arange(256, dtype=np.uint8), 400).view(BY_NAME[source].numpy)}
    agree(parsed(text), after, inputs=every)


def test_a_chain_with_quantizations_between_is_one_table() -> None:
    check(
        "// CHECK-NOT: Mul\n// CHECK: %y = Gather(",
        graph(
            "(%x: u8[40]) -> (%y: u8[40])",
            "%a = DequantizeLinear(%x, %t, %z) : f32[40]",
            "%b = Tanh(%a) : f32[40]",
            "%c = QuantizeLinear(%b, %s, %z) : u8[40]",
            "%d = DequantizeLinear(%c, %s, %z) : f32[40]",
            "%e = Mul(%a, %d) : f32[40]",
            "%y = QuantizeLinear(%e, %t, %z) : u8[40]",
        ),
    )


def test_operators_of_quantized_tensors_and_numbers_are_one_table() -> None:
    """(x + 3) * x as ONNX Runtime's quantizer spells it, in bytes at each step; the reference has no such operators."""
    text = graph(
        "(%x: u8[40]) -> (%y: u8[40])",
        "%three = constant 60 : u8[]",
        "%a = com.microsoft.QLinearAdd(%x, %t, %z, %three, %t, %none, %t, %z) : u8[40]",
        "%y = com.microsoft.QLinearMul(%a, %t, %z, %x, %t, %z, %t, %z) : u8[40]",
    )
    after = transformed("quantization{exact=True},cleanup", parsed(text))
    filecheck("// CHECK: %[[I:.*]] = Cast(%x)\n// CHECK-NEXT: %y = Gather(%{{.*}}, %[[I]])", print_graph(after))
    (table,) = [handle.array for handle in after.constants.values() if handle.array.shape == (256,)]
    unit = np.float32(0.05)
    x = (np.arange(256) - 100).astype(np.float32) * unit
    total = (np.clip(np.rint((x + np.float32(60) * unit) / unit) + 100, 0, 255).astype(np.float32) - 100) * unit
    np.testing.assert_array_equal(table, np.clip(np.rint(total * x / unit) + 100, 0, 255))


def test_a_function_of_two_tensors_is_no_table() -> None:
    check(
        "// CHECK: Tanh\n// CHECK: Mul\n// CHECK-NOT: Gather",
        graph(
            "(%x: u8[40], %o: u8[40]) -> (%y: u8[40])",
            "%a = DequantizeLinear(%x, %t, %z) : f32[40]",
            "%b = DequantizeLinear(%o, %t, %z) : f32[40]",
            "%c = Tanh(%a) : f32[40]",
            "%d = Mul(%c, %b) : f32[40]",
            "%y = QuantizeLinear(%d, %t, %z) : u8[40]",
        ),
    )


def test_a_function_moves_in_front_of_a_transpose_to_what_makes_the_bytes() -> None:
    check(
        """
        // CHECK: %[[BYTES:.*]] = QuantizeLinear(%sum, %s, %z)
        // CHECK: DequantizeLinear(%[[BYTES]]
        // CHECK: %[[MADE:.*]] = QuantizeLinear
        // CHECK: %y = Transpose(%[[MADE]]) {perm = [1, 0]} : u8[4, 3]
        """,
        graph(
            "(%a: f32[3, 4], %b: f32[3, 4]) -> (%y: u8[4, 3])",
            "%sum = Add(%a, %b) : f32[3, 4]",
            "%q = QuantizeLinear(%sum, %s, %z) : u8[3, 4]",
            "%moved = Transpose(%q) {perm = [1, 0]} : u8[4, 3]",
            "%c = DequantizeLinear(%moved, %s, %z) : f32[4, 3]",
            "%half = constant 0.5 : f32[]",
            "%d = Mul(%c, %half) : f32[4, 3]",
            "%y = QuantizeLinear(%d, %t, %z) : u8[4, 3]",
        ),
    )


def test_reals_are_scaled_and_quantized_before_they_are_moved() -> None:
    """As the queries of an attention: what is transposed is bytes, and what was computed before takes the rest in."""
    check(
        """
        // CHECK: %[[SUM:.*]] = Add(%a, %b) : f32[3, 4]
        // CHECK: %[[SCALED:.*]] = Mul(%[[SUM]], %half)
        // CHECK: %[[BYTES:.*]] = QuantizeLinear(%[[SCALED]], %t, %z) : u8[3, 4]
        // CHECK: %[[SHAPED:.*]] = Reshape(%[[BYTES]]) {shape = [3, 2, 2]}
        // CHECK: %y = Transpose(%[[SHAPED]]) {perm = [1, 0, 2]} : u8[2, 3, 2]
        """,
        graph(
            "(%a: f32[3, 4], %b: f32[3, 4]) -> (%y: u8[2, 3, 2])",
            "%half = constant 0.5 : f32[]",
            "%sum = Add(%a, %b) : f32[3, 4]",
            "%c = Reshape(%sum) {shape = [3, 2, 2]} : f32[3, 2, 2]",
            "%d = Transpose(%c) {perm = [1, 0, 2]} : f32[2, 3, 2]",
            "%e = Mul(%d, %half) : f32[2, 3, 2]",
            "%y = QuantizeLinear(%e, %t, %z) : u8[2, 3, 2]",
        ),
    )


def test_poolings_of_poolings_that_are_all_quantized_pool_bytes() -> None:
    check(
        """
        // CHECK: %[[BYTES:.*]] = QuantizeLinear(%x, %s, %z)
        // CHECK: %[[ONE:.*]] = MaxPool(%[[BYTES]])
        // CHECK: %[[TWO:.*]] = MaxPool(%[[ONE]])
        // CHECK: Concat(%[[BYTES]], %[[ONE]], %[[TWO]])
        // CHECK-NOT: QuantizeLinear
        """,
        graph(
            "(%x: f32[1, 2, 4, 4]) -> (%y: u8[1, 6, 4, 4])",
            "%p = MaxPool(%x) {kernel_shape = [3, 3], pads = [1, 1, 1, 1]} : f32[1, 2, 4, 4]",
            "%q = MaxPool(%p) {kernel_shape = [3, 3], pads = [1, 1, 1, 1]} : f32[1, 2, 4, 4]",
            "%c = Concat(%x, %p, %q) {axis = 1} : f32[1, 6, 4, 4]",
            "%y = QuantizeLinear(%c, %s, %z) : u8[1, 6, 4, 4]",
        ),
    )
