"""Canonical forms, as text and as numbers."""

from __future__ import annotations

import numpy as np
import pytest
from onnxc.ir.dtypes import BF16, BOOL, F16, F32, F64, I8, I32, I64, U8, DType
from onnxc.passes.canonicalize import lossless
from pass_checks import check, parsed, transformed


def test_shape_operands_become_attributes() -> None:
    check(
        "canonicalize,cleanup",
        """
        graph @g(%x: f32[2, 3, 8]) -> (%y: f32[2, 2, 4]) {
          %starts = constant [1, 0] : i64[2]
          %ends = constant [3, 2147483647] : i64[2]
          %axes = constant [1, -1] : i64[2]
          %steps = constant [1, 2] : i64[2]
          %y = Slice(%x, %starts, %ends, %axes, %steps) : f32[2, 2, 4]
        }
        // CHECK: graph @g
        // CHECK-NEXT: %y = Slice(%x) {starts = [1, 0], ends = [3, 2147483647], axes = [1, -1], steps = [1, 2]}
        """,
    )


def test_unknown_shape_operands_stay() -> None:
    check(
        "canonicalize,cleanup",
        """
        graph @g(%x: f32[4], %n: i64[1]) -> (%y: f32[min(4, n_0)]) {
          %starts = constant [0] : i64[1]
          %y = Slice(%x, %starts, %n) : f32[min(4, n_0)]
        }
        // CHECK: %y = Slice(%x, _, %n) {starts = [0]}
        """,
    )


def test_symbolic_shape_arithmetic_becomes_an_attribute() -> None:
    check(
        "canonicalize,cleanup",
        """
        graph @g(%x: f32[batch, 3, h, w]) -> (%y: f32[batch, 3, h*w]) {
          %shape = Shape(%x) : i64[4]
          %zero = constant [0] : i64[1]
          %one = constant [1] : i64[1]
          %batch = Slice(%shape, %zero, %one) : i64[1]
          %rest = constant [3, -1] : i64[2]
          %to = Concat(%batch, %rest) {axis = 0} : i64[3]
          %y = Reshape(%x, %to) : f32[batch, 3, h*w]
        }
        // CHECK: graph @g
        // CHECK-NEXT: %y = Reshape(%x) {shape = [batch, 3, h*w]}
        """,
    )


def test_sizes_that_data_operators_read() -> None:
    check(
        "canonicalize,cleanup",
        """
        graph @g(%x: f32[batch, seq]) -> (%y: i32[2], %z: i64[]) {
          %shape = Shape(%x) : i64[2]
          %narrow = Cast(%shape) {to = i32} : i32[2]
          %two = constant 2 : i32[]
          %y = Mul(%narrow, %two) : i32[2]
          %z = Size(%x) : i64[]
        }
        // CHECK: %y.dims = Dims() {values = [2*batch, 2*seq], shape = [2]}
        // CHECK-NEXT: %y = Cast(%y.dims) {to = i32}
        // CHECK-NEXT: %z = Dims() {values = [batch*seq], shape = []}
        """,
    )


def test_reshapes_merge() -> None:
    check(
        "canonicalize,cleanup",
        """
        graph @g(%x: f32[2, 3, 4]) -> (%y: f32[6, 4], %z: f32[2, 1, 12]) {
          %f = Flatten(%x) {axis = 1} : f32[2, 12]
          %axes = constant [1] : i64[1]
          %z = Unsqueeze(%f, %axes) : f32[2, 1, 12]
          %shape = constant [6, -1] : i64[2]
          %y = Reshape(%z, %shape) : f32[6, 4]
        }
        // CHECK: graph @g
        // CHECK-NEXT: %z = Reshape(%x) {shape = [2, 1, 12]}
        // CHECK-NEXT: %y = Reshape(%x) {shape = [6, 4]}
        """,
    )


def test_reshape_of_nothing() -> None:
    check(
        "canonicalize,cleanup",
        """
        graph @g(%x: f32[0, 3]) -> (%y: f32[3, 0]) {
          %axes = constant [1] : i64[1]
          %u = Unsqueeze(%x, %axes) : f32[0, 1, 3]
          %shape = constant [3, 0] : i64[2]
          %y = Reshape(%u, %shape) {allowzero = 1} : f32[3, 0]
        }
        // CHECK: %y = Reshape(%x) {shape = [3, 0], allowzero = 1}
        """,
    )


NO_OPS = {
    "Identity(%a)": (),
    "Cast(%a) {to = f32}": (),
    "Reshape(%a, %c)": ([2, -1, 4],),
    "Expand(%a, %c)": ([3, 1],),
    "Tile(%a, %c)": ([1, 1, 1],),
    "Slice(%a, %c, %c1, %c2)": ([0, -4], [3, 9], [1, 2]),
    "Pad(%a, %c)": ([0] * 6,),
    "Transpose(%a) {perm = [0, 1, 2]}": (),
    "Concat(%a) {axis = 1}": (),
    "Clip(%a)": (),
    "Max(%a)": (),
    "Sum(%a)": (),
    "Split(%a) {axis = 1, num_outputs = 1}": (),
}


