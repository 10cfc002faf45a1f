"""Transposes cancel, merge and move to where they cost least, whatever stands between them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxc.ir.dims import product
from onnxc.ir.graph import Graph
from onnxc.passes.axes import altered, compose, inverse
from onnxc.passes.storage import estimate
from pass_checks import agree, check, parsed, transformed

PASSES = "canonicalize,fold,transposes,canonicalize,cleanup"


def transposed_bytes(graph: Graph) -> int:
    """The bytes that all transposes of a graph move."""
    return sum(estimate(node.output.shape) * node.output.dtype.bytes for node in graph.walk() if node.op == "Transpose")


def test_inverse_transposes_cancel_across_a_residual_block() -> None:
    check(
        PASSES,
        """
        graph @g(%x: f32[n, 5, 6, 4], %y: f32[n, 5, 6, 4]) -> (%out: f32[n, 5, 6, 4]) {
          %slope = constant [[[0.5]], [[0.25]], [[2.0]], [[0.0]]] : f32[4, 1, 1]
          %a = Transpose(%x) {perm = [0, 3, 1, 2]} : f32[n, 4, 5, 6]
          %b = Transpose(%y) {perm = [0, 3, 1, 2]} : f32[n, 4, 5, 6]
          %c = PRelu(%a, %slope) : f32[n, 4, 5, 6]
          %d = Add(%c, %b) : f32[n, 4, 5, 6]
          %e = Mul(%d, %c) : f32[n, 4, 5, 6]
          %out = Transpose(%e) {perm = [0, 2, 3, 1]} : f32[n, 5, 6, 4]
        }
        // CHECK: %[[SLOPE:.*]] = constant {{.*}} : f32[1, 1, 4]
        // CHECK-NEXT: %[[C:.*]] = PRelu(%x, %[[SLOPE]])
        // CHECK-NEXT: %[[D:.*]] = Add(%[[C]], %y)
        // CHECK-NEXT: %out = Mul(%[[D]], %[[C]])
        """,
    )


BODIES = {
    "Concat(%a, %a) {axis = 1}": "f32[2, 8, 5, 6]",
    "Concat(%a, %a) {axis = -1}": "f32[2, 4, 5, 12]",
    "Softmax(%a) {axis = 1}": "f32[2, 4, 5, 6]",
    "ReduceMean(%a) {axes = [2, 3]}": "f32[2, 4, 1, 1]",
    "ReduceMax(%a)": "f32[1, 1, 1, 1]",
    "ArgMax(%a) {axis = 1}": "i64[2, 1, 5, 6]",
    "Slice(%a) {starts = [1, 0], ends = [4, 9], axes = [1, -1], steps = [1, 2]}": "f32[2, 3, 5, 3]",
    "Slice(%a) {starts = [1, 0], ends = [4, 9]}": "f32[1, 4, 5, 6]",
    "Pad(%a) {pads = [0, 1, 2, 0, 0, 1, 0, 3]}": "f32[2, 6, 7, 9]",
    'Pad(%a) {pads = [1, 2, 3, 4], axes = [1, 3], mode = "edge"}': "f32[2, 8, 5, 12]",
    "Tile(%a) {repeats = [1, 2, 1, 3]}": "f32[2, 8, 5, 18]",
    "CumSum(%a) {axis = [2]}": "f32[2, 4, 5, 6]",
    'Resize(%a) {scales = [1.0, 1.0, 2.0, 3.0], mode = "nearest"}': "f32[2, 4, 10, 18]",
    'Resize(%a) {sizes = [2, 4, 9, 7], mode = "linear"}': "f32[2, 4, 9, 7]",
    "Gather(%a, %two) {axis = 1}": "f32[2, 2, 5, 6]",
    "MaxPool(%a) {kernel_shape = [2, 2]}": "f32[2, 4, 4, 5]",
    "AveragePool(%a) {kernel_shape = [3, 2], pads = [1, 0, 1, 0], strides = [2, 1]}": "f32[2, 4, 3, 5]",
    "GlobalAveragePool(%a)": "f32[2, 4, 1, 1]",
    "LRN(%a) {size = 3}": "f32[2, 4, 5, 6]",
    "InstanceNormalization(%a, %w, %w)": "f32[2, 4, 5, 6]",
    "BatchNormalization(%a, %w, %w, %w, %w)": "f32[2, 4, 5, 6]",
    "DepthToSpace(%a) {blocksize = 2}": "f32[2, 1, 10, 12]",
    "Clip(%a, %half)": "f32[2, 4, 5, 6]",
    "Where(%c, %a, %a)": "f32[2, 4, 5, 6]",
    "Sum(%a, %half, %w2)": "f32[2, 4, 5, 6]",
}


@pytest.mark.parametrize("call", BODIES)
def test_operators_work_in_the_order_of_their_operands(call: str) -> None:
    """Between two inverse transposes nothing is left but the operator, with its axes renamed."""
    type = BODIES[call]
    extents = type.split("[")[1].rstrip("]").split(", ")
    shape = ", ".join(extents[axis] for axis in (0, 2, 3, 1))
    dtype = type.split("[")[0]
    after = check(
        PASSES,
        f"""
        graph @g(%x: f32[2, 5, 6, 4], %c: bool[5, 6]) -> (%out: {dtype}[{shape}]) {{
          %w = constant [0.5, 1.0, 2.0, 3.0] : f32[4]
          %w2 = constant [[[0.5]], [[1.0]], [[2.0]], [[3.0]]] : f32[4, 1, 1]
          %two = constant [3, 1] : i64[2]
          %half = constant 0.5 : f32[]
          %a = Transpose(%x) {{perm = [0, 3, 1, 2]}} : f32[2, 4, 5, 6]
          %b = {call} : {type}
          %out = Transpose(%b) {{perm = [0, 2, 3, 1]}} : {dtype}[{shape}]
        }}
        // CHECK: %out = {call.split("(")[0]}(
        """,
    )
    assert all(node.op != "Transpose" for node in after.nodes)
    assert all(node.op != "Reshape" or node.operands[0].name == "c" for node in after.nodes)  # [5, 6] -> [5, 6, 1]


def test_split_carries_all_its_results() -> None:
    check(
        PASSES,
        """
        graph @g(%x: f32[2, 5, 6, 4]) -> (%out: f32[2, 5, 6, 2]) {
          %a = Transpose(%x) {perm = [0, 3, 1, 2]} : f32[2, 4, 5, 6]
          %b, %c = Split(%a) {axis = 1, num_outputs = 2} : f32[2, 2, 5, 6], f32[2, 2, 5, 6]
          %d = Mul(%b, %c) : f32[2, 2, 5, 6]
          %out = Transpose(%d) {perm = [0, 2, 3, 1]} : f32[2, 5, 6, 2]
        }
        // CHECK: graph @g
        // CHECK-NEXT: Split(%x) {axis = 3, num_outputs = 2}
        // CHECK-NEXT: %out = Mul
        """,
    )


def test_reshapes_of_neighbouring_axes_carry_an_order() -> None:
    """Tokens of a vision transformer: [N, C, H, W] -> [N, C, H*W] -> [N, H*W, C] is a view of channels-last images."""
    check(
        PASSES,
        """
        graph @g(%x: f32[n, h, w, 8]) -> (%out: f32[n, h*w, 8]) {
          %a = Transpose(%x) {perm = [0, 3, 1, 2]} : f32[n, 8, h, w]
          %b = Relu(%a) : f32[n, 8, h, w]
          %c = Reshape(%b) {shape = [n, 8, h*w]} : f32[n, 8, h*w]
          %out = Transpose(%c) {perm = [0, 2, 1]} : f32[n, h*w, 8]
        }
        // CHECK: graph @g
        // CHECK-NEXT: Relu(%x)
        // CHECK-NEXT: %out = Reshape({{.*}}) {shape = [n, h*w, 8]}
        """,
    )


def test_a_channel_shuffle_is_one_transpose() -> None:
    after = check(
        PASSES,
        """
        graph @g(%x: f32[n, 5, 6, 12]) -> (%out: f32[n, 5, 6, 12]) {
          %a = Transpose(%x) {perm = [0, 3, 1, 2]} : f32[n, 12, 5, 6]
          %b = Reshape(%a) {shape = [n, 3, 4, 5, 6]} : f32[n, 3, 4, 5, 6]
          %c = Transpose(%b) {perm = [0, 2, 1, 3, 4]} : f32[n, 4, 3, 5, 6]
          %d = Reshape(%c) {shape = [n, 12, 5, 6]} : f32[n, 12, 5, 6]
          %out = Transpose(%d) {perm = [0, 2, 3, 1]} : f32[n, 5, 6, 12]
        }
        // CHECK: Reshape(%x) {shape = [n, 5, 6, 3, 4]}
        // CHECK-NEXT: Transpose({{.*}}) {perm = [0, 1, 2, 4, 3]}
        // CHECK-NEXT: %out = Reshape
        """,
    )
    assert sum(node.op == "Transpose" for node in after.nodes) == 1


def test_a_transpose_that_is_needed_is_made_once() -> None:
    """Two readers that cannot do without it share it; nothing moves where that gains nothing."""
    text = """
    graph @g(%x: f32[2, 3, 4]) -> (%y: f32[24], %z: f32[2, 4, 3]) {
      %a = Transpose(%x) {perm = [0, 2, 1]} : f32[2, 4, 3]
      %z = Relu(%a) : f32[2, 4, 3]
      %y = Reshape(%a) {shape = [24]} : f32[24]
    }
    """
    graph = parsed(text)
    assert transformed("transposes", graph) is graph


def test_regions_are_reordered_too() -> None:
    check(
        PASSES,
        """
        graph @g(%on: bool[], %x: f32[2, 3, 4]) -> (%y: f32[2, 3, 4]) {
          %a = Transpose(%x) {perm = [2, 0, 1]} : f32[4, 2, 3]
          %y = If(%on) : f32[2, 3, 4]
            then_branch: graph @yes() -> (%c: f32[2, 3, 4]) {
              %t = Transpose(%x) {perm = [1, 0, 2]} : f32[3, 2, 4]
              %s = Exp(%t) : f32[3, 2, 4]
              %c = Transpose(%s) {perm = [1, 0, 2]} : f32[2, 3, 4]
            }
            else_branch: graph @no() -> (%d: f32[2, 3, 4]) {
              %e = Exp(%a) : f32[4, 2, 3]
              %d = Transpose(%e) {perm = [1, 2, 0]} : f32[2, 3, 4]
            }
        }
        // CHECK: graph @no
        """,
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_orders_through_reshapes(data: st.DataObject) -> None:
    """What `altered` says of a Reshape is true of arrays."""
    parts = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=5))
    cuts = data.draw(st.sets(st.integers(1, len(parts) - 1))) if len(parts) > 1 else set()
    bounds = [0, *sorted(cuts), len(parts)]
    joined = [int(np.prod(parts[a:b])) for a, b in itertools.pairwise(bounds)]
    old, new = data.draw(st.permutations([parts, joined]))
    perm = tuple(data.draw(st.permutations(range(len(old)))))
    spell = lambda dims: ", ".join(map(str, dims))  # noqa: E731
    text = f"graph @g(%x: f32[{spell(old)}]) -> (%y: f32[{spell(new)}]) {{\n"
    text += f"%y = Reshape(%x) {{shape = [{spell(new)}]}} : f32[{spell(new)}]\n}}"
    found = altered(parsed(text).nodes[0], perm)
    if perm == tuple(range(len(old))):
        assert found is not None and found[1] == tuple(range(len(new)))
    if found is None:
        return
    array = np.arange(product(old)).reshape(old)
    shape = found[0]["shape"]
    np.testing.assert_array_equal(array.transpose(perm).reshape(shape), array.reshape(new).transpose(found[1]))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_random_chains(data: st.DataObject) -> None:
    """Any chain of transposes and elementwise operators over two inputs: same numbers, never more bytes to move."""
    extents = data.draw(st.permutations([1, 2, 3, 4]))
    spell = lambda shape: f"f32[{', '.join(map(str, shape))}]"  # noqa: E731
    lines, values = [], [("%x", tuple(extents)), ("%y", tuple(extents))]
    for number in range(data.draw(st.integers(2, 8))):
        name, shape = data.draw(st.sampled_from(values))
        if data.draw(st.booleans()):
            perm = data.draw(st.permutations(range(4)))
            shape = tuple(shape[axis] for axis in perm)
            call = f"Transpose({name}) {{perm = {list(perm)}}}"
        else:
            other = data.draw(st.sampled_from([v for v, s in values if s == shape]))
            call = data.draw(
                st.sampled_from([f"Relu({name})", f"Add({name}, {other})", f"Softmax({name}) {{axis = 2}}"])
            )
        values.append((f"%v{number}", shape))
        lines.append(f"%v{number} = {call} : {spell(shape)}")
    outputs = values[-2:] if len(values) > 3 else values[-1:]
    results = ", ".join(f"{name}: {spell(shape)}" for name, shape in outputs)
    text = f"graph @g(%x: {spell(extents)}, %y: {spell(extents)}) -> ({results}) {{\n" + "\n".join(lines) + "\n}"
    before = transformed("canonicalize,cleanup", parsed(text))
    after = transformed("transposes", before)
    agree(before, after)
    assert transposed_bytes(after) <= transposed_bytes(before)


def test_orders_compose() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    for first, second in itertools.product(itertools.permutations(range(3)), repeat=2):
        np.testing.assert_array_equal(array.transpose(first).transpose(second), array.transpose(compose(first, second)))
        assert compose(first, inverse(first)) == (0, 1, 2)
