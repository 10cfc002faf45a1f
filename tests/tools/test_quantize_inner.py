"""Static quantization inside If, Loop and Scan: calibrated on what gets there, integers in every graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnxc
import pytest
from onnx import GraphProto
from onnxc.compiler.nodes import graphs_in
from onnxc.tools.quantize.driver import quantised_draft
from onnxc.tools.quantize.settings import QuantizationError, Settings
from small_models import model_of_text

from .test_quantize import agrees, by_onnxruntime, decibels, normal

BRANCHES = """branches (float[1, 3, 6, 6] x, bool flag) => (float[1, 2, 6, 6] y) {
    c = Conv (x, w1)
    a = Relu (c)
    y = If (flag) <
        then_branch = yes () => (float[1, 2, 6, 6] t) { h = Conv (a, w2) b = Relu (h) t = Conv (b, w3) },
        else_branch = no () => (float[1, 2, 6, 6] e) { h = Conv (x, w4) s = Scale_norm (h) e = Neg (s) }
    >
}""".replace("Scale_norm (h)", "BatchNormalization (h, scale, shift, mean, variance)")
LOOP = """loop (float[2, 8] x, float[2, 8] extra, int64 count) => (float[2, 8] y, float[n, 2, 8] all) {
    y, all = Loop (count, , x) <
        body = step (int64 i, bool go, float[2, 8] before) => (bool on, float[2, 8] after, float[2, 8] shown) {
            on = Identity (go)
            p = MatMul (before, w1)
            q = MatMul (extra, w2)
            s = Add (p, q)
            after = Tanh (s)
            shown = MatMul (after, w3)
        }
    >
}"""
SCAN = """scan (float[2, 8] state, float[5, 2, 8] x) => (float[2, 8] last, float[5, 2, 8] all) {
    last, all = Scan <num_scan_inputs = 1, scan_input_directions = [1],
        body = step (float[2, 8] before, float[2, 8] one) => (float[2, 8] after, float[2, 8] shown) {
            p = MatMul (before, w1)
            q = MatMul (one, w2)
            s = Add (p, q)
            after = Tanh (s)
            shown = Identity (after)
        }
    > (state, x)
}"""


def branches() -> onnx.ModelProto:
    return model_of_text(
        BRANCHES, w1=normal(4, 3, 1, 1), w2=normal(6, 4, 1, 1), w3=normal(2, 6, 1, 1), w4=normal(2, 3, 1, 1),
        scale=normal(2), shift=normal(2), mean=normal(2), variance=np.abs(normal(2)) + 1,
    )  # fmt: skip


def steps(text: str) -> onnx.ModelProto:
    return model_of_text(
        text, **{f"w{n}": np.random.default_rng(n).standard_normal((8, 8), np.float32) / 3 for n in (1, 2, 3)}
    )


def operators(graph: GraphProto) -> list[str]:
    found = []
    for node in graph.node:
        found.append(node.op_type)
        for inner in graphs_in(node):
            found += operators(inner)
    return found


def test_both_branches_become_integers() -> None:
    """With what they capture, which is still read outside."""
    data = [{"x": normal(1, 3, 6, 6) * size, "flag": np.array(size > 1)} for size in (1, 2, 1, 2)]
    draft, summary = quantised_draft(branches(), data, Settings())
    assert summary.quantised == {"Conv": 4} and not summary.left
    assert "BatchNormalization" not in operators(draft.graph)
    for node in (node for part in draft.graphs() for node in part.graph.node if node.op_type == "Conv"):
        assert all("DequantizeLinear_Output" in name for name in node.input), node.name
    for flag in (True, False):
        agrees(draft.embedded(), branches(), {"x": normal(1, 3, 6, 6), "flag": np.array(flag)}, 25)


def test_a_branch_that_no_sample_takes_stays_in_float() -> None:
    data = {"x": normal(1, 3, 6, 6), "flag": np.array(True)}
    draft, summary = quantised_draft(branches(), data, Settings())
    assert summary.quantised == {"Conv": 3}
    assert [(operator, reason) for _, operator, reason in summary.left] == [("Conv", "no sample gets here")]
    floats = branches()
    inputs = {"x": normal(1, 3, 6, 6) * 9, "flag": np.array(False)}
    assert decibels(by_onnxruntime(floats, inputs)[0], by_onnxruntime(draft.embedded(), inputs)[0]) > 120


def test_where_no_sample_gets_at_all_there_is_nothing_to_quantise() -> None:
    floats = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        empty (float[2, 8] x, bool flag) => (float[2, 8] y) {
            y = If (flag) <
                then_branch = yes () => (float[2, 8] t) { t = MatMul (x, w) },
                else_branch = no () => (float[2, 8] e) { e = Neg (x) }
            >
        }""")
    floats.graph.initializer.append(onnx.numpy_helper.from_array(normal(8, 8), "w"))
    with pytest.raises(QuantizationError, match=r"nothing to quantise.*no sample gets here"):
        quantised_draft(floats, {"x": normal(2, 8), "flag": np.array(False)}, Settings())


