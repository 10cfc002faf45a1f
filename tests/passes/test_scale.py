"""Scales and shifts per channel end up in weights and bias; other ones are left alone."""

from __future__ import annotations

import numpy as np
import pytest
from onnxc.ir.graph import Graph
from pass_checks import agree, check, parsed, transformed

RANDOM = np.random.default_rng(3)
C = 6
NORM = {name: RANDOM.uniform(0.5, 2, C).astype(np.float32) for name in ("gamma", "beta", "mean", "variance")}
NORM_CONSTANTS = "\n".join(f'%{name} = constant @"{name}" : f32[{C}]' for name in NORM)
LAYERS = {
    "Conv": ("f32[2, 4, 5, 5]", (C, 2, 3, 3), "Conv(%x, %w{b}) {{group = 2}}", "f32[2, 6, 3, 3]"),
    "ConvTranspose": ("f32[2, 4, 5, 5]", (4, 3, 2, 2), "ConvTranspose(%x, %w{b}) {{group = 2}}", "f32[2, 6, 6, 6]"),
    "Conv channels-last": (
        "f32[2, 5, 5, 4]",
        (C, 4, 1, 1),
        'Conv(%x, %w{b}) {{layout = "channels_last"}}',
        "f32[2, 5, 5, 6]",
    ),
    "Gemm": ("f32[2, 4]", (C, 4), "Gemm(%x, %w{b}) {{transB = 1, alpha = 0.5, beta = 2.0}}", "f32[2, 6]"),
    "MatMul": ("f32[2, 3, 4]", (4, C), "MatMul(%x, %w)", "f32[2, 3, 6]"),
}


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes if node.op != "Constant"]


def layer(name: str, bias: bool, body: str) -> tuple[str, dict[str, np.ndarray]]:
    """A graph in which `body` makes %y of the layer's result %c."""
    x, shape, call, type = LAYERS[name]
    text = f'graph @g(%x: {x}) -> (%y: {type}) {{\n%w = constant @"w" : f32[{", ".join(map(str, shape))}]\n'
    text += f'%b = constant @"b" : f32[{C}]\n{NORM_CONSTANTS}\n'
    text += f"%c = {call.format(b=', %b' if bias else '')} : {type}\n{body.format(type=type)}\n}}"
    return text, {
        "w": RANDOM.normal(size=shape).astype(np.float32),
        "b": RANDOM.normal(size=C).astype(np.float32),
    } | NORM


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["Conv", "ConvTranspose", "Gemm"])
def test_batch_normalization_goes_into_the_layer(name: str, bias: bool) -> None:
    body = "%y = BatchNormalization(%c, %gamma, %beta, %mean, %variance) {{epsilon = 0.001}} : {type}"
    text, arrays = layer(name, bias, body)
    after = check("scale", text + f"\n// CHECK: %y = {name}(%x, %c.weights, %c.bias)", arrays)
    assert ops(after) == [name]


@pytest.mark.parametrize("name", LAYERS)
def test_a_chain_of_scales_and_shifts_goes_into_the_layer(name: str) -> None:
    behind = ", 1, 1" if name in ("Conv", "ConvTranspose") else ""
    body = f"""
    %g4 = Reshape(%gamma) {{{{shape = [6{behind}]}}}} : f32[6{behind}]
    %b4 = Reshape(%beta) {{{{shape = [6{behind}]}}}} : f32[6{behind}]
    %three = constant 3.0 : f32[]
    %p = Mul(%c, %g4) : {{type}}
    %q = Add(%p, %b4) : {{type}}
    %r = Sub(%q, %three) : {{type}}
    %y = Div(%r, %b4) : {{type}}
    """
    text, arrays = layer(name, True, body)
    after = transformed("fold,scale", before := parsed(text, arrays))
    agree(before, after)
    # A matrix product has no bias: what follows the first scale stays.
    assert ops(after) == (["MatMul", "Add", "Sub", "Div"] if name == "MatMul" else [name.split()[0]])


def test_a_result_with_other_readers_is_not_scaled() -> None:
    body = """
    %n = BatchNormalization(%c, %gamma, %beta, %mean, %variance) : {type}
    %y = Add(%n, %c) : {type}
    """
    text, arrays = layer("Conv", True, body)
    after = check(
        "scale", text + "\n// CHECK: %n.scaled = Mul(%c, %n.scale)\n// CHECK: %n = Add(%n.scaled, %n.shift)", arrays
    )
    assert ops(after) == ["Conv", "Mul", "Add", "Add"]


def test_weights_of_two_layers_are_not_copied() -> None:
    body = """
    %d = Conv(%x, %w) {{group = 2}} : {type}
    %n = BatchNormalization(%c, %gamma, %beta, %mean, %variance) : {type}
    %y = Add(%n, %d) : {type}
    """
    text, arrays = layer("Conv", False, body)
    after = transformed("scale", before := parsed(text, arrays))
    agree(before, after)
    assert ops(after) == ["Conv", "Conv", "Mul", "Add", "Add"]


def test_constants_along_other_axes_stay() -> None:
    check(
        "scale",
        """
        graph @g(%x: f32[1, 4, 3, 3]) -> (%y: f32[1, 3, 3, 3]) {
          %w = constant @"w" : f32[3, 4, 1, 1]
          %rows = constant [[[1.0], [2.0], [3.0]]] : f32[1, 3, 1]
          %c = Conv(%x, %w) : f32[1, 3, 3, 3]
          %y = Mul(%c, %rows) : f32[1, 3, 3, 3]
        }
        // CHECK: %c = Conv
        // CHECK: %y = Mul(%c, %rows)
        """,
        {"w": RANDOM.normal(size=(3, 4, 1, 1)).astype(np.float32)},
    )


def test_normalization_along_another_axis_than_the_product() -> None:
    """BatchNormalization of [2, 6, 6] scales axis 1, the weights of the product axis 2."""
    text = f"""
    graph @g(%x: f32[2, 6, 4]) -> (%y: f32[2, 6, 6]) {{
      %w = constant @"w" : f32[4, 6]
      {NORM_CONSTANTS}
      %c = MatMul(%x, %w) : f32[2, 6, 6]
      %y = BatchNormalization(%c, %gamma, %beta, %mean, %variance) : f32[2, 6, 6]
    }}
    """
    before = parsed(text, {"w": RANDOM.normal(size=(4, 6)).astype(np.float32)} | NORM)
    after = transformed("scale", before)
    agree(before, after)
    assert ops(after) == ["MatMul", "Mul", "Add"]
