from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from onnxc.ir.dims import symbol
from onnxc.ir.dtypes import F32, I64
from onnxc.ir.errors import VerifierError
from onnxc.ir.graph import Attribute, Constant, Graph, Node, SequenceType, TensorType, Type, Value, constant_node
from onnxc.ir.text import parse_graph
from onnxc.ir.verify import verify_graph

from .strategies import graphs

PAIR = TensorType(F32, (2,))
X, Y, Z = (Value(name, PAIR) for name in "xyz")


def relu(source: Value, target: Value, **more: object) -> Node:
    return replace(Node("Relu", (source,), (target,), origin=(f"relu_{target.name}",)), **more)  # type: ignore[arg-type]


def graph_of(*nodes: Node, outputs: tuple[Value, ...] = ()) -> Graph:
    return Graph("g", (X,), outputs, nodes)


@settings(deadline=None)
@given(graphs())
def test_sound_graphs_pass(graph: Graph) -> None:
    verify_graph(graph)


@settings(deadline=None)
@given(graphs())
def test_every_definition_is_needed_and_may_stand_only_once(graph: Graph) -> None:
    for at, node in enumerate(graph.nodes):
        nodes = graph.nodes
        if node.outputs:
            with pytest.raises(VerifierError, match="already defined"):
                verify_graph(replace(graph, nodes=(*nodes[: at + 1], *nodes[at:])))
        read = {value for later in nodes[at + 1 :] for value in later.reads} | set(graph.outputs)
        if read & set(node.outputs):
            with pytest.raises(VerifierError, match="is not defined"):
                verify_graph(replace(graph, nodes=nodes[:at] + nodes[at + 1 :]))


REGION = "  %y = If(%x) : f32[2]\n    then_branch: graph @then({inputs}) -> ({outputs}) {{\n{body}    }}\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('  %x = Relu(%x) : f32[2]  // from "again"', '@g: Relu ("again"), which defines %x: %x is already defined'),
        ("  %y, %y = Split(%x) : f32[2], f32[2]", "Split, which defines %y: %y is already defined"),
        ("  %z = Relu(%x) : f32[-1]", "a size of f32[-1] is negative"),
        (
            REGION.format(inputs="", outputs="", body="  %x = A() : f32[2]\n"),
            "@then: A, which defines %x: %x is already",
        ),
        (
            REGION.format(inputs="%x: f32[2]", outputs="", body=""),
            "@then: input: %x is already defined in a graph around",
        ),
        (REGION.format(inputs="", outputs="", body="  %y = A() : f32[2]\n"), "%y is already defined in a graph around"),
        (REGION.format(inputs="", outputs="%q: f32[2]", body=""), "@then: output: %q is not defined"),
        (REGION.format(inputs="", outputs="%x: i64[2]", body=""), "%x is read as i64[2] but defined as f32[2]"),
        (REGION.format(inputs="", outputs="%y: f32[2]", body=""), "%y is used before If defines it"),
    ],
)
def test_faults_that_a_text_can_hold(body: str, message: str) -> None:
    graph = parse_graph(f"graph @g(%x: f32[2]) -> () {{\n{body}\n}}")
    with pytest.raises(VerifierError) as caught:
        verify_graph(graph)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (graph_of(relu(Y, Z), relu(X, Y)), '@g: Relu ("relu_z"), which defines %z: %y is used before Relu ("relu_y")'),
        (graph_of(relu(Y, Z)), "%y is not defined"),
        (graph_of(outputs=(Y,)), "@g: output: %y is not defined"),
        (graph_of(relu(replace(X, type=TensorType(I64, (2,))), Y)), "%x is read as i64[2] but defined as f32[2]"),
        (graph_of(outputs=(replace(X, type=TensorType(F32, (3,))),)), "%x is read as f32[3] but defined as f32[2]"),
        (Graph("g", (X, X), (), ()), "@g: input: %x is already defined"),
        (graph_of(constant_node("c", np.zeros(3, np.float32), PAIR)), 'the array @"c" is f32[3], the value f32[2]'),
        (graph_of(constant_node("c", np.zeros(2), PAIR)), 'the array @"c" is f64[2], the value f32[2]'),
        (graph_of(constant_node("c", np.zeros(2, "M8[s]"), PAIR)), "ONNX has no element type for"),
        (graph_of(Node("Constant", (), (Y,), {"value": 1.5})), "an array as its attribute `value`"),
        (graph_of(relu(X, Y, attributes={"axes": [1]})), "attribute axes: [1] is a list, which the graph language"),
        (graph_of(relu(X, Y, attributes={"axes": (1, np.int64(1))})), "is a int64"),
        (graph_of(relu(X, Value("y", TensorType(F32, (np.int64(2),))))), "a size of f32[2] is a int64"),  # type: ignore[arg-type]
    ],
)
def test_faults_that_a_pass_can_make(graph: Graph, message: str) -> None:
    with pytest.raises(VerifierError) as caught:
        verify_graph(graph)
    assert message in str(caught.value)