@pytest.mark.parametrize("text", [LOOP, SCAN], ids=["loop", "scan"])
def test_bodies_become_integers(text: str) -> None:
    """Calibrated on every iteration, whose state follows from the one before."""
    inputs = {"x": normal(2, 8), "extra": normal(2, 8), "count": np.array(4)}
    if text is SCAN:
        inputs = {"state": normal(2, 8), "x": normal(5, 2, 8)}
    draft, summary = quantised_draft(steps(text), inputs, Settings())
    assert summary.quantised == {"MatMul": 3 if text is LOOP else 2} and not summary.left
    model = draft.embedded()
    onnx.checker.check_model(model)
    expected, theirs = by_onnxruntime(steps(text), inputs), by_onnxruntime(model, inputs)
    ours = onnxc.compile(model).run(inputs).values()
    for truth, other, own in zip(expected, theirs, ours, strict=True):
        assert decibels(truth, other) > 25 and decibels(other, own) > 40


def test_a_body_that_is_quantised_already_is_refused() -> None:
    inputs = {"x": normal(2, 8), "extra": normal(2, 8), "count": np.array(2)}
    model = onnxc.quantize(steps(LOOP), inputs)
    with pytest.raises(QuantizationError, match="quantised already"):
        onnxc.quantize(model, inputs)


def test_ranges_are_those_of_all_iterations() -> None:
    """A state that doubles each time is 16 times as large in the end."""
    text = """grow (float[2, 4] x) => (float[2, 4] y) {
        y = Loop (count, , x) <
            body = step (int64 i, bool go, float[2, 4] before) => (bool on, float[2, 4] after) {
                on = Identity (go)
                after = MatMul (before, w)
            }
        >
    }"""
    floats = model_of_text(text, w=2 * np.eye(4, dtype=np.float32), count=np.array(5))
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    draft, _ = quantised_draft(floats, {"x": x}, Settings(method="minmax", activations="i8", symmetric=True))
    (body,) = (graph for graph in draft.graphs() if graph.outer is not None)
    scale = next(onnx.numpy_helper.to_array(t) for t in body.graph.initializer if t.name == "before_scale")
    assert scale == pytest.approx(16 / 127, rel=1e-6)


def test_a_body_whose_operands_grow_is_calibrated() -> None:
    text = """grow (float[1, 4] x) => (float[n, 4] y) {
        y = Loop (count, , x) <
            body = step (int64 i, bool go, float[k, 4] before) => (bool on, float[m, 4] after) {
                on = Identity (go)
                p = MatMul (before, w)
                after = Concat <axis = 0> (before, p)
            }
        >
    }"""
    floats = model_of_text(text, w=normal(4, 4) / 2, count=np.array(3))
    draft, summary = quantised_draft(floats, {"x": normal(1, 4)}, Settings())
    assert summary.quantised == {"MatMul": 1}
    truth, found = (by_onnxruntime(model, {"x": normal(1, 4)})[0] for model in (floats, draft.embedded()))
    assert truth.shape == (8, 4) and decibels(truth, found) > 25


def test_graphs_inside_graphs() -> None:
    text = """nested (float[2, 8] x, bool flag) => (float[2, 8] y) {
        y = If (flag) <
            then_branch = yes () => (float[2, 8] t) {
                u = MatMul (x, w)
                t = Loop (count, , u) <
                    body = step (int64 i, bool go, float[2, 8] before) => (bool on, float[2, 8] after) {
                        on = Identity (go)
                        after = MatMul (before, w)
                    }
                >
            },
            else_branch = no () => (float[2, 8] e) { e = Neg (x) }
        >
    }"""
    floats = model_of_text(text, w=normal(8, 8) / 3, count=np.array(2))
    draft, summary = quantised_draft(floats, {"x": normal(2, 8), "flag": np.array(True)}, Settings())
    assert summary.quantised == {"MatMul": 2}
    for flag in (True, False):
        agrees(draft.embedded(), floats, {"x": normal(2, 8), "flag": np.array(flag)}, 25)
