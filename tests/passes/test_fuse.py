"""Fusion: what becomes one kernel, whichever way it is spelt, and what must stay apart."""

from __future__ import annotations

import numpy as np
from onnxc.ir.graph import Graph
from pass_checks import agree, check, parsed, transformed

RANDOM = np.random.default_rng(7)


def kernels(graph: Graph) -> list[list[str]]:
    """The operators in each group."""
    return [[inner.op for inner in node.regions["body"].nodes] for node in graph.nodes if node.op == "Fused"]


def test_chain_with_broadcasting_is_one_kernel() -> None:
    check(
        "fuse",
        """
        graph @g(%x: f32[batch, 8, h, w], %scale: f32[8, 1, 1], %y: f32[batch, 8, h, w])
        -> (%out: f32[batch, 8, h, w]) {
          %a = Mul(%x, %scale) : f32[batch, 8, h, w]   // from "scale"
          %b = Add(%a, %y) : f32[batch, 8, h, w]       // from "add"
          %c = Sigmoid(%b) : f32[batch, 8, h, w]
          %out = Mul(%b, %c) : f32[batch, 8, h, w]
        }
        // CHECK: %out = Fused(%x, %scale, %y) {kind = "map"}
        // CHECK-SAME: // from "scale", "add"
        // CHECK-NOT: Fused
        """,
    )


def test_softmax_spelt_out_is_one_kernel() -> None:
    graph = check(
        "fuse",
        """
        graph @g(%x: f32[batch, heads, q, 16]) -> (%y: f32[batch, heads, q, 16]) {
          %top = ReduceMax(%x) {axes = [-1], keepdims = 1} : f32[batch, heads, q, 1]
          %d = Sub(%x, %top) : f32[batch, heads, q, 16]
          %e = Exp(%d) : f32[batch, heads, q, 16]
          %s = ReduceSum(%e) {axes = [3], keepdims = 1} : f32[batch, heads, q, 1]
          %y = Div(%e, %s) : f32[batch, heads, q, 16]
        }
        // CHECK: %y = Fused(%x) {kind = "rows"}
        """,
    )
    assert kernels(graph) == [["ReduceMax", "Sub", "Exp", "ReduceSum", "Div"]]


def test_layer_norm_spelt_out_is_one_kernel_with_its_residual() -> None:
    graph = check(
        "fuse",
        """
        graph @g(%x: f32[b, s, 12], %r: f32[b, s, 12], %w: f32[12], %z: f32[12])
        -> (%y: f32[b, s, 12], %a: f32[b, s, 12]) {
          %half = constant 0.5 : f32[]
          %eps = constant 1e-05 : f32[]
          %a = Add(%x, %r) : f32[b, s, 12]
          %m = ReduceMean(%a) {axes = [-1]} : f32[b, s, 1]
          %d = Sub(%a, %m) : f32[b, s, 12]
          %q = Mul(%d, %d) : f32[b, s, 12]
          %v = ReduceMean(%q) {axes = [-1]} : f32[b, s, 1]
          %ve = Add(%v, %eps) : f32[b, s, 1]
          %p = Sqrt(%ve) : f32[b, s, 1]
          %n = Div(%d, %p) : f32[b, s, 12]
          %nw = Mul(%n, %w) : f32[b, s, 12]
          %y = Add(%nw, %z) : f32[b, s, 12]
        }
        // CHECK: %{{a|y}}, %{{a|y}} = Fused(
        // CHECK-SAME: kind = "rows"
        """,
    )
    assert len(kernels(graph)) == 1


def test_bias_residual_and_activation_are_the_epilogue_of_a_convolution() -> None:
    arrays = {"w": RANDOM.normal(size=(4, 3, 3, 3)).astype(np.float32), "b": RANDOM.normal(size=4).astype(np.float32)}
    graph = check(
        "fuse",
        """
        graph @g(%x: f32[n, 3, 6, 6], %skip: f32[n, 4, 6, 6]) -> (%y: f32[n, 4, 6, 6]) {
          %w = constant @"w" : f32[4, 3, 3, 3]
          %b = constant @"b" : f32[4]
          %c = Conv(%x, %w, %b) {pads = [1, 1, 1, 1]} : f32[n, 4, 6, 6]
          %s = Sigmoid(%c) : f32[n, 4, 6, 6]
          %silu = Mul(%c, %s) : f32[n, 4, 6, 6]
          %y = Add(%silu, %skip) : f32[n, 4, 6, 6]
        }
        // CHECK: %y = Fused({{.*}}) {kind = "heavy"}
        """,
        arrays,
    )
    assert kernels(graph) == [["Conv", "Sigmoid", "Mul", "Add"]]


