"""Constants computed at compile time, and what is left to the run."""

from __future__ import annotations

import numpy as np
import pytest
from onnxc.ir.graph import Constant
from onnxc.passes.fold import Fold
from pass_checks import check, parsed, transformed

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_operators_of_constants() -> None:
    check(
        "fold,cleanup",
        """
        graph @g(%x: f32[2, 3]) -> (%y: f32[2, 4]) {
          %w = constant @"w" : f32[3, 4]
          %two = constant 2.0 : f32[]
          %scaled = Mul(%w, %two) : f32[3, 4]   // from "scale"
          %y = MatMul(%x, %scaled) : f32[2, 4]
        }
        // CHECK: graph @g
        // CHECK-NEXT: %scaled = constant
        // CHECK-SAME: // from "scale"
        // CHECK-NEXT: %y = MatMul(%x, %scaled)
        """,
        {"w": WEIGHT},
    )


def test_moving_weights_copies_nothing() -> None:
    graph = parsed(
        """
        graph @g(%x: f32[2, 4]) -> (%y: f32[2, 3]) {
          %w = constant @"w" : f32[3, 4]
          %t = Transpose(%w) {perm = [1, 0]} : f32[4, 3]
          %y = MatMul(%x, %t) : f32[2, 3]
        }
        """,
        {"w": WEIGHT},
    )
    folded = transformed("fold,cleanup", graph)
    (constant,) = (node for node in folded.nodes if node.op == "Constant")
    handle = constant.attributes["value"]
    assert isinstance(handle, Constant)
    assert handle.array.shape == (4, 3)
    assert np.shares_memory(handle.array, WEIGHT)


def test_what_only_grows_is_left() -> None:
    check(
        "canonicalize,fold,cleanup",
        """
        graph @g(%x: f32[1024, 64]) -> (%y: f32[1024, 64], %z: f32[8, 8]) {
          %c = constant 2.0 : f32[]
          %big = constant [1024, 64] : i64[2]
          %small = constant [8, 8] : i64[2]
          %e = Expand(%c, %big) : f32[1024, 64]
          %y = Add(%x, %e) : f32[1024, 64]
          %z = Expand(%c, %small) : f32[8, 8]
        }
        // CHECK: %e = Expand(%c) {shape = [1024, 64]}
        // CHECK: %z = constant
        """,
    )


def test_random_numbers_are_drawn_each_time() -> None:
    graph = parsed("graph @g() -> (%y: f32[3]) {\n  %y = RandomNormal() {shape = [3]} : f32[3]\n}", verified=False)
    assert transformed("fold", graph, verified=False) is graph


def test_sizes_that_are_known_become_constants() -> None:
    check(
        "fold,cleanup",
        """
        graph @g(%x: f32[batch, 3, 8]) -> (%y: bool[], %z: i64[2]) {
          %shape = Shape(%x) : i64[3]
          %one = constant [1] : i64[1]
          %three = constant [3] : i64[1]
          %z = Slice(%shape, %one, %three) : i64[2]
          %rank = Size(%shape) : i64[]
          %scalar = constant 2 : i64[]
          %y = Less(%scalar, %rank) : bool[]
        }
        // CHECK: graph @g
        // CHECK-NEXT: %z = constant [3, 8] : i64[2]
        // CHECK-NEXT: %y = constant true : bool[]
        """,
    )


BRANCHES = """
graph @g(%x: f32[batch, 1, 5], %unknown: bool[]) -> (%y: f32[batch, 5], %z: f32[batch, 1, 5]) {{
  %shape = Shape(%x) {{start = 1, end = 2}} : i64[1]
  %one = constant [{number}] : i64[1]
  %c = Equal(%shape, %one) : bool[1]
  %none = constant [] : i64[0]
  %condition = Reshape(%c, %none) : bool[]
  %y = If(%condition) : f32[batch, 5]
    then_branch: graph @yes() -> (%s: f32[batch, 5]) {{
      %axes = constant [1] : i64[1]
      %s = Squeeze(%x, %axes) : f32[batch, 5]
    }}
    else_branch: graph @no() -> (%t: f32[batch, 5]) {{
      %axes = constant [1] : i64[1]
      %t = ReduceSum(%x, %axes) {{keepdims = 0}} : f32[batch, 5]
    }}
  %z = If(%unknown) : f32[batch, 1, 5]
    then_branch: graph @yes2() -> (%u: f32[batch, 1, 5]) {{
      %s = Exp(%x) : f32[batch, 1, 5]
      %u = Neg(%s) : f32[batch, 1, 5]
    }}
    else_branch: graph @no2() -> (%v: f32[batch, 1, 5]) {{
      %v = Neg(%x) : f32[batch, 1, 5]
    }}
}}
"""


