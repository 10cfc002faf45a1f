"""Products of one operand with several weights become one product, and its pieces."""

from __future__ import annotations

import numpy as np
from pass_checks import check

RANDOM = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def test_queries_keys_and_values_are_one_product() -> None:
    check(
        "merge-products",
        """
        // CHECK: %[[MERGED:.*]] = MatMul(%x, %{{.*}}) : f32[batch, 7]
        // CHECK-NEXT: %[[ROW:.*]] = constant
        // CHECK: %[[SUM:.*]] = Add(%[[MERGED]], %[[ROW]])
        // CHECK-NEXT: %q.bias, %k.bias = Split(%[[SUM]]) {axis = 1, split = [4, 3]}
        // CHECK-NOT: MatMul
        graph @g(%x: f32[batch, 5]) -> (%a: f32[batch, 4], %b: f32[batch, 3]) {
          %wq = constant @"wq" : f32[5, 4]
          %wk = constant @"wk" : f32[5, 3]
          %bq = constant @"bq" : f32[4]
          %bk = constant @"bk" : f32[3]
          %q = MatMul(%x, %wq) : f32[batch, 4]
          %q.bias = Add(%q, %bq) : f32[batch, 4]
          %a = Relu(%q.bias) : f32[batch, 4]
          %k = MatMul(%x, %wk) : f32[batch, 3]
          %k.bias = Add(%bk, %k) : f32[batch, 3]
          %b = Neg(%k.bias) : f32[batch, 3]
        }
        """,
        {"wq": weights(5, 4), "wk": weights(5, 3), "bq": weights(4), "bk": weights(3)},
    )


def test_gates_without_a_row_are_one_product() -> None:
    check(
        "merge-products",
        """
        // CHECK: MatMul
        // CHECK: %up, %gate = Split
        // CHECK-NOT: MatMul
        graph @g(%x: f32[2, n, 5]) -> (%y: f32[2, n, 4]) {
          %wu = constant @"wu" : f32[5, 4]
          %wg = constant @"wg" : f32[5, 4]
          %up = MatMul(%x, %wu) : f32[2, n, 4]
          %gate = MatMul(%x, %wg) : f32[2, n, 4]
          %s = Sigmoid(%gate) : f32[2, n, 4]
          %y = Mul(%up, %s) : f32[2, n, 4]
        }
        """,
        {"wu": weights(5, 4), "wg": weights(5, 4)},
    )


def test_what_the_model_returns_stays_an_array_of_its_own() -> None:
    check(
        "merge-products",
        """
        // CHECK-NOT: Split
        // CHECK: MatMul
        // CHECK: MatMul
        graph @g(%x: f32[2, 5]) -> (%a: f32[2, 4], %b: f32[2, 4]) {
          %wa = constant @"wa" : f32[5, 4]
          %wb = constant @"wb" : f32[5, 4]
          %a = MatMul(%x, %wa) : f32[2, 4]
          %c = MatMul(%x, %wb) : f32[2, 4]
          %b = Relu(%c) : f32[2, 4]
        }
        """,
        {"wa": weights(5, 4), "wb": weights(5, 4)},
    )


def test_different_operands_stay_apart() -> None:
    check(
        "merge-products",
        """
        // CHECK-NOT: Split
        graph @g(%x: f32[2, 5], %z: f32[2, 5]) -> (%a: f32[2, 4], %b: f32[2, 4]) {
          %wa = constant @"wa" : f32[5, 4]
          %wb = constant @"wb" : f32[5, 4]
          %p = MatMul(%x, %wa) : f32[2, 4]
          %a = Relu(%p) : f32[2, 4]
          %q = MatMul(%z, %wb) : f32[2, 4]
          %b = Relu(%q) : f32[2, 4]
        }
        """,
        {"wa": weights(5, 4), "wb": weights(5, 4)},
    )


def test_packed_products_are_one_product() -> None:
    """Whose rows are rounded once; those of another block size are by themselves."""
    check(
        "merge-products",
        """
        // CHECK: %[[CODES:.*]] = constant {{.*}} : u8[7, 16]
        // CHECK: %[[SCALES:.*]] = constant {{.*}} : f32[7, 2]
        // CHECK: PackedMatMul(%x, %[[CODES]], %[[SCALES]]) {depth = 32, bits = 4, block_size = 16} : f32[n, 7]
        // CHECK-NEXT: %q, %k = Split
        // CHECK: %v = onnxc.PackedMatMul
        graph @g(%x: f32[n, 32]) -> (%a: f32[n, 4], %b: f32[n, 3], %c: f32[n, 3]) {
          %wq = constant @"wq" : u8[4, 16]
          %sq = constant @"sq" : f32[4, 2]
          %wk = constant @"wk" : u8[3, 16]
          %sk = constant @"sk" : f32[3, 2]
          %sv = constant @"sv" : f32[3, 1]
          %q = onnxc.PackedMatMul(%x, %wq, %sq) {depth = 32, bits = 4, block_size = 16} : f32[n, 4]
          %k = onnxc.PackedMatMul(%x, %wk, %sk) {depth = 32, bits = 4, block_size = 16} : f32[n, 3]
          %v = onnxc.PackedMatMul(%x, %wk, %sv) {depth = 32, bits = 4, block_size = 32} : f32[n, 3]
          %a = Relu(%q) : f32[n, 4]
          %b = Neg(%k) : f32[n, 3]
          %c = Neg(%v) : f32[n, 3]
        }
        """,
        {
            "wq": RANDOM.integers(0, 256, (4, 16)).astype(np.uint8),
            "wk": RANDOM.integers(0, 256, (3, 16)).astype(np.uint8),
            "sq": weights(4, 2),
            "sk": weights(3, 2),
            "sv": weights(3, 1),
        },
    )