def test_two_contractions_are_two_kernels() -> None:
    graph = check(
        "fuse",
        """
        graph @g(%x: f32[n, 8], %a: f32[8, 4], %b: f32[8, 4]) -> (%y: f32[n, 4]) {
          %p = MatMul(%x, %a) : f32[n, 4]
          %q = MatMul(%x, %b) : f32[n, 4]
          %y = Add(%p, %q) : f32[n, 4]
        }
        // CHECK-COUNT-2: Fused(
        """,
    )
    assert sorted(map(len, kernels(graph))) == [1, 2]


def test_attention_reads_and_writes_heads_in_place() -> None:
    graph = check(
        "fuse",
        """
        graph @g(%q: f32[b, s, 12], %k: f32[b, s, 12]) -> (%y: f32[b, s, 3, s]) {
          %q4 = Reshape(%q) {shape = [b, s, 3, 4]} : f32[b, s, 3, 4]
          %k4 = Reshape(%k) {shape = [b, s, 3, 4]} : f32[b, s, 3, 4]
          %qt = Transpose(%q4) {perm = [0, 2, 1, 3]} : f32[b, 3, s, 4]
          %kt = Transpose(%k4) {perm = [0, 2, 3, 1]} : f32[b, 3, 4, s]
          %m = MatMul(%qt, %kt) : f32[b, 3, s, s]
          %y = Transpose(%m) {perm = [0, 2, 1, 3]} : f32[b, s, 3, s]
        }
        // CHECK: %y = Fused(%q4, %k4) {kind = "heavy"}
        """,
    )
    assert kernels(graph) == [["Transpose", "Transpose", "MatMul", "Transpose"]]


def test_movement_is_taken_in_by_each_of_its_readers() -> None:
    graph = check(
        "fuse",
        """
        graph @g(%x: f32[n, 8], %y: f32[n, 4]) -> (%u: f32[n, 4], %v: f32[n, 1]) {
          %a = Slice(%x) {starts = [2], ends = [6], axes = [1], steps = [1]} : f32[n, 4]
          %u = Add(%a, %y) : f32[n, 4]
          %v = ReduceSum(%a) {axes = [1]} : f32[n, 1]
        }
        // CHECK-COUNT-2: Slice
        // CHECK-NOT: Slice
        """,
    )
    assert sorted(kernels(graph)) == [["Slice", "Add"], ["Slice", "ReduceSum"]]


def test_views_stay_views() -> None:
    graph = check(
        "fuse",
        """
        graph @g(%x: f32[n, 8]) -> (%y: f32[n, 2, 4]) {
          %r = Relu(%x) : f32[n, 8]
          %y = Reshape(%r) {shape = [n, 2, 4]} : f32[n, 2, 4]
        }
        // CHECK: Fused(
        // CHECK: %y = Reshape(
        """,
    )
    assert kernels(graph) == [["Relu"]]


def test_costly_values_are_not_made_again_for_each_broadcast() -> None:
    graph = check(
        "fuse",
        """
        graph @g(%x: f32[1, 8], %y: f32[n, 8]) -> (%z: f32[n, 8]) {
          %e = Erf(%x) : f32[1, 8]
          %z = Add(%e, %y) : f32[n, 8]
        }
        // CHECK-COUNT-2: Fused(
        """,
    )
    assert kernels(graph) == [["Erf"], ["Add"]]


