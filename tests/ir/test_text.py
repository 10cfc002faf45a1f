from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxc.ir.dims import as_symbol, symbol
from onnxc.ir.dtypes import ALL, F32, I64, STRING, DType
from onnxc.ir.errors import ModelError
from onnxc.ir.graph import Constant, Graph, Node, TensorType, Value, constant_node
from onnxc.ir.text import parse_graph, print_graph

from .strategies import arrays, graphs, shapes

EXAMPLE = """\
symbol batch in [1, 8]
symbol hits in [0, 10*batch]
graph @detector(%image: f32[batch, 3, 224, 224], %on: bool[]) -> (%boxes: f32[hits, 4], %"odd name": seq(f32[])) {
  %axes = constant [2, 3] : i64[2]
  %w = constant @"conv1.weight" : f32[64, 3, 3, 3]
  %0 = Conv(%image, %w, _) {pads = [0, 1], strides = [2, 2]} : f32[batch, 64, 111, 111]   // from "c", "\\"1\\""
  %a, %b = Split(%0) {alpha = 1.0, axis = -1, to = f16} : f32[4], optional(f32[4])        // from "split"
  %boxes = If(%on) : f32[hits, 4]
    then_branch: graph @yes() -> (%1: f32[hits, 4]) {
      %1 = com.microsoft.Pick(%0, %a) {shape = [batch, floordiv(hits, 2)], table = @"conv1.weight"} : f32[hits, 4]
    }
    else_branch: graph @no() -> (%2: f32[hits, 4]) {
      %2 = Find(%0) {count = symbol hits, mode = "a\\tb", raw = b"\\xff"} : f32[hits, 4]   // from "no/find"
    }
  %"odd name" = Print(%axes) : seq(f32[])
}
"""
WEIGHT = {"conv1.weight": Constant("conv1.weight", np.zeros((64, 3, 3, 3), np.float32))}


def only_node(graph: Graph) -> Node:
    (node,) = graph.nodes
    return node


def one_constant(array: np.ndarray, dtype: DType, name: str = "c") -> Graph:
    node = constant_node(name, array, TensorType(dtype, array.shape))
    return Graph("g", (), node.outputs, (node,))


@settings(deadline=None, max_examples=200)
@given(graphs())
def test_text_reads_back(graph: Graph) -> None:
    text = print_graph(graph)
    again = parse_graph(text, graph.constants)
    assert again == graph
    assert print_graph(again) == text == str(graph)


def test_example_is_a_fixed_point() -> None:
    assert print_graph(parse_graph(EXAMPLE, WEIGHT)) == EXAMPLE


def test_example_means_what_it_says() -> None:
    graph = parse_graph(EXAMPLE, WEIGHT)
    axes, weight, conv, split, choice, _ = graph.nodes
    batch = as_symbol(graph.inputs[0].shape[0])
    assert batch is not None and (batch.name, batch.lower, batch.upper) == ("batch", 1, 8)
    hits = as_symbol(graph.outputs[0].shape[0])
    assert hits is not None and hits.upper == 10 * symbol("batch")
    array = graph.constant(axes.output)
    assert array is not None and array.dtype == np.int64 and array.tolist() == [2, 3]
    assert weight.attributes["value"] is WEIGHT["conv1.weight"]
    assert conv.inputs == (graph.inputs[0], weight.output, None) and conv.origin == ("c", '"1"')
    assert [str(value) for value in split.outputs] == ["%a: f32[4]", "%b: optional(f32[4])"]
    assert list(choice.regions) == ["then_branch", "else_branch"]
    assert set(choice.captures()) == {conv.output, split.outputs[0]}
    assert only_node(choice.regions["else_branch"]).attributes["raw"] == b"\xff"


