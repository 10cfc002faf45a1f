"""Loops: states that never change become values around them, conditions that count become numbers of iterations."""

from __future__ import annotations

import numpy as np
from against_onnxruntime import assert_agree
from pass_checks import check
from small_models import Array, model_of_text


def test_a_counting_condition_becomes_a_number_of_iterations() -> None:
    check(
        "loops,canonicalize,fold,cleanup",
        """
    graph @g(%x: f32[time, 4]) -> (%rows: f32[loop_size1, 4]) {
      %zero = constant 0 : i64[]
      %sizes = Dims() {values = [time], shape = []} : i64[]
      %float = constant 0.0 : f32[]
      %limit = Cast(%sizes) {to = f32} : f32[]
      %begins = Less(%float, %limit) : bool[]
      %loop, %kept, %rows = Loop(_, %begins, %zero, %sizes) : i64[], i64[], f32[loop_size1, 4]
        body: graph @b(%i: i64[], %b: bool[], %k: i64[], %n: i64[]) -> (%on: bool[], %q: i64[], %m: i64[], %r: f32[4]) {
          %one = constant 1 : i64[]
          %q = Add(%k, %one) : i64[]
          %r = Gather(%x, %k) {axis = 0} : f32[4]
          %m = Identity(%n) : i64[]
          %left = Cast(%q) {to = f32} : f32[]
          %right = Cast(%m) {to = f32} : f32[]
          %on = Less(%left, %right) : bool[]
        }
    }
    // CHECK: %rows: f32[time, 4]
    // CHECK: Dims() {values = [time], shape = []} : i64[]
    // CHECK: Loop(%sizes, _, %zero) : i64[], f32[time, 4]
    // CHECK-NOT: Less
        """,
    )


WHILE = """masked (float[time, batch, 4] x) => (float[time, batch, 4] rows, float[batch, 4] last, int32 count) {
    sizes = Shape (x)
    size = Gather <axis = 0> (sizes, zero_index)
    limit = Cast <to = 6> (size)
    row_shape = Slice (sizes, one_index, three_index)
    start = ConstantOfShape (row_shape)
    begins = Less (zero, limit)
    count, last, weights_, limit_, rows = Loop (, begins, zero, start, weights, limit) <body = step (
        int64 i, bool goes, int32 k, float[b, 4] state, float[4, 4] w, int32 end
    ) => (bool on, int32 next, float[b, 4] new, float[4, 4] w_, int32 end_, float[b, 4] row) {
        next = Add (k, one)
        item = Gather <axis = 0> (x, k)
        product = MatMul (state, w)
        sum = Add (product, item)
        new = Tanh (sum)
        row = Identity (new)
        w_ = Identity (w)
        end_ = Identity (end)
        left = Cast <to = 1> (next)
        right = Cast <to = 1> (end)
        on = Less (left, right)
    }>
}"""


def weights() -> dict[str, Array]:
    return {
        "zero_index": np.array(0),
        "one_index": np.array([1]),
        "three_index": np.array([3]),
        "zero": np.array(0, np.int32),
        "weights": np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4),
    }


def test_a_recurrent_layer_as_a_while_loop() -> None:
    """A layer of Keras as tf2onnx writes it: rows of the result are stacked until a counter reaches the length."""
    random = np.random.default_rng(0)
    model = model_of_text(WHILE, one=np.array(1, np.int32), **weights())
    assert_agree(model, *({"x": random.random((t, b, 4), np.float32)} for t, b in ((1, 1), (7, 3), (20, 2))))


def test_a_condition_on_data_stays() -> None:
    model = model_of_text(
        """doubled (float[n] x) => (float[n] y) {
            y, count = Loop (, true, x, zero) <body = step (
                int64 i, bool goes, float[n] state, int64 k
            ) => (bool on, float[n] new, int64 next) {
                new = Add (state, state)
                next = Add (k, one)
                most = ReduceMax <keepdims = 0> (new)
                on = Less (most, limit)
            }>
        }""",
        true=np.array(True),
        zero=np.array(0),
        one=np.array(1),
        limit=np.array(100, np.float32),
    )
    assert_agree(model, *({"x": np.linspace(0.5, 1, n, dtype=np.float32)} for n in (1, 5)))
