"""Quantization without calibration data: ranges at run time, and weights alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnxc
import pytest
from onnxc.tools.quantize.driver import quantised_draft
from onnxc.tools.quantize.settings import QuantizationError, Settings
from small_models import model_of_text

from .test_quantize import agrees, by_onnxruntime, decibels, linear_model, named, normal


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"dynamic": True}, 28),
        ({"dynamic": True, "per_tensor": True}, 28),
        ({"weights_only": "int8"}, 30),
        ({"weights_only": "int4"}, 14),
        ({"weights_only": "int4", "symmetric": True, "block": 16}, 14),
    ],
    ids=str,
)
def test_forms_that_need_no_data(settings: dict[str, Any], least: float) -> None:
    floats, inputs = linear_model(), {"x": normal(2, 3, 64)}
    model = onnxc.quantize(floats, **settings)
    agrees(model, floats, inputs, least)
    counts = Counter(node.op_type for node in model.graph.node)
    if "dynamic" in settings:  # one rounding of x for both products that read it
        assert counts["DynamicQuantizeLinear"] == 2 and counts["MatMulInteger"] == 3
    else:
        assert counts["DequantizeLinear"] == 2


def test_recurrent_layers_at_run_time() -> None:
    size, hidden = 12, 16
    text = """rnn (float[9, 2, 12] x) => (float[9, 2, 2, 16] y, float[2, 2, 16] h) {
        y, h = LSTM <hidden_size = 16, direction = "bidirectional"> (x, w, r, b)
    }"""
    floats = model_of_text(
        text, w=normal(2, 4 * hidden, size) / 4, r=normal(2, 4 * hidden, hidden) / 4, b=normal(2, 8 * hidden) / 4
    )
    for settings in ({"dynamic": True}, {"dynamic": True, "per_tensor": True}):
        model = onnxc.quantize(floats, **settings)
        assert [(node.domain, node.op_type) for node in model.graph.node] == [("com.microsoft", "DynamicQuantizeLSTM")]
        inputs = {"x": normal(9, 2, 12)}
        expected, theirs = by_onnxruntime(floats, inputs), by_onnxruntime(model, inputs)
        ours = onnxc.compile(model).run(inputs).values()
        assert all(decibels(a, b) > 30 for a, b in zip(expected, theirs, strict=True))
        assert all(decibels(a, b) > 30 for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("settings", [{}, {"per_tensor": True}], ids=str)
def test_convolutions_at_run_time(settings: dict[str, Any]) -> None:
    """With strides, groups and biases; two read one rounding of x."""
    text = """convs (float[2, 4, 9, 9] x) => (float[2, 6, 4, 4] y, float[n, m, k, l] z, float[a, b, c, d] t) {
        y = Conv <strides = [2, 2]> (x, w1, b1)
        z = Conv <group = 4, pads = [1, 1, 1, 1], dilations = [2, 2]> (x, w2)
        r = Relu (x)
        t = Conv (r, w3, b1)
    }"""
    sizes = np.arange(1, 9, dtype=np.float32).reshape(8, 1, 1, 1)
    weights = {"w1": normal(6, 4, 3, 3), "w2": normal(8, 1, 3, 3) * sizes, "w3": normal(6, 4, 5, 1)}
    floats = model_of_text(text, b1=normal(6), **weights)
    model = onnxc.quantize(floats, dynamic=True, **settings)
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["ConvInteger"] == 3 and counts["DynamicQuantizeLinear"] == 2 and not counts["Conv"]
    agrees(model, floats, {"x": normal(2, 4, 9, 9)}, 28)


def test_signals_are_not_rounded_unseen() -> None:
    text = """wave (float[1, 1, 400] x) => (float[1, 4] y) {
        a = Conv <strides = [2]> (x, w1)
        b = ReduceMax (a, axis)
        c = Flatten (b)
        y = MatMul (c, w2)
    }"""
    floats = model_of_text(text, axis=np.array([2]), w1=normal(8, 1, 9), w2=normal(8, 4))
    _, summary = quantised_draft(floats, None, Settings(dynamic=True))
    assert summary.quantised == {"MatMul": 1} and "signals" in summary.left[0][2]


@pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_weights_of_recurrent_layers(operator: str, gates: int) -> None:
    """A scale for each row of a gate, of both directions; other quantizations say what to do with them."""
    text = f"""rnn (float[9, 2, 12] x) => (float[9, 2, 2, 16] y) {{
        y = {operator} <hidden_size = 16, direction = "bidirectional"> (x, w, r, b)
    }}"""
    weights = {"w": normal(2, gates * 16, 12) / 4, "r": normal(2, gates * 16, 16) / 4, "b": normal(2, gates * 32) / 4}
    floats, inputs = model_of_text(text, **weights), {"x": normal(9, 2, 12)}
    model = onnxc.quantize(floats, weights_only="int8")
    assert len(named(model, "DequantizeLinear")) == 2 and model.ByteSize() < 0.5 * floats.ByteSize()
    agrees(model, floats, inputs, 30)
    with pytest.raises(QuantizationError, match="--dynamic" if operator == "LSTM" else "--weights-only int8"):
        onnxc.quantize(floats, inputs)


def test_weights_of_transposed_convolutions() -> None:
    text = """up (float[1, 4, 5, 5] x) => (float[1, 6, 10, 10] y) {
        y = ConvTranspose <strides = [2, 2], group = 2> (x, w)
    }"""
    floats, inputs = model_of_text(text, w=normal(4, 3, 2, 2)), {"x": normal(1, 4, 5, 5)}
    agrees(onnxc.quantize(floats, weights_only="int8"), floats, inputs, 30)


@pytest.mark.parametrize("settings", [{"dynamic": True}, {"weights_only": "int8"}, {"weights_only": "int4"}], ids=str)
def test_branches_are_quantised_too(settings: dict[str, Any]) -> None:
    text = """branches (float[2, 32] x, bool flag) => (float[2, 4] y) {
        y = If (flag) <
            then_branch = yes () => (float[2, 4] t) { t = MatMul (x, w) },
            else_branch = no () => (float[2, 4] e) { u = MatMul (x, w) e = Neg (u) }
        >
    }"""
    floats = model_of_text(text, w=normal(32, 4))
    draft, summary = quantised_draft(floats, None, Settings(**settings))
    assert summary.quantised == {"MatMul": 2}
    for flag in (True, False):
        agrees(draft.embedded(), floats, {"x": normal(2, 32), "flag": np.array(flag)}, 14)
    assert not draft.proto.graph.initializer


@pytest.mark.parametrize("how", [{"dynamic": True}, {"weights_only": "int8"}, {"weights_only": "int4"}], ids=str)
@pytest.mark.parametrize("kind", [np.float32, np.float16], ids=["f32", "f16"])
def test_tables_have_a_scale_for_each_row(how: dict[str, Any], kind: Any) -> None:
    """Of which only the rows that are looked up become floats, also where a branch looks them up."""
    name = "float" if kind is np.float32 else "float16"
    text = f"""words (int64[2, 7] x, bool flag) => ({name}[2, 7, 64] y) {{
        y = If (flag) <
            then_branch = yes () => ({name}[2, 7, 64] t) {{ t = Gather (table, x) }},
            else_branch = no () => ({name}[2, 7, 64] e) {{ g = Gather (table, x) e = Neg (g) }}
        >
    }}"""
    table = normal(1024, 64) * np.exp(np.arange(1024) / 200)[:, None]
    floats = model_of_text(text, table=table.astype(kind))
    draft, summary = quantised_draft(floats, None, Settings(**how))
    assert summary.quantised == {"Gather": 2}
    x = np.array([[0, 5, -1, 1023, 7, 7, 500], [1, 2, 3, -1024, 400, 300, 200]])
    for flag in (True, False):
        inputs = {"x": x, "flag": np.array(flag)}
        (truth,), (other,) = by_onnxruntime(floats, inputs), by_onnxruntime(draft.embedded(), inputs)
        own = onnxc.compile(draft.embedded()).run(inputs)["y"]
        assert own.dtype == truth.dtype
        assert all(decibels(a.astype(float), b.astype(float)) > 38 for a, b in zip(truth[0], own[0], strict=True))
        assert decibels(other.astype(float), own.astype(float)) > 60


def test_lstm_at_run_time_beside_what_is_calibrated() -> None:
    """Also inside a branch."""
    text = """speech (float[1, 3, 40] x, bool flag) => (float[38, 1, 1, 16] y) {
        c = Conv (x, w1)
        r = Relu (c)
        t = Transpose <perm = [2, 0, 1]> (r)
        y = If (flag) <
            then_branch = yes () => (float[38, 1, 1, 16] a) { a = LSTM <hidden_size = 16> (t, w, rec) },
            else_branch = no () => (float[38, 1, 1, 16] b) { u = MatMul (t, m) b = LSTM <hidden_size = 16> (u, w, rec) }
        >
    }"""
    floats = model_of_text(
        text, w1=normal(8, 3, 3), w=normal(1, 64, 8) / 4, rec=normal(1, 64, 16) / 4, m=normal(8, 8) / 3
    )
    data = [{"x": normal(1, 3, 40), "flag": np.array(flag)} for flag in (True, False)]
    draft, summary = quantised_draft(floats, data, Settings(dynamic=True))
    assert summary.quantised == {"Conv": 1, "MatMul": 1, "LSTM": 2} and not summary.left
    model = draft.embedded()
    assert not named(model, "ConvInteger") and named(model, "QuantizeLinear")
    for inputs in data:
        (truth,), (other,) = by_onnxruntime(floats, inputs), by_onnxruntime(model, inputs)
        assert decibels(truth, other) > 25 and decibels(other, onnxc.compile(model).run(inputs)["y"]) > 35
    _, summary = quantised_draft(floats, data, Settings())
    assert [reason for _, operator, reason in summary.left if operator == "LSTM"] == [
        "its ranges are only known at run time: --dynamic"
    ] * 2