def test_spacing_and_comments_do_not_matter() -> None:
    loose = EXAMPLE.replace(",", " ,\n // a remark\n ").replace("{", "{ // from here\n").replace("(", "( ")
    loose = loose.replace('"c" ,\n // a remark\n  "', '"c" , "')
    assert parse_graph(loose, WEIGHT) == parse_graph(EXAMPLE, WEIGHT)


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from(ALL), shapes)
def test_small_constants_need_no_handle(data: st.DataObject, dtype: DType, shape: tuple[int, ...]) -> None:
    array = data.draw(arrays(dtype, shape))
    graph = one_constant(array, dtype)
    text = print_graph(graph)
    if '@"c"' in text:  # too large, or a NaN with a payload or sign
        assert array.size > 16 or (dtype.kind in ("float", "complex") and np.isnan(array.astype(np.complex128)).any())
        assert parse_graph(text, graph.constants) == graph
    else:
        assert array.size <= 16
        assert parse_graph(text) == graph


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.float32([0.1, 1, -0.0, 1e20, 1e-45]), "[0.1, 1.0, -0.0, 1e+20, 1e-45]"),
        (np.float64([math.nan, math.inf, -math.inf, 0.1]), "[nan, inf, -inf, 0.1]"),
        (np.float16(65504), "65504.0"),
        (np.int8([[-128, 127]]), "[[-128, 127]]"),
        (np.uint64([2**64 - 1]), "[18446744073709551615]"),
        (np.array([True, False]), "[true, false]"),
        (np.complex64([1 - 2j]), "[[1.0, -2.0]]"),
        (np.array(["a", "\n", b"\x00"], object), '["a", "\\n", b"\\x00"]'),
        (np.zeros((2, 0), np.float32), "[[], []]"),
        (np.array(5), "5"),
    ],
)
def test_literals(array: np.ndarray, text: str) -> None:
    dtype = next(dtype for dtype in ALL if dtype.numpy == array.dtype)
    graph = one_constant(np.asarray(array), dtype)
    assert f"%c = constant {text} : {dtype}[" in print_graph(graph)
    assert parse_graph(print_graph(graph)) == graph


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([0x7FC00001], np.uint32).view(np.float32), F32),
        (np.float32([-math.nan]), F32),
        (np.zeros(17, np.float32), F32),
        (np.zeros(2, ">i8"), I64),
        (np.array(["a"]), STRING),
    ],
)
def test_what_no_literal_says_exactly_stays_a_handle(array: np.ndarray, dtype: DType) -> None:
    graph = one_constant(array, dtype)
    assert '%c = constant @"c"' in print_graph(graph)
    assert parse_graph(print_graph(graph), graph.constants) == graph


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-5", -5),
        ("5.0", 5.0),
        ("-1e-07", -1e-07),
        ("-inf", -math.inf),
        ("n", symbol("n")),
        ("(f32)", symbol("f32")),
        ("(-inf)", -symbol("inf")),
        ('("in")', symbol("in")),
        ("n+1", symbol("n") + 1),
        ("symbol n", as_symbol(symbol("n"))),
        ("f32", F32),
        ("f32[2, n]", TensorType(F32, (2, symbol("n")))),
        ('"n"', "n"),
        ('"\\ud800\\u2028"', "\ud800\u2028"),
        ('b"\\"\\\\"', b'"\\'),
        ("[]", ()),
        ("[[1], [], [1.5, n]]", ((1,), (), (1.5, symbol("n")))),
    ],
)
def test_attributes(text: str, value: object) -> None:
    source = f"graph @g() -> () {{\n  Op() {{a = {text}}}\n}}\n"
    found = only_node(parse_graph(source)).attributes["a"]
    assert found == value and type(found) is type(value)
    assert print_graph(parse_graph(source)) == source


def test_nan_attribute_reads_back() -> None:
    source = "graph @g() -> () {\n  Op() {a = nan, b = -0.0}\n}\n"
    attributes: Mapping[str, object] = only_node(parse_graph(source)).attributes
    assert isinstance(attributes["a"], float) and math.isnan(attributes["a"]) and str(attributes["b"]) == "-0.0"
    assert print_graph(parse_graph(source)) == source


def test_numpy_floats_print_as_floats() -> None:
    node = Node("Op", (), (), {"a": np.float64(0.5)})
    assert "{a = 0.5}" in print_graph(Graph("g", (), (), (node,)))


def test_what_is_no_attribute_is_refused() -> None:
    node = Node("Op", (), (), {"a": [1, 2]})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="no attribute"):
        print_graph(Graph("g", (), (), (node,)))