@pytest.mark.parametrize("call", NO_OPS)
def test_no_ops_go(call: str) -> None:
    contents = {f"c{i or ''}": np.array(values, np.int64) for i, values in enumerate(NO_OPS[call])}
    constants = "\n".join(f'%{name} = constant @"{name}" : i64[{len(a)}]' for name, a in contents.items())
    check(
        "canonicalize,cleanup",
        f"""
        graph @g(%x: f32[2, 3, 4]) -> (%y: f32[2, 3, 4]) {{
          {constants}
          %a = Sigmoid(%x) : f32[2, 3, 4]
          %b = {call} : f32[2, 3, 4]
          %y = Exp(%b) : f32[2, 3, 4]
        }}
        // CHECK: %a = Sigmoid(%x)
        // CHECK-NEXT: %y = Exp(%a)
        """,
        contents,
    )


def test_what_undoes_itself() -> None:
    check(
        "canonicalize,cleanup",
        """
        graph @g(%x: f32[3], %c: bool[3]) -> (%y: f32[3], %d: bool[3]) {
          %n = Neg(%x) : f32[3]
          %m = Neg(%n) : f32[3]
          %y = Exp(%m) : f32[3]
          %e = Not(%c) : bool[3]
          %f = Not(%e) : bool[3]
          %d = And(%f, %c) : bool[3]
        }
        // CHECK: graph @g
        // CHECK-NEXT: %y = Exp(%x)
        // CHECK-NEXT: %d = And(%c, %c)
        """,
    )


def test_transposes_merge_and_those_of_ones_are_reshapes() -> None:
    check(
        "canonicalize,cleanup",
        """
        graph @g(%x: f32[2, 3, 4], %v: f32[5, 1, 1, 7]) -> (%y: f32[2, 4, 3], %w: f32[5, 7, 1, 1]) {
          %a = Transpose(%x) : f32[4, 3, 2]
          %y = Transpose(%a) {perm = [2, 0, 1]} : f32[2, 4, 3]
          %w = Transpose(%v) {perm = [0, 3, 1, 2]} : f32[5, 7, 1, 1]
        }
        // CHECK: graph @g
        // CHECK-NEXT: %y = Transpose(%x) {perm = [0, 2, 1]}
        // CHECK-NEXT: %w = Reshape(%v) {shape = [5, 7, 1, 1]}
        """,
    )


def test_outputs_stay_results_of_nodes() -> None:
    check(
        "canonicalize,cleanup",
        """
        graph @g(%x: f32[3]) -> (%same: f32[3], %y: f32[3], %z: f32[3]) {
          %same = Identity(%x) : f32[3]
          %a = Exp(%x) : f32[3]
          %y = Identity(%a) : f32[3]
          %z = Identity(%a) : f32[3]
        }
        // CHECK: graph @g(%x: f32[3]) -> (%same: f32[3], %y: f32[3], %z: f32[3])
        // CHECK-NEXT: %same = Identity(%x)
        // CHECK-NEXT: %y = Exp(%x)
        // CHECK-NEXT: %z = Identity(%y)
        """,
    )


def test_regions_are_rewritten_too() -> None:
    check(
        "canonicalize,cleanup",
        """
        graph @g(%c: bool[], %x: f32[3]) -> (%y: f32[3]) {
          %i = Identity(%x) : f32[3]
          %y = If(%c) : f32[3]
            then_branch: graph @yes() -> (%a: f32[3]) {
              %n = Identity(%i) : f32[3]
              %a = Exp(%n) : f32[3]
            }
            else_branch: graph @no() -> (%b: f32[3]) {
              %n = Neg(%i) : f32[3]
              %b = Exp(%n) : f32[3]
            }
        }
        // CHECK: graph @yes
        // CHECK-NEXT: %a = Exp(%x)
        // CHECK: graph @no
        // CHECK-NEXT: %n = Neg(%x)
        // CHECK-NEXT: %b = Exp(%n)
        """,
    )


def test_sizes_known_by_the_name_of_a_value_follow_it() -> None:
    graph = parsed(
        """
        graph @g(%x: f32[1], %n: i64[1]) -> (%y: f32[m_0]) {
          %m = Identity(%n) : i64[1]
          %y = Expand(%x, %m) : f32[m_0]
        }
        """
    )
    result = transformed("canonicalize", graph)
    assert str(result.outputs[0].shape[0]) == "n_0"


def test_constants_on_the_right() -> None:
    check(
        "canonicalize,cleanup",
        """
        graph @g(%x: f32[3]) -> (%y: f32[3]) {
          %c = constant 2.0 : f32[]
          %a = Mul(%c, %x) : f32[3]
          %y = Sub(%c, %a) : f32[3]
        }
        // CHECK: %a = Mul(%x, %c)
        // CHECK-NEXT: %y = Sub(%c, %a)
        """,
    )


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (F16, F32, True), (F32, F16, False), (F32, F64, True), (BF16, F16, False), (F16, BF16, False),
        (I32, F32, False), (I32, F64, True), (U8, F16, True), (U8, I32, True), (I8, U8, False), (I32, I64, True),
        (BOOL, U8, True), (I64, F64, False), (BF16, F32, True),
    ],
)  # fmt: skip
def test_lossless_conversions(source: DType, target: DType, expected: bool) -> None:
    assert lossless(source, target) is expected
    if expected and source != BOOL:
        low, high = source.limits
        values = np.array([low, low / 2, 0, 1, high / 2, high]).astype(source.numpy)
        np.testing.assert_array_equal(values.astype(target.numpy).astype(source.numpy), values)