def test_a_handle_stands_for_one_array() -> None:
    def two(first: Attribute, second: Attribute) -> Graph:
        return graph_of(relu(X, Y, attributes={"a": first}), relu(Y, Z, attributes={"a": (second,)}))

    verify_graph(two(Constant("w", np.zeros(3)), Constant("w", np.zeros(3))))
    with pytest.raises(VerifierError, match=r'relu_z.* @"w" stands for two different arrays'):
        verify_graph(two(Constant("w", np.zeros(3)), Constant("w", np.ones(3))))


def test_a_region_is_checked_with_the_values_around_it() -> None:
    region = Graph("body", (), (Y,), (relu(X, Y),))
    verify_graph(region, outer=[X])
    with pytest.raises(VerifierError, match="%x is not defined"):
        verify_graph(region)
    with pytest.raises(VerifierError, match="%y is already defined in a graph around"):
        verify_graph(region, outer=[X, Y])


def test_sibling_regions_may_share_names() -> None:
    branches = {name: Graph(name, (), (Z,), (relu(X, Z),)) for name in ("then_branch", "else_branch")}
    verify_graph(graph_of(Node("If", (X,), (Y,), regions=branches)))


N = symbol("n")


@pytest.mark.parametrize(
    ("recorded", "inferred", "reason"),
    [
        (TensorType(F32, (N, 2)), [TensorType(F32, (symbol("k"), 2))], None),
        (TensorType(F32, (N + 1,)), [TensorType(F32, (5,))], None),
        (TensorType(F32, (N + 1,)), [TensorType(F32, (N,))], "axis 0 cannot be both n and n+1"),
        (TensorType(F32, (2, 3)), [TensorType(F32, (2, 4))], "axis 1 cannot be both 4 and 3"),
        (TensorType(F32, (N + 1,)), [TensorType(F32, (0,))], "axis 0 cannot be both 0 and n+1"),
        (TensorType(F32, ()), [TensorType(I64, ())], "another element type"),
        (TensorType(F32, ()), [TensorType(F32, (1,))], "another rank"),
        (TensorType(F32, ()), [SequenceType(TensorType(F32, ()))], "another kind of type"),
        (SequenceType(TensorType(F32, ())), [SequenceType(TensorType(I64, ()))], "another element type"),
        (TensorType(F32, ()), [], "0 types inferred for 1 outputs"),
    ],
)
def test_inferred_types_must_not_contradict(recorded: Type, inferred: Sequence[Type], reason: str | None) -> None:
    graph = graph_of(relu(X, Value("y", recorded)))
    if reason is None:
        verify_graph(graph, check_types=lambda node: inferred)
        return
    with pytest.raises(VerifierError) as caught:
        verify_graph(graph, check_types=lambda node: inferred)
    assert "relu_y" in str(caught.value) and reason in str(caught.value)
