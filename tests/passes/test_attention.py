"""Attention is found whatever its spelling, made one group, and means the same."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnxc.compiler.driver import imported
from onnxc.compiler.options import Options
from onnxc.ir.graph import Graph, Node
from onnxc.passes import DEFAULT_PIPELINE
from onnxc.passes.pipeline import parse_pipeline, run_pipeline
from pass_checks import agree, check, parsed, random_inputs, transformed

SIZES = {"b": 2, "l": 5, "s": 7, "p": 2}
BEFORE = DEFAULT_PIPELINE.partition(",merge-products")[0]
NUMBERS = """
  %half = constant 0.5 : f32[]
  %root = constant [3.0] : f32[1]
  %lowest = constant -inf : f32[]
  %zero = constant 0.0 : f32[]
  %cap = constant 2.0 : f32[]
"""
HEADS = """
  %q1 = Reshape(%q) {shape = [b, l, 3, 4]} : f32[b, l, 3, 4]
  %k1 = Reshape(%k) {shape = [b, s, 3, 4]} : f32[b, s, 3, 4]
  %v1 = Reshape(%v) {shape = [b, s, 3, 4]} : f32[b, s, 3, 4]
  %q2 = Transpose(%q1) {perm = [0, 2, 1, 3]} : f32[b, 3, l, 4]
  %k2 = Transpose(%k1) {perm = [0, 2, 3, 1]} : f32[b, 3, 4, s]
  %v2 = Transpose(%v1) {perm = [0, 2, 1, 3]} : f32[b, 3, s, 4]