def test_no_group_depends_on_itself() -> None:
    """%a and %d fit one loop, but between them lies a contraction that needs %a."""
    graph = check(
        "fuse",
        """
        graph @g(%x: f32[4, 4], %w: f32[4, 4]) -> (%d: f32[4, 4]) {
          %a = Relu(%x) : f32[4, 4]
          %m = MatMul(%a, %w) : f32[4, 4]
          %s = ReduceSum(%m) {axes = [1]} : f32[4, 1]
          %d = Add(%a, %s) : f32[4, 4]
        }
        // CHECK: Fused(
        """,
    )
    assert ["Relu"] in kernels(graph)


def test_a_computed_shape_is_known_before_the_kernel_that_needs_it() -> None:
    before = parsed(
        """
        graph @g(%x: f32[n, 4], %s: i64[2]) -> (%y: f32[t_0, t_1]) {
          %one = constant [1] : i64[1]
          %t = Mul(%s, %one) : i64[2]
          %y = Reshape(%x, %t) : f32[t_0, t_1]
        }
        """,
        verified=False,
    )
    after = transformed("fuse", before, verified=False)
    assert kernels(after)[0] == ["Mul"]
    agree(before, after, inputs={"x": np.ones((3, 4), np.float32), "s": np.array([2, 6])})


def test_bodies_of_branches_are_fused_too() -> None:
    check(
        "fuse",
        """
        graph @g(%c: bool[], %x: f32[n]) -> (%y: f32[n]) {
          %y = If(%c) : f32[n]
            then_branch: graph @t() -> (%p: f32[n]) {
              %a = Exp(%x) : f32[n]
              %p = Neg(%a) : f32[n]
            }
            else_branch: graph @e() -> (%q: f32[n]) {
              %q = Relu(%x) : f32[n]
            }
        }
        // CHECK: then_branch
        // CHECK: %p = Fused(%x)
        // CHECK: %q = Fused(%x)
        """,
    )


def test_reductions_of_different_rows_stay_apart() -> None:
    """Global response normalisation: the norm of each channel, over the mean norm of all. Together, every channel
    would compute every norm."""
    graph = check(
        "fuse",
        """
        graph @g(%x: f32[batch, h, w, 16]) -> (%y: f32[batch, h, w, 16]) {
          %norm = ReduceL2(%x) {axes = [1, 2], keepdims = 1} : f32[batch, 1, 1, 16]
          %mean = ReduceMean(%norm) {axes = [-1], keepdims = 1} : f32[batch, 1, 1, 1]
          %ratio = Div(%norm, %mean) : f32[batch, 1, 1, 16]
          %y = Mul(%x, %ratio) : f32[batch, h, w, 16]
        }
        // CHECK-COUNT-2: = Fused(
        """,
    )
    assert all(len({"ReduceL2", "ReduceMean"} & set(ops)) < 2 for ops in kernels(graph))


def test_rows_and_columns_of_a_square_are_normalised_apart() -> None:
    """One kernel would normalise all rows for each column: of n in turn, Sinkhorn's iteration, with 16^n times the
    work."""
    graph = check(
        "fuse",
        """
        graph @g(%x: f32[16, 16]) -> (%y: f32[16, 16]) {
          %a = Softmax(%x) {axis = 0} : f32[16, 16]
          %b = Softmax(%a) {axis = 1} : f32[16, 16]
          %y = Softmax(%b) {axis = 0} : f32[16, 16]
        }
        // CHECK: %y = Fused(%b) {kind = "rows"}
        """,
    )
    assert kernels(graph) == [["Softmax"], ["Softmax"], ["Softmax"]]


def test_an_image_is_turned_by_the_convolution_that_reads_it() -> None:
    """What is computed before stays in the order in which it lies."""
    graph = parsed(
        """
        graph @g(%x: f32[1, 3, 8, 8], %w: f32[4, 3, 3, 3]) -> (%y: f32[1, 6, 6, 4]) {
          %half = constant 0.5 : f32[]
          %a = Mul(%x, %half) : f32[1, 3, 8, 8]
          %b = Exp(%a) : f32[1, 3, 8, 8]
          %last = Transpose(%b) {perm = [0, 2, 3, 1]} : f32[1, 8, 8, 3]
          %y = Conv(%last, %w) {layout = "channels_last"} : f32[1, 6, 6, 4]
        }
        """
    )
    assert kernels(transformed("fuse", graph)) == [["Mul", "Exp"], ["Transpose", "Conv"]]
