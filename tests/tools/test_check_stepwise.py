"""Nodes run one by one (`onnxc check --baseline`): what they give, and that those of a kind share their code."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnxc.compiler.options import Options
from onnxc.ir.errors import UnsupportedError
from onnxc.tools.check.measured import Reference
from onnxc.tools.check.stepwise import Step, Stepwise
from onnxc.tools.check.subject import subject_of
from onnxc.tools.check.windows import factors
from small_models import model_of_text

Array = np.ndarray[Any, Any]
LAYERS = """deep (float[n, 6] x) => (float[n, 6] y) {
    h0 = MatMul (x, w0)
    b0 = Add (h0, x)
    r0 = Relu (b0)
    h1 = MatMul (r0, w1)
    b1 = Add (h1, r0)
    y = Relu (b1)
}"""


def stepwise(model: onnx.ModelProto) -> tuple[Stepwise, list[Step]]:
    subject = subject_of(model)
    return Stepwise(subject, Options()), [Step(node) for node in subject.nodes]


def values(steps: Stepwise, nodes: list[Step], inputs: dict[str, Array]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    steps.follow(nodes, inputs, found.__setitem__)
    return found


def test_nodes_of_a_kind_share_their_code() -> None:
    random = np.random.default_rng(0)
    model = model_of_text(LAYERS, **{f"w{i}": random.standard_normal((6, 6), np.float32) for i in range(2)})
    steps, nodes = stepwise(model)
    for rows in (3, 5, 9):  # of other sizes too, from the second size on
        x = random.standard_normal((rows, 6), np.float32)
        found = values(steps, nodes, {"x": x})
        np.testing.assert_allclose(found["y"], ReferenceEvaluator(model).run(None, {"x": x})[0], rtol=1e-5, atol=1e-5)
    assert len(steps.made) == 3
    assert [len(codes) for codes in steps.made.values()] == [2, 2, 2]


def test_control_flow() -> None:
    text = """loop (float[3] x, int64[1] n) => (float[3] y) {
        big = ReduceMax <keepdims = 0> (x)
        go = Greater (big, zero)
        y = If (go) <then_branch = t () => (float[3] p) { p = Add (x, x) },
                     else_branch = e () => (float[3] q) { q = Neg (x) }>
    }"""
    model = model_of_text(text, zero=np.array(0, np.float32))
    steps, nodes = stepwise(model)
    for x in (np.array([1, -2, 3], np.float32), np.array([-1, -2, -3], np.float32)):
        found = values(steps, nodes, {"x": x, "n": np.array([1])})
        np.testing.assert_array_equal(found["y"], ReferenceEvaluator(model).run(None, {"x": x, "n": np.array([1])})[0])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_convolutions_as_products(data: st.DataObject) -> None:
    def drawn(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    rank, group = drawn(1, 3), drawn(1, 3)
    kernel, dilations = [drawn(1, 3) for _ in range(rank)], [drawn(1, 2) for _ in range(rank)]
    sizes = [(k - 1) * d + 1 + drawn(0, 4) for k, d in zip(kernel, dilations, strict=True)]
    random = np.random.default_rng(drawn(0, 99))
    x = random.integers(-4, 5, (drawn(1, 2), group * drawn(1, 3), *sizes)).astype(np.float32)
    w = random.integers(-4, 5, (group * drawn(1, 2), x.shape[1] // group, *kernel)).astype(np.float32)
    pads = data.draw(st.sampled_from(("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")))
    more: dict[str, Any] = {"pads": [drawn(0, 2) for _ in range(2 * rank)]} if pads == "NOTSET" else {}
    strides = [drawn(1, 3) for _ in range(rank)]
    if pads.startswith("SAME"):
        dilations = [1] * rank  # of which the reference makes other sizes
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], group=group, strides=strides, dilations=dilations, auto_pad=pads, **more
    )
    found = factors(node, x, w)
    assert found is not None
    import onnxruntime

    ends = [helper.make_tensor_value_info(n, 1, a.shape) for n, a in (("x", x), ("w", w))]
    graph = helper.make_graph([node], "g", ends, [helper.make_tensor_value_info("y", 1, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x, "w": w})[0]
    np.testing.assert_array_equal(np.matmul(*found[:2]).reshape(found[2]), expected)


def test_what_cannot_be_run_is_told_with_its_shapes() -> None:
    model = model_of_text("narrow (float[n] x) => (float[m] y) { y = Conv (x4, w) }", w=np.ones((1, 1, 5), np.float32))
    model.graph.node[0].input[0] = "x"
    steps, nodes = stepwise(model)
    with pytest.raises(UnsupportedError, match=r"\(Conv\) cannot be run on operands of shapes .*: .*see --input"):
        values(steps, nodes, {"x": np.ones((1, 1, 3), np.float64)})


def test_axes_that_were_alike_need_not_stay_so() -> None:
    """Code for open sizes takes two axes for one that were alike for both sizes seen before."""
    steps, nodes = stepwise(model_of_text("plain (float[n, m] x) => (float[n, m] y) { y = Neg (x) }"))
    for shape in ((4, 4), (6, 6), (6, 9), (5, 7), (8, 8)):
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        np.testing.assert_array_equal(values(steps, nodes, {"x": x})["y"], -x)
    ((first, square, both),) = steps.made.values()
    assert first.fits(((4, 4),)) and square.fits(((8, 8),)) and not square.fits(((5, 7),)) and both.fits(((5, 7),))


def test_numbers_without_axes() -> None:
    found = Reference.of(np.array(2.0, np.float32), None)
    assert found.signal == 4 and found.noise(np.array(1.5, np.float32)) == 0.25