"""
PLAIN = "%q: f32[b, 3, l, 4], %k: f32[b, 3, 4, s], %v: f32[b, 3, s, 6]"
ROWS = "%rows = Range() {start = [2], limit = [l+2], delta = [1], dtype = i64} : i64[l]\n" + (
    "%column = Reshape(%rows) {shape = [l, 1]} : i64[l, 1]\n"
    "%keys = Range() {start = [0], limit = [s], delta = [1], dtype = i64} : i64[s]\n"
    "%seen = LessOrEqual(%keys, %column) : bool[l, s]\n"
)


def groups(graph: Graph) -> list[Node]:
    """The attentions in groups, control flow included."""
    return [node for node in graph.walk() if node.op == "onnxc.Attention"]


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes if node.op != "Constant"]


def scores_of(node: Node) -> list[str]:
    """The operators that map the products."""
    return [inner.op for inner in node.regions["scores"].nodes]


def test_heads_are_read_and_written_in_place() -> None:
    graph = check(
        "attention",
        f"""
        graph @g(%q: f32[b, l, 12], %k: f32[b, s, 12], %v: f32[b, s, 12], %m: f32[b, 1, 1, s]) -> (%y: f32[b, l, 12]) {{
          {NUMBERS}{HEADS}
          %products = MatMul(%q2, %k2) : f32[b, 3, l, s]
          %scaled = Mul(%products, %half) : f32[b, 3, l, s]
          %scores = Add(%scaled, %m) : f32[b, 3, l, s]
          %weights = Softmax(%scores) : f32[b, 3, l, s]
          %heads = MatMul(%weights, %v2) : f32[b, 3, l, 4]
          %rows = Transpose(%heads) {{perm = [0, 2, 1, 3]}} : f32[b, l, 3, 4]
          %y = Reshape(%rows) {{shape = [b, l, 12]}} : f32[b, l, 12]
        }}
        // CHECK: %rows = Fused(%q, %k, %v, %half, %m) {{kind = "heavy"}} : f32[b, l, 3, 4]
        // CHECK-NEXT: body: graph @body() -> (%rows.inner: f32[b, l, 3, 4]) {{
        // CHECK-NEXT: %q1.inner = Reshape(%q) {{shape = [b, l, 3, 4]}}
        // CHECK-NEXT: %q2.inner = Transpose(%q1.inner)
        // CHECK-NEXT: %k1.inner = Reshape(%k)
        // CHECK-NEXT: %k2.inner = Transpose(%k1.inner)
        // CHECK-NEXT: %v1.inner = Reshape(%v)
        // CHECK-NEXT: %v2.inner = Transpose(%v1.inner)
        // CHECK-NEXT: %heads.inner = onnxc.Attention(%q2.inner, %k2.inner, %v2.inner, %half, %m) : f32[b, 3, l, 4]
        // CHECK-NEXT: scores: graph @scores(%products.inner: f32[b, 3, l, s]) -> (%scores.inner: f32[b, 3, l, s]) {{
        // CHECK-NEXT: %scaled.inner = Mul(%products.inner, %half)
        // CHECK-NEXT: %scores.inner = Add(%scaled.inner, %m)
        // CHECK-NEXT: }}
        // CHECK-NEXT: %rows.inner = Transpose(%heads.inner) {{perm = [0, 2, 1, 3]}}
        // CHECK-NEXT: }}
        // CHECK-NEXT: %y = Reshape(%rows) {{shape = [b, l, 12]}}
        """,
        sizes=SIZES,
    )
    assert ops(graph) == ["Fused", "Reshape"]


def attend(scores: str, inputs: str = "", constants: dict[str, np.ndarray] | None = None, sizes: object = None) -> Node:
    """The one attention whose scores are made by lines that define %scores from %products, checked."""
    text = f"""
        graph @g({PLAIN}{inputs}) -> (%y: f32[b, 3, l, 6]) {{
          {NUMBERS}
          %products = MatMul(%q, %k) : f32[b, 3, l, s]
          {scores}
          %weights = Softmax(%scores) {{axis = 3}} : f32[b, 3, l, s]
          %y = MatMul(%weights, %v) : f32[b, 3, l, 6]
        }}
        // CHECK: onnxc.Attention
    """
    graph = check("attention", text, constants, SIZES if sizes is None else sizes)  # type: ignore[arg-type]
    assert ops(graph) == ["Fused"]
    (found,) = groups(graph)
    return found


def test_soft_cap() -> None:
    lines = """%a = Div(%products, %cap) : f32[b, 3, l, s]
               %t = Tanh(%a) : f32[b, 3, l, s]
               %scores = Mul(%t, %cap) : f32[b, 3, l, s]"""
    assert scores_of(attend(lines)) == ["Div", "Tanh", "Mul"]


def test_a_mask_of_truth_values_is_read_as_it_is() -> None:
    lines = """%bias = Where(%mask, %zero, %lowest) : f32[b, 1, l, s]
               %scores = Add(%products, %bias) : f32[b, 3, l, s]"""
    found = attend(lines, ", %mask: bool[b, 1, l, s]")
    assert [v.name for v in found.inputs if v is not None and v.name == "mask"]
    assert scores_of(found) == ["Where", "Add"]


def test_a_mask_that_is_as_large_as_what_it_is_made_of_is_read() -> None:
    lines = """%bias = Mul(%mask, %cap) : f32[b, 1, 1, s]
               %scores = Add(%products, %bias) : f32[b, 3, l, s]"""
    text = f"""
        graph @g({PLAIN}, %mask: f32[b, 1, 1, s]) -> (%y: f32[b, 3, l, 6]) {{
          {NUMBERS}
          %products = MatMul(%q, %k) : f32[b, 3, l, s]
          {lines}
          %weights = Softmax(%scores) : f32[b, 3, l, s]
          %y = MatMul(%weights, %v) : f32[b, 3, l, 6]
        }}
        // CHECK: %bias = Mul(%mask, %cap)
        // CHECK: Fused(%q, %k, %v, %bias)
    """
    check("attention", text, sizes=SIZES)


def test_a_mask_by_positions_is_computed_where_it_is_read() -> None:
    found = attend(f"{ROWS} %scores = Where(%seen, %products, %lowest) : f32[b, 3, l, s]")
    assert scores_of(found) == ["Range", "Range", "Reshape", "LessOrEqual", "Where"]
    assert [value.name for value in found.operands] == ["q", "k", "v", "lowest"]


@pytest.mark.parametrize("dtype", ["f32", "bool"])
@pytest.mark.parametrize("inverted", [False, True])
def test_a_constant_triangle_is_a_comparison(dtype: str, inverted: bool) -> None:
    triangle = np.tri(9, 9, dtype=bool)
    array = (triangle != inverted) if dtype == "bool" else np.where(triangle, 0.5, -np.inf).astype(np.float32)
    use = "Where(%part, %products, %zero)" if dtype == "bool" else "Add(%products, %part)"
    lines = f"""%whole = constant @"whole" : {dtype}[1, 1, 9, 9]
                %part = Slice(%whole) {{starts = [p, 0], ends = [p+l, s], axes = [2, 3]}} : {dtype}[1, 1, l, s]
                %scores = {use} : f32[b, 3, l, s]"""
    found = attend(lines, ", %past: f32[p]", {"whole": array.reshape(1, 1, 9, 9)})
    assert not any(value.name == "whole" for value in found.operands)
    assert ("Greater" if dtype == "bool" and inverted else "LessOrEqual") in scores_of(found)


def test_constant_positions_are_indices() -> None:
    lines = """%rows = constant @"rows" : i64[5, 1]
               %keys = constant @"keys" : i64[7]
               %seen = LessOrEqual(%keys, %rows) : bool[5, 7]
               %scores = Where(%seen, %products, %lowest) : f32[b, 3, l, s]"""
    found = attend(lines, constants={"rows": np.arange(2, 7)[:, None], "keys": np.arange(7)})
    assert [value.name for value in found.operands] == ["q", "k", "v", "lowest"]
    assert scores_of(found) == ["Range", "Range", "Reshape", "LessOrEqual", "Where"]


def test_a_constant_that_is_no_triangle_is_read() -> None:
    array = np.tri(5, 7, dtype=np.float32)
    array[4, 3] = 2
    lines = """%bias = constant @"bias" : f32[5, 7]
               %scores = Add(%products, %bias) : f32[b, 3, l, s]"""
    assert scores_of(attend(lines, constants={"bias": array})) == ["Add"]


def test_numbers_by_which_operands_are_scaled_scale_the_products() -> None:
    graph = check(
        "attention",
        f"""
        graph @g(%q: f32[b, 3, l, 4], %k: f32[b, 3, s, 4], %v: f32[b, 3, s, 4]) -> (%y: f32[b, 3, l, 4]) {{
          {NUMBERS}
          %q1 = Mul(%q, %half) : f32[b, 3, l, 4]
          %k1 = Div(%k, %root) : f32[b, 3, s, 4]
          %k2 = Transpose(%k1) {{perm = [0, 1, 3, 2]}} : f32[b, 3, 4, s]
          %scores = MatMul(%q1, %k2) : f32[b, 3, l, s]
          %weights = Softmax(%scores) : f32[b, 3, l, s]
          %y = MatMul(%weights, %v) : f32[b, 3, l, 4]
        }}
        // CHECK: %y = Fused(%k, %q, %v, %half, %root)
        // CHECK: Mul(%scores.inner, %half)
        // CHECK-NEXT: Div(%scores.inner.1, %root)
        """,
        sizes=SIZES,
    )
    assert ops(graph) == ["Fused"]


def test_heads_as_batches_are_regrouped() -> None:
    """As exporters of batched matrix products have it: heads and batch in one axis, but for the mask."""
    graph = check(
        "attention",
        """
        graph @g(%q: f32[3*b, l, 4], %k: f32[3*b, s, 4], %v: f32[3*b, s, 4], %m: f32[b, 1, l, s])
          -> (%y: f32[b, l, 3, 4]) {
          %kt = Transpose(%k) {perm = [0, 2, 1]} : f32[3*b, 4, s]
          %products = MatMul(%q, %kt) : f32[3*b, l, s]
          %split = Reshape(%products) {shape = [b, 3, l, s]} : f32[b, 3, l, s]
          %scores = Add(%split, %m) : f32[b, 3, l, s]
          %weights = Softmax(%scores) : f32[b, 3, l, s]
          %joined = Reshape(%weights) {shape = [3*b, l, s]} : f32[3*b, l, s]
          %heads = MatMul(%joined, %v) : f32[3*b, l, 4]
          %parts = Reshape(%heads) {shape = [b, 3, l, 4]} : f32[b, 3, l, 4]
          %y = Transpose(%parts) {perm = [0, 2, 1, 3]} : f32[b, l, 3, 4]
        }
        // CHECK: %y = Fused(%q, %k, %v, %m)
        // CHECK: Attention({{.*}}) : f32[b, 3, l, 4]
        """,
        sizes=SIZES,
    )
    assert ops(graph) == ["Fused"]


def test_keys_of_a_group_of_heads_are_read_by_each() -> None:
    graph = check(
        "attention",
        """
        graph @g(%q: f32[b, 6, l, 4], %k: f32[b, 2, s, 4], %v: f32[b, 1, s, 4]) -> (%y: f32[b, 6, l, 4]) {
          %k1 = Reshape(%k) {shape = [b, 2, 1, s, 4]} : f32[b, 2, 1, s, 4]
          %k2 = Expand(%k1) {shape = [b, 2, 3, s, 4]} : f32[b, 2, 3, s, 4]
          %k3 = Reshape(%k2) {shape = [b, 6, s, 4]} : f32[b, 6, s, 4]
          %k4 = Transpose(%k3) {perm = [0, 1, 3, 2]} : f32[b, 6, 4, s]
          %scores = MatMul(%q, %k4) : f32[b, 6, l, s]
          %weights = Softmax(%scores) : f32[b, 6, l, s]
          %y = MatMul(%weights, %v) : f32[b, 6, l, 4]
        }
        // CHECK: %y = Fused(%k, %q, %v)
        """,
        sizes=SIZES,
    )
    assert ops(graph) == ["Fused"]
    (found,) = groups(graph)
    assert scores_of(found) == []


@pytest.mark.parametrize("transposed", [False, True])
def test_sums_of_products_by_letters(transposed: bool) -> None:
    first = '%k, %q) {equation = "bkhd,bqhd->bhqk"}' if transposed else '%q, %k) {equation = "bqhd,bkhd->bhqk"}'
    graph = check(
        "attention",
        f"""
        graph @g(%q: f32[b, l, 3, 4], %k: f32[b, s, 3, 4], %v: f32[b, s, 3, 4]) -> (%y: f32[b, l, 3, 4]) {{
          %scores = Einsum({first} : f32[b, 3, l, s]
          %weights = Softmax(%scores) : f32[b, 3, l, s]
          %y = Einsum(%weights, %v) {{equation = "bhqk,bkhd->bqhd"}} : f32[b, l, 3, 4]
        }}
        // CHECK: %y = Fused(
        """,
        sizes=SIZES,
    )
    assert ops(graph) == ["Fused"]


def test_softmax_in_a_wider_type() -> None:
    check(
        "attention",
        """
        graph @g(%q: f16[2, 5, 4], %k: f16[2, 4, 7], %v: f16[2, 7, 4]) -> (%y: f16[2, 5, 4]) {
          %products = MatMul(%q, %k) : f16[2, 5, 7]
          %scores = Cast(%products) {to = f32} : f32[2, 5, 7]
          %weights = Softmax(%scores) : f32[2, 5, 7]
          %narrow = Cast(%weights) {to = f16} : f16[2, 5, 7]
          %y = MatMul(%narrow, %v) : f16[2, 5, 4]
        }
        // CHECK: Attention(%q, %k, %v) : f16[2, 5, 4]
        // CHECK-NEXT: scores: graph @scores(%products.inner: f16[2, 5, 7]) -> (%scores.inner: f32[2, 5, 7])
        """,
    )


EMPTY = {
    "as NaN": "%test = IsNaN(%weights) : bool[b, 3, l, s]",
    "by the mask": """%top = ReduceMax(%bias) {axes = [-1]} : f32[b, 1, l, 1]
                      %test = Equal(%top, %lowest) : bool[b, 1, l, 1]""",
}


@pytest.mark.parametrize("spelling", EMPTY)
def test_rows_without_scores_that_are_made_zero(spelling: str) -> None:
    text = f"""
        graph @g({PLAIN}, %mask: bool[b, 1, l, s]) -> (%y: f32[b, 3, l, 6]) {{
          {NUMBERS}
          %products = MatMul(%q, %k) : f32[b, 3, l, s]
          %bias = Where(%mask, %zero, %lowest) : f32[b, 1, l, s]
          %scores = Add(%products, %bias) : f32[b, 3, l, s]
          %weights = Softmax(%scores) : f32[b, 3, l, s]
          {EMPTY[spelling]}
          %whole = Where(%test, %zero, %weights) : f32[b, 3, l, s]
          %y = MatMul(%whole, %v) : f32[b, 3, l, 6]
        }}
    """
    before = parsed(text)
    after = transformed("attention", before)
    assert ops(after) == ["Fused"]
    assert groups(after)[0].attributes == {"empty_rows": "zero"}
    inputs = random_inputs(before, SIZES)
    inputs["mask"][0, 0, 1] = inputs["mask"][1, 0, 4] = False
    with np.errstate(invalid="ignore"):
        agree(before, after, inputs=inputs)


def test_rows_that_another_condition_makes_zero() -> None:
    graph = check(
        "attention",
        f"""
        graph @g({PLAIN}, %absent: bool[b, 1, l, 1]) -> (%y: f32[b, 3, l, 6]) {{
          {NUMBERS}
          %scores = MatMul(%q, %k) : f32[b, 3, l, s]
          %weights = Softmax(%scores) : f32[b, 3, l, s]
          %some = Where(%absent, %zero, %weights) : f32[b, 3, l, s]
          %y = MatMul(%some, %v) : f32[b, 3, l, 6]
        }}
        // CHECK: Attention
        // CHECK: Where(%absent, %zero,
        """,
        sizes=SIZES,
    )
    assert ops(graph) == ["Fused"]


def test_bodies_of_control_flow() -> None:
    graph = check(
        "attention",
        """
        graph @g(%c: bool[], %q: f32[2, 5, 4], %k: f32[2, 4, 7], %v: f32[2, 7, 4]) -> (%y: f32[2, 5, 4]) {
          %y = If(%c) : f32[2, 5, 4]
            then_branch: graph @t() -> (%a: f32[2, 5, 4]) {
              %scores = MatMul(%q, %k) : f32[2, 5, 7]
              %weights = Softmax(%scores) : f32[2, 5, 7]
              %a = MatMul(%weights, %v) : f32[2, 5, 4]
            }
            else_branch: graph @e() -> (%z: f32[2, 5, 4]) {
              %z = Neg(%q) : f32[2, 5, 4]
            }
        }
        // CHECK: %a = Fused(%q, %k, %v)
        """,
    )
    assert len(groups(graph)) == 1


OTHERS = {
    "scores are a result": ("%products", "Softmax(%products)", "%weights", "%v"),
    "softmax over queries": ("%y", "Softmax(%products) {axis = 1}", "%weights", "%v"),
    "scores of other keys": ("%y", "CumSum(%products) {axis = [2]}", "%soft", "%v"),
    "weights are read twice": ("%y", "Softmax(%products)", "%sum", "%v"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_attention_stays(case: str) -> None:
    also, step, left, right = OTHERS[case]
    outputs = "%y: f32[2, 5, 4]" + (f", {also}: f32[2, 5, 7]" if also != "%y" else "")
    text = f"""
        graph @g(%q: f32[2, 5, 4], %k: f32[2, 4, 7], %v: f32[2, 7, 4]) -> ({outputs}) {{
          %products = MatMul(%q, %k) : f32[2, 5, 7]
          %weights = {step} : f32[2, 5, 7]
          %soft = Softmax(%weights) : f32[2, 5, 7]
          %sum = Add(%weights, %soft) : f32[2, 5, 7]
          %y = MatMul({left}, {right}) : f32[2, 5, 4]
        }}
    """
    graph = run_pipeline(parsed(text), parse_pipeline("cleanup"))
    assert transformed("attention", graph) == graph


def test_wide_heads_and_other_types_stay() -> None:
    text = """
        graph @g(%q: f32[2, 5, 40], %k: f32[2, 40, 7], %v: f32[2, 7, 4]) -> (%y: f32[2, 5, 4]) {
          %scores = MatMul(%q, %k) : f32[2, 5, 7]
          %weights = Softmax(%scores) : f32[2, 5, 7]
          %y = MatMul(%weights, %v) : f32[2, 5, 4]
        }
    """
    assert not groups(transformed("attention{max_width=32}", parsed(text)))
    assert groups(transformed("attention{max_width=40}", parsed(text)))
    assert not groups(transformed("attention", parsed(text.replace("f32", "f64"))))


F, H, B = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BOOL
ONNX_CASES: dict[str, tuple[list[tuple[str, int, list[object]]], dict[str, object], tuple[str, ...]]] = {
    "plain": ([("q", F, ["b", 3, "l", 8]), ("k", F, ["b", 3, "s", 8]), ("v", F, ["b", 3, "s", 8])], {}, ("y",)),
    "grouped, bool mask": (
        [("q", F, ["b", 6, "l", 8]), ("k", F, ["b", 2, "s", 8]), ("v", F, ["b", 2, "s", 8]), ("m", B, ["l", "s"])],
        {},
        ("y",),
    ),
    "causal, soft cap": (
        [("q", F, ["b", 3, "l", 8]), ("k", F, ["b", 3, "s", 8]), ("v", F, ["b", 3, "s", 8])],
        {"is_causal": 1, "softcap": 2.0},
        ("y",),
    ),
    "causal, known sizes": (
        [("q", F, [2, 3, 5, 8]), ("k", F, [2, 3, 7, 8]), ("v", F, [2, 3, 7, 8])],
        {"is_causal": 1},
        ("y",),
    ),
    "past and present": (
        [
            ("q", F, ["b", "l", 24]),
            ("k", F, ["b", "l", 24]),
            ("v", F, ["b", "l", 24]),
            ("m", F, ["b", 1, "l", "l+p"]),
            ("pk", F, ["b", 3, "p", 8]),
            ("pv", F, ["b", 3, "p", 8]),
        ],
        {"q_num_heads": 3, "kv_num_heads": 3},
        ("y", "present_k", "present_v"),
    ),
}


@pytest.mark.parametrize("case", ONNX_CASES)
def test_the_operator_of_onnx(case: str) -> None:
    inputs, attributes, outputs = ONNX_CASES[case]
    node = helper.make_node("Attention", [name for name, _, _ in inputs], list(outputs), **attributes)
    declared = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs]
    results = [helper.make_tensor_value_info(name, F, None) for name in outputs]
    model = helper.make_model(
        helper.make_graph([node], "g", declared, results), opset_imports=[helper.make_opsetid("", 24)]
    )
    before = run_pipeline(imported(model, Options()), parse_pipeline(BEFORE))
    after = transformed("attention", before)
    assert len(groups(after)) == 1
    assert not {"MatMul", "Softmax"} & set(ops(after))
    sizes = {**SIZES, "s": 7, "l+p": 7} if "p" in str(inputs) else SIZES
    agree(before, after, sizes)