def test_known_branches_are_taken() -> None:
    """The names of a branch may be those of another region: they get new ones."""
    check(
        "fold,cleanup",
        BRANCHES.format(number=1)
        + """
        // CHECK-NOT: If(%condition)
        // CHECK: %y = Squeeze(%x, %shape)
        // CHECK: %z = If(%unknown)
        // CHECK: %s = Exp(%x)
        """,
    )
    check(
        "fold,cleanup",
        BRANCHES.format(number=2) + "// CHECK: %y = ReduceSum(%x, %{{[a-z]+}}) {keepdims = 0}",
    )


def test_sizes_that_were_unknown_become_numbers() -> None:
    """Folding %n tells what n_0 is, here and in all that follows."""
    check(
        "fold,cleanup",
        """
        graph @g(%x: f32[1]) -> (%y: f32[n_0], %size: i64[]) {
          %a = constant [1.5] : f32[1]
          %b = Ceil(%a) : f32[1]
          %n = Cast(%b) {to = i64} : i64[1]
          %e = Expand(%x, %n) : f32[n_0]
          %y = Exp(%e) : f32[n_0]
          %size = Dims() {values = [n_0], shape = []} : i64[]
        }
        // CHECK: %e = Expand(%x, %n) : f32[2]
        // CHECK-NEXT: %y = Exp(%e) : f32[2]
        // CHECK-NEXT: %size = constant 2 : i64[]
        """,
    )


@pytest.mark.parametrize(("op", "folded"), [("MaxPool", False), ("Relu", True)])
def test_what_the_reference_does_slowly_is_left_to_the_run(op: str, folded: bool) -> None:
    x = np.random.default_rng(0).standard_normal((1, 8, 64, 64)).astype(np.float32)
    attributes = "{kernel_shape = [5, 5], pads = [2, 2, 2, 2]}" if op == "MaxPool" else ""
    graph = parsed(f"""graph @g() -> (%y: f32[1, 8, 64, 64]) {{
      %x = constant @"x" : f32[1, 8, 64, 64]
      %y = {op}(%x) {attributes} : f32[1, 8, 64, 64]
    }}""", {"x": x})  # fmt: skip
    assert (op not in [node.op for node in Fold().run(graph).nodes]) == folded


def test_weights_of_recurrent_layers_are_made_reals_once() -> None:
    """Of 8 bits they were dequantized in every run, which took as long as the layer."""
    random = np.random.default_rng(0)
    arrays = {name: random.integers(-127, 128, (1, 512, 128)).astype(np.int8) for name in ("w", "r")}
    arrays["s"] = np.ones(512, np.float32)
    graph = parsed("""graph @g(%x: f32[9, 1, 128]) -> (%y: f32[9, 1, 1, 128]) {
      %w = constant @"w" : i8[1, 512, 128]
      %r = constant @"r" : i8[1, 512, 128]
      %s = constant @"s" : f32[512]
      %wide = DequantizeLinear(%w, %s) {axis = 1} : f32[1, 512, 128]
      %again = DequantizeLinear(%r, %s) {axis = 1} : f32[1, 512, 128]
      %y = LSTM(%x, %wide, %again) {hidden_size = 128} : f32[9, 1, 1, 128]
    }""", arrays)  # fmt: skip
    assert "DequantizeLinear" not in [node.op for node in Fold().run(graph).nodes]
