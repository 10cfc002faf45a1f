"""Sizes that the run itself tells: limits, and results of such sizes inside branches and loops."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import GraphProto, NodeProto, TensorProto, helper
from onnxc.ir.dims import Dim, ceildiv, dim_max, dim_min, evaluate, symbol, symbols
from onnxc.passes.segments import at_most
from single_node import Array, assert_equal, compiled, model_of

A, B = symbol("a", 0, 5), symbol("b", 0, symbol("n"))


@given(st.integers(0, 5), st.integers(0, 9), st.data())
def test_a_limit_is_reached_and_never_exceeded(a: int, n: int, data: st.DataObject) -> None:
    b = data.draw(st.integers(0, n))
    dims: list[Dim] = [7, A, A * B, 2 * B + symbol("n"), symbol("n") * 3 - A, ceildiv(A + B, 4), dim_max(A, B, 3)]
    for dim in [*dims, dim_min(A, symbol("n")) + 1]:
        limit = at_most(dim, {"a": 5, "b": symbol("n")})
        assert limit is not None and not {"a", "b"} & {x.name for x in symbols(limit)}
        assert evaluate(dim, {"a": a, "b": b, "n": n}) <= evaluate(limit, {"n": n})


def test_what_has_no_limit() -> None:
    for dim in (A, A * B, dim_max(A, 3), ceildiv(A, 2)):
        assert at_most(dim, {"a": None, "b": 4}) is None
    assert at_most(dim_min(A, 3), {"a": None}) == 3


def value(name: str, dtype: int = TensorProto.FLOAT, shape: list[int] | None = None) -> object:
    return helper.make_tensor_value_info(name, dtype, shape)


def branches(then: list[NodeProto], otherwise: list[NodeProto], dtype: int) -> NodeProto:
    graphs: list[GraphProto] = [
        helper.make_graph(nodes, nodes[-1].output[0], [], [value(nodes[-1].output[0], dtype)])
        for nodes in (then, otherwise)
    ]
    return helper.make_node("If", ["c"], ["y"], then_branch=graphs[0], else_branch=graphs[1])


def check(nodes: list[NodeProto], inputs: dict[str, Array], constants: dict[str, Array], outputs: list[str]) -> None:
    for symbolic in (False, True):
        model = model_of(nodes, inputs, constants, outputs, symbolic, opset=21)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        assert_equal(compiled(model, inputs), session.run(None, inputs))


X = np.array([[1, 0, 2], [0, 3, 0]], np.float32)


@pytest.mark.parametrize("taken", [True, False])
def test_elements_found_inside_a_branch(taken: bool) -> None:
    then = [
        helper.make_node("NonZero", ["x"], ["where"]),
        helper.make_node("Transpose", ["where"], ["pairs"]),
        helper.make_node("GatherND", ["x", "pairs"], ["found"]),
        helper.make_node("ReduceSum", ["found"], ["sum"], keepdims=0),
    ]
    otherwise = [helper.make_node("ReduceMax", ["x"], ["greatest"], keepdims=0)]
    node = branches(then, otherwise, TensorProto.FLOAT)
    check([node], {"x": X, "c": np.array(taken)}, {}, ["y"])


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_whose_result_has_such_a_size(taken: bool) -> None:
    then = [helper.make_node("NonZero", ["x"], ["where"])]
    otherwise = [helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT64)]
    node = branches(then, otherwise, TensorProto.INT64)
    after = helper.make_node("ReduceSum", ["y", "axes"], ["total"], keepdims=0)
    check([node, after], {"x": X, "c": np.array(taken)}, {"axes": np.array([1])}, ["y", "total"])


def test_elements_found_in_each_iteration() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Sub", ["before", "one"], ["less"]),
            helper.make_node("Relu", ["less"], ["after"]),
            helper.make_node("NonZero", ["after"], ["where"]),
            helper.make_node("ReduceSum", ["where"], ["total"], keepdims=0),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("before", shape=[2, 3])],
        [value("go_on", TensorProto.BOOL, []), value("after", shape=[2, 3]), value("total", TensorProto.INT64, [])],
    )
    node = helper.make_node("Loop", ["times", "", "x"], ["last", "totals"], body=body)
    constants = {"times": np.array(3), "one": np.array(1, np.float32)}
    model = model_of([node], {"x": X}, constants, ["last", "totals"], opset=21)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert_equal(compiled(model, {"x": X}), session.run(None, {"x": X}))
