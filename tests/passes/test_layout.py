"""Networks of convolutions store their images channels-last, and nothing inside is left to transpose."""

from __future__ import annotations

import numpy as np
import pytest
from onnxc.ir.graph import Graph
from pass_checks import agree, check, parsed, transformed

PASSES = "canonicalize,fold,layout,canonicalize,fold,cleanup"
RANDOM = np.random.default_rng(1)


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def layouts(graph: Graph) -> list[object]:
    return [node.attributes.get("layout") for node in graph.nodes if node.op in ("Conv", "ConvTranspose")]


def test_residual_network_with_gates() -> None:
    """Inverted residual with squeeze and excitation, concatenation, upsampling, and a classifier behind a pooling."""
    arrays = weights(
        w1=(8, 3, 3, 3), w2=(8, 1, 3, 3), w3=(2, 8, 1, 1), w4=(8, 2, 1, 1), w5=(6, 16, 1, 1), w6=(6, 5), b=(8,)
    )
    after = check(
        PASSES,
        """
        graph @g(%image: f32[batch, 3, h, w]) -> (%y: f32[batch, 5], %map: f32[batch, 6, 2*h, 2*w]) {
          %w1 = constant @"w1" : f32[8, 3, 3, 3]
          %w2 = constant @"w2" : f32[8, 1, 3, 3]
          %w3 = constant @"w3" : f32[2, 8, 1, 1]
          %w4 = constant @"w4" : f32[8, 2, 1, 1]
          %w5 = constant @"w5" : f32[6, 16, 1, 1]
          %w6 = constant @"w6" : f32[6, 5]
          %b = constant @"b" : f32[8]
          %c1 = Conv(%image, %w1, %b) {pads = [1, 1, 1, 1]} : f32[batch, 8, h, w]
          %r1 = HardSwish(%c1) : f32[batch, 8, h, w]
          %c2 = Conv(%r1, %w2) {pads = [1, 1, 1, 1], group = 8} : f32[batch, 8, h, w]
          %p = GlobalAveragePool(%c2) : f32[batch, 8, 1, 1]
          %s1 = Conv(%p, %w3) : f32[batch, 2, 1, 1]
          %s2 = Relu(%s1) : f32[batch, 2, 1, 1]
          %s3 = Conv(%s2, %w4) : f32[batch, 8, 1, 1]
          %s4 = HardSigmoid(%s3) : f32[batch, 8, 1, 1]
          %g = Mul(%c2, %s4) : f32[batch, 8, h, w]
          %a = Add(%g, %r1) : f32[batch, 8, h, w]
          %cat = Concat(%a, %c1) {axis = 1} : f32[batch, 16, h, w]
          %c5 = Conv(%cat, %w5) : f32[batch, 6, h, w]
          %map = Resize(%c5) {scales = [1.0, 1.0, 2.0, 2.0], mode = "nearest"} : f32[batch, 6, 2*h, 2*w]
          %mean = ReduceMean(%c5) {axes = [2, 3]} : f32[batch, 6, 1, 1]
          %flat = Flatten(%mean) : f32[batch, 6]
          %y = MatMul(%flat, %w6) : f32[batch, 5]
        }
        // CHECK: Transpose(%image) {perm = [0, 2, 3, 1]}
        // CHECK-NOT: Transpose
        // CHECK: Concat({{.*}}) {axis = 3}
        // CHECK: %c5 = Transpose
        // CHECK: %map = Resize(%c5)
        """,
        arrays,
        {"h": 5, "w": 4},
    )
    assert set(layouts(after)) == {"channels_last"}
    assert sum(node.op == "Transpose" for node in after.nodes) == 2  # at the entry, and for %map before it grows


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_all_ranks(rank: int) -> None:
    spatial = ", ".join("789"[:rank])
    kernel = ", ".join("3" * rank)
    pooled = ", ".join("567"[:rank])
    check(
        PASSES,
        f"""
        graph @g(%x: f32[2, 4, {spatial}]) -> (%y: f32[2, {pooled}, 6]) {{
          %w = constant @"w" : f32[6, 4, {kernel}]
          %c = Conv(%x, %w) {{pads = {[1] * (2 * rank)}}} : f32[2, 6, {spatial}]
          %m = MaxPool(%c) {{kernel_shape = [{kernel}]}} : f32[2, 6, {pooled}]
          %y = Transpose(%m) {{perm = {[0, *range(2, rank + 2), 1]}}} : f32[2, {pooled}, 6]
        }}
        // CHECK: Transpose(%x)
        // CHECK-NEXT: Conv({{{{.*}}}} layout = "channels_last"
        // CHECK-NEXT: %y = MaxPool({{{{.*}}}} layout = "channels_last"
        """,
        weights(w=(6, 4, *(3,) * rank)),
    )