def test_origins_are_aligned_and_long_lines_do_not_push_them_away() -> None:
    type = TensorType(F32, ())
    names = ("a", "b" * 20, "c" * 150)
    nodes = tuple(Node("Op", (), (Value(name, type),), origin=("x",)) for name in names)
    lines = print_graph(Graph("g", (), (), nodes)).splitlines()[1:4]
    first, second, long = (line.index("   // from") for line in lines)
    assert first == second == len(lines[1].split("   //")[0]) < 120 < long


HEAD = "graph @g(%x: f32[n]) -> (%x: f32[n]) {\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, column 1: expected `graph`, found the end of the text"),
        ("graph g() -> () {}", "line 1, column 7: expected the graph's @name, found `g`"),
        ("graph @g(%x) -> () {}", "line 1, column 12: expected `:`, found `)`"),
        ("graph @g(%x: g32[]) -> () {}", "column 14: expected a type, such as f32[batch, 3], found `g32`"),
        ("graph @g(%x: f32[n m]) -> () {}", "column 18: expected a dimension, found `n`"),
        ("graph @g(%x: f32[1, ]) -> () {}", "column 21: expected a dimension, found `]`"),
        (HEAD, "line 2, column 1: expected a node or `}`, found the end of the text"),
        (HEAD + "  %y = Relu(%z) : f32[n]\n}", "line 2, column 13: expected a value that is defined above, found `%z`"),
        (HEAD + "  %y = Relu(%x %x) : f32[n]\n}", "line 2, column 16: expected `,` or `)`, found `%x`"),
        (HEAD + "  %y = Relu(%x)\n}", "line 3, column 1: expected `:`, found `}`"),
        (HEAD + "  %y, %z = Split(%x) : f32[n]\n}", "line 3, column 1: expected `,`, found `}`"),
        (
            HEAD + "  %y = constant @w : f32[3]\n}",
            "column 17: expected one of the constants that were given, found `@w`",
        ),
        (HEAD + "  %y = constant [1, 2] : f32[3]\n}", "column 17: expected a constant of the type f32[3], found `[`"),
        (HEAD + "  %y = constant [1] : f32[n]\n}", "column 17: expected a constant of the type f32[n], found `[`"),
        (HEAD + "  %y = constant 256 : u8[]\n}", "expected a constant of the type u8[] (256 is no u8), found `256`"),
        (HEAD + "  %y = constant 1.5 : i8[]\n}", "(1.5 is no i8)"),
        (HEAD + "  %y = constant true : i8[]\n}", "(True is no i8)"),
        (HEAD + "  %y = constant 1 : seq(i8[])\n}", "column 21: expected one tensor's type for one %name, found `seq`"),
        (HEAD + "  Op() {a = }\n}", "column 13: expected an attribute"),
        (HEAD + '  Op() {a = "\n"}\n}', "line 2, column 13: expected an attribute: a number"),
        (HEAD + "  Op() {a = @w}\n}", "expected one of the constants that were given, found `@w`"),
        (HEAD + '  ")() : f32[]\n}', 'line 2, column 3: expected a node or `}`, found `"`'),
        (HEAD + "} }", "line 2, column 3: expected the end of the text, found `}`"),
        ("symbol n in [1]\n" + HEAD + "}", "line 1, column 13: expected [lower, upper]"),
        ("symbol n in [k, 1]\n" + HEAD + "}", "line 1, column 13: expected [lower, upper]"),
        (HEAD + "Op() {a = " + "[" * 100000, "nested too deeply"),
    ],
)
def test_errors_say_where_and_what(text: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse_graph(text)
    assert message in str(caught.value)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_broken_text_gives_only_model_errors(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(EXAMPLE)))
    end = start + data.draw(st.integers(0, 5))
    patch = data.draw(st.text('%@"{}[](),:=-_b1.e n\\\n', max_size=3))
    try:
        graph = parse_graph(EXAMPLE[:start] + patch + EXAMPLE[end:], WEIGHT)
    except ModelError as error:
        assert str(error).startswith("line ")
    else:
        assert parse_graph(print_graph(graph), WEIGHT) == graph
