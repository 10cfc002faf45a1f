"""Activations of i8 as u8: the same sums, where everything that makes and reads them can have it so."""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from onnxc.ir.graph import Graph
from onnxc.passes.unsigned_bytes import UnsignedBytes
from pass_checks import agree, filecheck, parsed, transformed

RANDOM = np.random.default_rng(3)
CONSTANTS = {
    "s": np.array(0.05, np.float32),
    "z": np.array(-3, np.int8),
    "w": RANDOM.integers(-128, 128, (6, 4, 3, 3)).astype(np.int8),
    "v": RANDOM.integers(-128, 128, (6, 5)).astype(np.int8),
    "shape": np.array([-1, 6], np.int64),
}


def graph_of(body: str, result: str, inputs: str = "%x: f32[2, 4, 7, 8]") -> Graph:
    text = f"""
    graph @g({inputs}) -> (%y: {result}) {{
      %s = Constant() {{value=@s}} : f32[]
      %z = Constant() {{value=@z}} : i8[]
      %w = Constant() {{value=@w}} : i8[6, 4, 3, 3]
      %v = Constant() {{value=@v}} : i8[6, 5]
      %shape = Constant() {{value=@shape}} : i64[2]
      {body}
    }}
    """
    used = {name: array for name, array in CONSTANTS.items() if f"%{name}" in body}
    lines = [line for line in text.splitlines() if "Constant()" not in line or line.split()[0][1:] in used]
    return parsed("\n".join(lines), used)


def test_what_is_quantized_moved_and_convolved() -> None:
    graph = graph_of(
        """%q = QuantizeLinear(%x, %s, %z) : i8[2, 4, 7, 8]
        %p = Transpose(%q) {perm=[0, 1, 3, 2]} : i8[2, 4, 8, 7]
        %y = ConvInteger(%p, %w, %z) {pads=[1, 1, 1, 1]} : i32[2, 6, 8, 7]""",
        "i32[2, 6, 8, 7]",
    )
    after = transformed("unsigned-bytes,cleanup", graph)
    agree(graph, after)
    filecheck(
        """
        // CHECK: %q = QuantizeLinear(%x, %s, %z.unsigned{{.*}}) : u8[2, 4, 7, 8]
        // CHECK: %p = Transpose(%q) {{.*}} : u8[2, 4, 8, 7]
        // CHECK: %y = ConvInteger(%p, %w, %z.unsigned{{.*}}) {{.*}} : i32[2, 6, 8, 7]
        """,
        str(after),
    )


def test_zero_points_that_were_left_out_and_several_readers() -> None:
    graph = graph_of(
        """%q = QuantizeLinear(%x, %s, %z) : i8[12, 6]
        %d = DequantizeLinear(%q, %s) : f32[12, 6]
        %c = Concat(%q, %q) {axis=0} : i8[24, 6]
        %m = MatMulInteger(%c, %v) : i32[24, 5]
        %f = Cast(%m) {to=f32} : f32[24, 5]
        %r = ReduceSum(%d) {axes=[0, 1], keepdims=0} : f32[]
        %y = Add(%f, %r) : f32[24, 5]""",
        "f32[24, 5]",
        "%x: f32[12, 6]",
    )
    after = transformed("unsigned-bytes,cleanup", graph)
    agree(graph, after)
    assert ": i8[12" not in str(after) and ": u8[24, 6]" in str(after)


@pytest.mark.parametrize(
    "body",
    [
        # A result is added up as it lies, a result of the graph, the right operand of a product.
        """%q = QuantizeLinear(%x, %s, %z) : i8[12, 6]
        %n = Cast(%q) {to=i32} : i32[12, 6]
        %m = MatMulInteger(%q, %v, %z) : i32[12, 5]
        %k = Slice(%n) {starts=[0], ends=[5], axes=[1], steps=[1]} : i32[12, 5]
        %y = Add(%m, %k) : i32[12, 5]""",
        """%q = QuantizeLinear(%x, %s, %z) : i8[12, 6]
        %t = Transpose(%q) {perm=[1, 0]} : i8[6, 12]
        %y = MatMulInteger(%q, %t, %z, %z) : i32[12, 12]""",
        """%q = QuantizeLinear(%x, %s, %z) : i8[12, 6]
        %y = DequantizeLinear(%q, %s, %z) : f32[12, 6]""",
    ],
)
def test_what_stays(body: str) -> None:
    result = {"i32[12, 5]": "i32[12, 5]", "i32[12, 12]": "i32[12, 12]"}.get(body.split(" : ")[-1], "f32[12, 6]")
    graph = graph_of(body, result, "%x: f32[12, 6]")
    assert UnsignedBytes().run(graph) is graph


@pytest.mark.parametrize(("target", "moved"), [("znver4", True), ("haswell", False), ("neoverse-n1", False)])
def test_only_where_instructions_want_it(target: str, moved: bool) -> None:
    from onnxc.compiler.driver import passes_of
    from onnxc.compiler.options import Options

    passes = passes_of(Options(target=onnxc.Target.parse(target)))
    assert any(isinstance(item, UnsignedBytes) for item in passes) == moved