def test_transposed_convolutions() -> None:
    check(
        PASSES,
        """
        graph @g(%x: f32[2, 4, 5, 6]) -> (%y: f32[2, 3, 10, 12]) {
          %w = constant @"w" : f32[4, 3, 2, 2]
          %c = ConvTranspose(%x, %w) {strides = [2, 2]} : f32[2, 3, 10, 12]
          %y = Sigmoid(%c) : f32[2, 3, 10, 12]
        }
        // CHECK: ConvTranspose({{.*}} layout = "channels_last"
        """,
        weights(w=(4, 3, 2, 2)),
    )


def test_operators_without_a_convolution_are_left_alone() -> None:
    graph = parsed(
        """
        graph @g(%x: f32[2, 4, 5, 6]) -> (%y: f32[2, 4, 4, 5]) {
          %m = MaxPool(%x) {kernel_shape = [2, 2]} : f32[2, 4, 4, 5]
          %y = LRN(%m) {size = 3} : f32[2, 4, 4, 5]
        }
        """
    )
    assert transformed("layout", graph) is graph


def test_a_convolution_that_costs_less_than_its_transposes_is_left_alone() -> None:
    """One product for each element: moving the images would cost more."""
    graph = parsed(
        """
        graph @g(%x: f32[2, 1, 500, 600]) -> (%y: f32[2, 8, 500, 600]) {
          %w = constant @"w" : f32[8, 1, 1, 1]
          %y = Conv(%x, %w) : f32[2, 8, 500, 600]
        }
        """,
        weights(w=(8, 1, 1, 1)),
    )
    assert transformed("layout", graph) is graph


def test_vision_transformer_tokens() -> None:
    """Patches become tokens without a transpose behind the convolution."""
    arrays = weights(w=(16, 3, 4, 4), g=(16,), b=(16,))
    after = check(
        PASSES,
        """
        graph @g(%x: f32[n, 3, 8, 8]) -> (%y: f32[n, 4, 16]) {
          %w = constant @"w" : f32[16, 3, 4, 4]
          %g = constant @"g" : f32[16]
          %b = constant @"b" : f32[16]
          %c = Conv(%x, %w, %b) {strides = [4, 4]} : f32[n, 16, 2, 2]
          %f = Reshape(%c) {shape = [n, 16, 4]} : f32[n, 16, 4]
          %t = Transpose(%f) {perm = [0, 2, 1]} : f32[n, 4, 16]
          %y = LayerNormalization(%t, %g, %b) : f32[n, 4, 16]
        }
        // CHECK: Transpose(%x)
        // CHECK-NEXT: Conv
        // CHECK-NEXT: Reshape
        // CHECK-NEXT: %y = LayerNormalization
        """,
        arrays,
    )
    assert sum(node.op == "Transpose" for node in after.nodes) == 1


def test_pooling_that_tells_positions_stays() -> None:
    """The positions count channels-first; the values of such a pooling do so too."""
    text = """
    graph @g(%x: f32[1, 2, 6, 6]) -> (%y: f32[1, 4, 3, 3], %i: i64[1, 4, 3, 3]) {
      %w = constant @"w" : f32[4, 2, 3, 3]
      %c = Conv(%x, %w) {pads = [1, 1, 1, 1]} : f32[1, 4, 6, 6]
      %y, %i = MaxPool(%c) {kernel_shape = [2, 2], strides = [2, 2]} : f32[1, 4, 3, 3], i64[1, 4, 3, 3]
    }
    """
    before = parsed(text, weights(w=(4, 2, 3, 3)))
    after = transformed(PASSES, before)
    agree(before, after)
    (pool,) = (node for node in after.nodes if node.op == "MaxPool")
    assert "layout" not in pool.attributes


