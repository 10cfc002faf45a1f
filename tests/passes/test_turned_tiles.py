"""Transposing loops by tiles that are turned in registers."""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_kernel import RUNNABLE
from onnx import helper
from onnxc.ir import loops as k
from onnxc.ir.dims import Dim
from onnxc.ir.dtypes import F32, U8, DType
from onnxc.ir.loops import For, Kernel, Store
from onnxc.ir.scalars import Buffer, load
from onnxc.passes.turned_tiles import turn_tiles
from pass_checks import filecheck
from single_node import model_of

TYPES = ("uint8", "int8", "int16", "float16", "float32", "int64", "float64", "bool")


def kernel(dtype: DType, outer: int, inner: int, stride: int = 0) -> Kernel:
    x, y = Buffer("x", dtype, outer * inner), Buffer("y", dtype, outer * inner)
    a, b = k.index_symbol("a", outer), k.index_symbol("b", inner)
    at: Dim = a + (stride or outer) * b
    store = Store(y, a * inner + b, load(x, at))
    return Kernel("turn", (x, y), ("y",), (), (For("a", outer, (For("b", inner, (store,), "vector"),), "parallel"),))


def test_a_tile_is_read_in_rows_and_turned() -> None:
    filecheck(
        """
        // CHECK: parallel for a_tile < 4:
        // CHECK-NEXT: for b_tile < 2:
        // CHECK: stack b_turned0: u8[1024]
        // CHECK: = x[{{.*}} : 16]
        // CHECK: b_turned0[{{.*}} : 16] =
        // CHECK: for a_row < 16:
        // CHECK-NEXT: vector for b_column < 64:
        // CHECK-NEXT: y[{{.*}}] = b_turned0[
        // CHECK: parallel for a < 64:
        // CHECK-NEXT: vector for b < 5:
        // CHECK: parallel for a < 3:
        // CHECK-NEXT: vector for b < 133:
        """,
        str(turn_tiles(kernel(U8, 67, 133), 512)),
    )


def test_what_is_read_in_order_or_is_small_stays() -> None:
    for plain in (kernel(F32, 64, 64, stride=1), kernel(F32, 3, 64), kernel(F32, 64, 7)):
        assert turn_tiles(plain, 512) == plain


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(TYPES),
    st.integers(1, 90),
    st.integers(1, 150),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_transposes(name: str, rows: int, columns: int, batch: int, shared: bool, seed: int) -> None:
    """Of any sizes and types, beside operands that are not turned."""
    random = np.random.default_rng(seed)
    x = random.integers(0, 2 if name == "bool" else 100, (batch, rows, columns)).astype(name)
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1])]
    inputs, wanted = {"x": x}, x.transpose(0, 2, 1)
    if shared and name != "bool":
        inputs["y"] = random.integers(0, 20, (rows,)).astype(name)
        nodes.append(helper.make_node("Add", ["t", "y"], ["u"]))
        wanted = wanted + inputs["y"]
    (found,) = onnxc.compile(model_of(nodes, inputs, {}, [nodes[-1].output[0]])).run(inputs).values()
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("target", RUNNABLE, ids=str)
def test_on_every_target(target: onnxc.Target) -> None:
    random = np.random.default_rng(0)
    inputs = {"x": random.standard_normal((1, 37, 9, 11)).astype(np.float32), "q": random.integers(0, 99, (70, 80))}
    inputs["q"] = inputs["q"].astype(np.uint8)
    nodes = [
        helper.make_node("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1]),
        helper.make_node("Transpose", ["q"], ["r"], perm=[1, 0]),
    ]
    found = onnxc.compile(model_of(nodes, inputs, {}, ["y", "r"]), target=target).run(inputs)
    np.testing.assert_array_equal(found["y"], inputs["x"].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(found["r"], inputs["q"].T)


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(("uint8", "float32")), st.lists(st.integers(1, 90), min_size=3, max_size=3), st.booleans())
def test_batches_and_sizes_that_only_the_run_tells(name: str, shape: list[int], known: bool) -> None:
    x = np.random.default_rng(0).integers(0, 100, (2, *shape[:2], 1 + shape[2])).astype(name)
    node = helper.make_node("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1])
    model = onnxc.compile(model_of([node], {"x": x}, {}, ["y"], symbolic=not known))
    np.testing.assert_array_equal(model(x), x.transpose(0, 2, 3, 1))
