"""Convolutions over three spatial axes as ones over two."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxc
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnxc.passes.fold_depth import FoldDepth
from pass_checks import filecheck, parsed, transformed
from single_node import model_of

RANDOM = np.random.default_rng(0)
PHASES = (Phase.explicit, Phase.generate)


def graph_of(weights: tuple[int, ...], attributes: str) -> Any:
    text = f"""
    graph @g(%x: f32[n, 6, d, 9, 8]) -> (%y: f32[n, {weights[0]}, d, 9, 8]) {{
      %w = Constant() {{value=@w}} : f32[{", ".join(map(str, weights))}]
      %y = Conv(%x, %w) {{{attributes}}} : f32[n, {weights[0]}, d, 9, 8]
    }}
    """
    return parsed(text, {"w": RANDOM.standard_normal(weights).astype(np.float32)})


def test_taps_become_channels() -> None:
    after = transformed("fold-depth,cleanup", graph_of((5, 6, 3, 3, 3), "pads=[1, 1, 1, 1, 1, 1]"))
    filecheck(
        """
        // CHECK: %y.slices = Transpose(%x) {{.*}} : f32[n, d, 6, 9, 8]
        // CHECK: %y.padded = Pad(%y.slices, _, _) {{.*}} : f32[n, d+2, 6, 9, 8]
        // CHECK: %y.taps = Concat(%y.tap, %y.tap.1, %y.tap.2) {axis = 2} : f32[n, d, 18, 9, 8]
        // CHECK: %y.weights = constant {{.*}} : f32[5, 18, 3, 3]
        // CHECK: %y.planes = Conv(%y.image, %y.weights) {kernel_shape = [3, 3]
        // CHECK: %y = Transpose(%y.apart) {{.*}} : f32[n, 5, d, 9, 8]
        """,
        str(after),
    )


@pytest.mark.parametrize(
    ("weights", "attributes"),
    [((6, 3, 3, 3, 3), "group=2, pads=[1, 1, 1, 1, 1, 1]"), ((8, 6, 1, 1, 1), "")],  # few filters; a matrix product
)
def test_what_stays(weights: tuple[int, ...], attributes: str) -> None:
    graph = graph_of(weights, attributes)
    assert FoldDepth().run(graph) is graph


@settings(max_examples=8, deadline=None, phases=PHASES)
@given(data=st.data())
def test_the_same_as_the_definition(data: st.DataObject) -> None:
    """Any kernel, stride, dilation, padding, group and zero point; sizes known or not; reals and bytes."""
    draw = data.draw
    taps = [draw(st.integers(1, 3), "taps") for _ in range(3)]
    spread = [draw(st.integers(1, 2), "dilation") for _ in range(3)]
    alone, group = draw(st.booleans(), "depthwise"), draw(st.sampled_from([1, 2]), "group")
    channels, filters = draw(st.integers(1, 5), "channels"), 4 * draw(st.integers(1, 3), "filters")
    channels, filters, group = (1, 1, 5) if alone else (channels, filters, group)
    extents = [draw(st.integers((t - 1) * d + 1, 8), "extent") for t, d in zip(taps, spread, strict=True)]
    attributes: dict[str, Any] = {"strides": [draw(st.integers(1, 2), "stride") for _ in range(3)], "group": group}
    attributes |= {"dilations": spread, "pads": [draw(st.integers(0, 2), "pad") for _ in range(6)]}
    whole = draw(st.booleans(), "bytes")
    shape, weight_shape = (2, group * channels, *extents), (group * filters, channels, *taps)
    if whole:
        x = RANDOM.integers(0, 256, shape).astype(np.uint8)
        constants = {"w": RANDOM.integers(-128, 128, weight_shape).astype(np.int8), "z": np.array(7, np.uint8)}
        node = helper.make_node("ConvInteger", ["x", "w", "z"], ["y"], **attributes)
    else:
        x = RANDOM.standard_normal(shape).astype(np.float32)
        constants = {"w": RANDOM.standard_normal(weight_shape).astype(np.float32), "b": np.ones(filters * group)}
        constants["b"] = constants["b"].astype(np.float32)
        node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)
    model = model_of([node], {"x": x}, constants, ["y"])
    if not draw(st.booleans(), "sizes known"):
        for axis, name in ((0, "N"), (2, "D"), (4, "W")):
            model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    (wanted,) = ReferenceEvaluator(model_of([node], {"x": x}, constants, ["y"])).run(None, {"x": x})
    found = onnxc.compile(model)(x)
    if whole:
        np.testing.assert_array_equal(found, wanted)
    else:
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