def test_single_pixel_convolutions_take_their_image_in_any_spatial_order() -> None:
    """The expectation over bins of a YOLO head: softmax over an axis in the middle, then a 1x1 convolution."""
    after = check(
        PASSES,
        """
        graph @g(%x: f32[n, a, 64]) -> (%y: f32[n, a, 4]) {
          %w = constant @"w" : f32[1, 16, 1, 1]
          %t = Transpose(%x) {perm = [0, 2, 1]} : f32[n, 64, a]
          %r = Reshape(%t) {shape = [n, 4, 16, a]} : f32[n, 4, 16, a]
          %b = Transpose(%r) {perm = [0, 2, 1, 3]} : f32[n, 16, 4, a]
          %s = Softmax(%b) {axis = 1} : f32[n, 16, 4, a]
          %c = Conv(%s, %w) : f32[n, 1, 4, a]
          %f = Reshape(%c) {shape = [n, 4, a]} : f32[n, 4, a]
          %y = Transpose(%f) {perm = [0, 2, 1]} : f32[n, a, 4]
        }
        // CHECK: Reshape(%x) {shape = [n, a, 4, 16]}
        // CHECK-NEXT: Softmax({{.*}}) {axis = 3}
        // CHECK-NEXT: Conv({{.*}}) {layout = "channels_last"}
        // CHECK-NEXT: %y = Reshape
        """,
        weights(w=(1, 16, 1, 1)),
    )
    assert all(node.op != "Transpose" for node in after.nodes)


def test_quantized_networks() -> None:
    after = transformed(
        PASSES,
        parsed(
            """
            graph @g(%x: u8[1, 4, 6, 6]) -> (%y: u8[1, 4, 6, 6]) {
              %w = constant @"w" : i8[4, 4, 3, 3]
              %s = constant 0.5 : f32[]
              %z = constant 3 : u8[]
              %wz = constant 0 : i8[]
              %a = QLinearConv(%x, %s, %z, %w, %s, %wz, %s, %z) {pads = [1, 1, 1, 1]} : u8[1, 4, 6, 6]
              %b = QLinearConv(%a, %s, %z, %w, %s, %wz, %s, %z) {pads = [1, 1, 1, 1]} : u8[1, 4, 6, 6]
              %y = com.microsoft.QLinearAdd(%a, %s, %z, %b, %s, %z, %s, %z) : u8[1, 4, 6, 6]
            }
            """,
            {"w": RANDOM.integers(-9, 9, (4, 4, 3, 3)).astype(np.int8)},
        ),
    )
    assert [node.op for node in after.nodes if node.op in ("QLinearConv", "Transpose")] == [
        "Transpose",
        "QLinearConv",
        "QLinearConv",
        "Transpose",
    ]


def test_a_lookup_takes_the_order_of_its_places() -> None:
    after = check(
        "layout",
        """
        // CHECK-NOT: Gather(%table, {{.*}} : u8[1, 4, 6, 6]
        // CHECK: Gather(%table, %{{.*}}) : u8[1, 6, 6, 4]
        // CHECK: ConvInteger
        graph @g(%x: u8[1, 4, 6, 6]) -> (%y: i32[1, 4, 6, 6]) {
          %table = constant @"table" : u8[256]
          %w = constant @"w" : i8[4, 4, 3, 3]
          %a = ConvInteger(%x, %w) {pads = [1, 1, 1, 1]} : i32[1, 4, 6, 6]
          %c = Cast(%a) {to = u8} : u8[1, 4, 6, 6]
          %i = Cast(%c) {to = i32} : i32[1, 4, 6, 6]
          %b = Gather(%table, %i) : u8[1, 4, 6, 6]
          %y = ConvInteger(%b, %w) {pads = [1, 1, 1, 1]} : i32[1, 4, 6, 6]
        }
        """,
        {"table": np.arange(256)[::-1].astype(np.uint8), "w": np.ones((4, 4, 3, 3), np.int8)},
    )
    assert sum(node.op == "Transpose" for node in after.nodes) == 2
