"""Transposed convolutions as convolutions: the same floats, then integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnxc.tools.quantize.driver import quantised_draft
from onnxc.tools.quantize.folding import fold_batch_norms, fold_biases
from onnxc.tools.quantize.model import Draft
from onnxc.tools.quantize.settings import Settings
from onnxc.tools.quantize.transposed import split_transposed
from small_models import model_of_text

from .test_quantize import agrees, by_onnxruntime, decibels, named, normal


def transposed(x: Any, w: Any, bias: Any, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], "up", **attributes)
    inputs = [helper.make_tensor_value_info("x", 1, ["n", x.shape[1], "height", "width"])]
    constants = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(bias, "b")]
    graph = helper.make_graph([node], "up", inputs, [helper.make_tensor_value_info("y", 1, [None] * 4)], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_size_stride_and_padding(data: st.DataObject) -> None:
    draw = data.draw
    stride, group = draw(st.integers(1, 4), "stride"), draw(st.sampled_from([1, 1, 2]), "group")
    kernel = [draw(st.integers(1, 6), "kernel") for _ in "yx"]
    spread = [draw(st.sampled_from([1, 1, 2]), "dilation") for _ in "yx"]
    more = [draw(st.integers(0, stride - 1), "output_padding") for _ in "yx"]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
    pads = [draw(st.integers(0, min(n, 5) // 2), "pad") for n in (*reach, *reach)]
    x = normal(2, 2 * group, draw(st.integers(2, 5), "height"), 4)
    w = np.random.default_rng(3).standard_normal((2 * group, 3, *kernel), np.float32)
    model = transposed(
        x, w, normal(3 * group), strides=[stride] * 2, group=group, dilations=spread, pads=pads, output_padding=more
    )
    draft = Draft(model, 13)
    (expected,) = by_onnxruntime(model, {"x": x})
    if expected.size == 0:
        return
    taps = np.prod([-(-n // stride) for n in reach])
    assert split_transposed(draft, Settings()) == int(taps * stride**2 <= 2 * np.prod(kernel))
    onnx.checker.check_model(draft.proto)
    np.testing.assert_allclose(by_onnxruntime(draft.proto, {"x": x})[0], expected, rtol=1e-4, atol=1e-4)


def test_what_is_added_and_normalised_behind_is_folded() -> None:
    text = """decoder (float[1, 4, 5, 5] x) => (float[1, 6, 10, 10] y) {
        a = ConvTranspose <strides = [2, 2], group = 2> (x, w)
        b = Add (a, bias)
        y = BatchNormalization (b, scale, shift, mean, variance)
    }"""
    model = model_of_text(
        text, w=normal(4, 3, 2, 2), bias=normal(1, 6, 1, 1), scale=normal(6) + 2, shift=normal(6), mean=normal(6),
        variance=np.abs(normal(6)) + 1,
    )  # fmt: skip
    draft, x = Draft(model, 13), {"x": normal(1, 4, 5, 5)}
    fold_biases(draft)
    assert fold_batch_norms(draft) == 1
    assert [node.op_type for node in draft.graph.node] == ["ConvTranspose"]
    np.testing.assert_allclose(by_onnxruntime(draft.proto, x)[0], by_onnxruntime(model, x)[0], rtol=1e-4, atol=1e-5)


DECODER = """decoder (float[1, 8, 6, 6] x) => (float[1, 3, 24, 24] y) {
    a = Conv (x, w0)
    b = ConvTranspose <strides = [2, 2]> (a, w1)
    c = Relu (b)
    d = ConvTranspose <strides = [2, 2], kernel_shape = [4, 4], pads = [1, 1, 1, 1]> (c, w2)
    e = Relu (d)
    y = Conv (e, w3)
}"""
WEIGHTS = {"w0": normal(8, 8, 1, 1), "w1": normal(8, 5, 2, 2), "w2": normal(5, 4, 4, 4), "w3": normal(3, 4, 1, 1)}


def test_a_decoder_becomes_integers() -> None:
    """From its first convolution to its last: activations stand before what puts results in place."""
    floats, inputs = model_of_text(DECODER, **WEIGHTS), {"x": normal(1, 8, 6, 6)}
    draft, summary = quantised_draft(floats, inputs, Settings())
    assert summary.quantised == {"Conv": 4} and not summary.left
    model = draft.embedded()
    assert not named(model, "ConvTranspose") and not named(model, "Relu")
    for node in named(model, "DepthToSpace") + named(model, "Slice"):
        (reader,) = (other for other in model.graph.node if node.output[0] in other.input)
        assert reader.op_type == "QuantizeLinear" or (node.op_type, reader.op_type) == ("DepthToSpace", "Slice")
    agrees(model, floats, inputs, 25)


@pytest.mark.parametrize("pattern", ["ConvTranspose", "ConvTranspose_1"])
def test_those_to_be_kept_stay(pattern: str) -> None:
    floats, inputs = model_of_text(DECODER, **WEIGHTS), {"x": normal(1, 8, 6, 6)}
    model = onnxc.quantize(floats, inputs, keep=[pattern])
    assert len(named(model, "ConvTranspose")) == (2 if pattern == "ConvTranspose" else 1)
    assert decibels(by_onnxruntime(floats, inputs)[0], by_onnxruntime(model, inputs)[0]) > 25
