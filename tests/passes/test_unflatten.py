"""Products of flattened operands are made in the shape that their readers want."""

from __future__ import annotations

import numpy as np
from pass_checks import check

RANDOM = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def test_a_gemm_between_reshapes_is_a_product_of_the_shaped_operand() -> None:
    check(
        "unflatten",
        """
        // CHECK: %[[PRODUCT:.*]] = MatMul(%x, %w) : f32[batch, tokens, 4]
        // CHECK-NEXT: %shaped = Add(%[[PRODUCT]], %c) : f32[batch, tokens, 4]
        // CHECK-NEXT: %y = Relu(%shaped)
        // CHECK-NOT: Reshape
        graph @g(%x: f32[batch, tokens, 5]) -> (%y: f32[batch, tokens, 4]) {
          %w = constant @"w" : f32[5, 4]
          %c = constant @"c" : f32[4]
          %flat = Reshape(%x) {shape = [batch*tokens, 5]} : f32[batch*tokens, 5]
          %product = Gemm(%flat, %w, %c) : f32[batch*tokens, 4]
          %shaped = Reshape(%product) {shape = [batch, tokens, 4]} : f32[batch, tokens, 4]
          %y = Relu(%shaped) : f32[batch, tokens, 4]
        }
        """,
        {"w": weights(5, 4), "c": weights(4)},
    )


def test_transposed_weights_and_an_operand_of_another_shape() -> None:
    check(
        "unflatten",
        """
        // CHECK: %[[SHAPED:.*]] = Reshape(%x) {shape = [1, 3, 6]} : f32[1, 3, 6]
        // CHECK: MatMul(%[[SHAPED]], %{{.*}}) : f32[1, 3, 4]
        // CHECK-NOT: Gemm
        graph @g(%x: f32[3, 2, 3]) -> (%y: f32[1, 3, 4]) {
          %w = constant @"w" : f32[4, 6]
          %flat = Reshape(%x) {shape = [3, 6]} : f32[3, 6]
          %product = Gemm(%flat, %w) {transB = 1} : f32[3, 4]
          %y = Reshape(%product) {shape = [1, 3, 4]} : f32[1, 3, 4]
        }
        """,
        {"w": weights(4, 6)},
    )


def test_what_splits_columns_or_is_read_twice_stays() -> None:
    check(
        "unflatten",
        """
        // CHECK: Gemm
        // CHECK: Reshape
        // CHECK: MatMul
        // CHECK: Reshape
        graph @g(%x: f32[2, 5]) -> (%heads: f32[2, 2, 2], %y: f32[1, 2, 4], %z: f32[2, 4]) {
          %w = constant @"w" : f32[5, 4]
          %split = Gemm(%x, %w) : f32[2, 4]
          %heads = Reshape(%split) {shape = [2, 2, 2]} : f32[2, 2, 2]
          %twice = MatMul(%x, %w) : f32[2, 4]
          %y = Reshape(%twice) {shape = [1, 2, 4]} : f32[1, 2, 4]
          %z = Relu(%twice) : f32[2, 4]
        }
        """,
        {"w": weights(5, 4)},
    )
