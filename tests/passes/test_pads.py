"""Pads go into windows where these then see the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from onnxc.ir.graph import Graph
from pass_checks import agree, check, parsed, transformed

WEIGHTS = {"w": np.random.default_rng(4).normal(size=(4, 2, 3, 3)).astype(np.float32)}


def run(window: str, pad: str, before: str = "Identity(%x)", shape: str = "2, 2, 7, 8") -> Graph:
    """The graph before -> pad -> window, after the pass; checked to compute the same."""
    lines = f"""
    graph @g(%x: f32[1, 2, 5, 5]) -> (%y: f32[TYPE]) {{
      %w = constant @"w" : f32[4, 2, 3, 3]
      %low = constant -inf : f32[]
      %one = constant 1.0 : f32[]
      %zero = constant 0.0 : f32[]
      %six = constant 6.0 : f32[]
      %a = {before} : f32[1, 2, 5, 5]
      %p = {pad} : f32[1, 2, 7, 8]
      %y = {window} : f32[TYPE]
    }}
    """
    graph = parsed(lines.replace("TYPE", shape), WEIGHTS)
    after = transformed("pads", graph)
    agree(graph, after)
    return after


PAD = "Pad(%a{value}) {{pads = [0, 0, 1, 1, 0, 0, 1, 2]{more}}}"
ZEROS = PAD.format(value="", more="")
LOWEST = PAD.format(value=", _, %low", more="")
CONV, CONV_SHAPE = "Conv(%p, %w) {pads = [1, 0, 0, 0]}", "1, 4, 6, 6"
MAX, MAX_SHAPE = "MaxPool(%p) {kernel_shape = [3, 3]}", "1, 2, 5, 6"
MEAN = "AveragePool(%p) {kernel_shape = [3, 3]}"


@pytest.mark.parametrize(
    ("window", "pad", "before", "shape", "folds"),
    [
        (CONV, ZEROS, "Exp(%x)", CONV_SHAPE, True),
        (CONV, "Pad(%a) {pads = [1, 1, 1, 2], axes = [2, -1]}", "Exp(%x)", CONV_SHAPE, True),
        (CONV, PAD.format(value=", _, %one", more=""), "Exp(%x)", CONV_SHAPE, False),
        (CONV, PAD.format(value="", more=', mode = "reflect"'), "Exp(%x)", CONV_SHAPE, False),
        (MAX, LOWEST, "Neg(%x)", MAX_SHAPE, True),
        (MAX, ZEROS, "Neg(%x)", MAX_SHAPE, False),
        (MAX, ZEROS, "Relu(%x)", MAX_SHAPE, True),
        (MAX, ZEROS, "Clip(%x, %zero, %six)", MAX_SHAPE, True),
        (MAX, ZEROS, "Clip(%x, _, %six)", MAX_SHAPE, False),
        (MEAN, ZEROS, "Neg(%x)", MAX_SHAPE, True),
        (MEAN, LOWEST, "Neg(%x)", MAX_SHAPE, False),
        ("MaxPool(%p) {kernel_shape = [2, 2]}", LOWEST, "Neg(%x)", "1, 2, 6, 7", False),
        ("AveragePool(%p) {kernel_shape = [3, 3], pads = [1, 1, 1, 1]}", ZEROS, "Neg(%x)", "1, 2, 7, 8", False),
    ],
)  # fmt: skip
def test_what_folds(window: str, pad: str, before: str, shape: str, folds: bool) -> None:
    after = run(window, pad, before, shape)
    assert any(node.op == "Pad" for node in after.nodes) != folds


def test_pads_add_up() -> None:
    after = run(CONV, ZEROS, "Exp(%x)", CONV_SHAPE)
    (conv,) = (node for node in after.nodes if node.op == "Conv")
    assert conv.attributes["pads"] == (2, 1, 1, 2)


def test_channels_last() -> None:
    text = """
    graph @g(%x: f32[1, 5, 5, 2]) -> (%y: f32[1, 5, 6, 4]) {
      %w = constant @"w" : f32[4, 2, 3, 3]
      %p = Pad(%x) {pads = [0, 1, 1, 0, 0, 1, 2, 0]} : f32[1, 7, 8, 2]
      %y = Conv(%p, %w) {layout = "channels_last"} : f32[1, 5, 6, 4]
    }
    """
    before = parsed(text, WEIGHTS)
    after = transformed("pads", before)
    agree(before, after)
    assert [node.op for node in after.nodes] == ["Constant", "Conv"]
    assert after.nodes[1].attributes["pads"] == (1, 1, 1, 2)


@pytest.mark.parametrize(("point", "folded"), [(100, True), (99, False)])
def test_zero_points_around_bytes(point: int, folded: bool) -> None:
    text = f"""
    graph @g(%x: u8[1, 2, 4, 4]) -> (%y: i32[1, 3, 4, 4]) {{
      %z = constant 100 : u8[]
      %fill = constant {point} : u8[]
      %w = constant @"w" : i8[3, 2, 3, 3]
      %p = Pad(%x, _, %fill) {{pads = [0, 0, 1, 1, 0, 0, 1, 1]}} : u8[1, 2, 6, 6]
      %y = ConvInteger(%p, %w, %z) : i32[1, 3, 4, 4]
    }}
    """
    checks = "// CHECK-NOT: Pad\n// CHECK: ConvInteger(%x{{.*}} {pads = [1, 1, 1, 1]}" if folded else "// CHECK: Pad("
    weights = np.arange(-27, 27).reshape(3, 2, 3, 3).astype(np.int8)
    check("pads", "\n".join((checks, text)), {"w": weights})
