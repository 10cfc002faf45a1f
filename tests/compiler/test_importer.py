"""The importer on small models: structure, types, symbolic dimensions, functions and control flow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from imported_models import BRANCHES, imported, model_of
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.reference import ReferenceEvaluator
from onnxc.compiler.importer import import_model
from onnxc.ir.dims import Dim, ceildiv, dim_max, floordiv, symbol
from onnxc.ir.dtypes import BOOL, F16, F32, I64
from onnxc.ir.errors import ModelError, ShapeError, UnsupportedError
from onnxc.ir.export import to_onnx
from onnxc.ir.graph import Constant, Graph, Node, TensorType
from onnxc.ir.verify import verify_graph


def agrees(model: ModelProto, graph: Graph, *inputs: np.ndarray) -> None:
    """Whether graph and model give the same results, both by ONNX's reference."""
    arrays = {value.name: array for value, array in zip(model.graph.input, inputs, strict=True)}
    for found, expected in zip(ReferenceEvaluator(to_onnx(graph)).run(None, arrays),
                               ReferenceEvaluator(model).run(None, arrays), strict=True):  # fmt: skip
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def node(graph: Graph, op: str) -> Node:
    """The only node of the operator."""
    (found,) = (node for node in graph.walk() if node.op == op)
    return found


# Structure.


def test_names_types_and_origin() -> None:
    graph = imported("[first] h = Relu(x) y = Neg(h)")
    assert [str(value) for value in graph.inputs] == ["%x: f32[2, 3]"]
    assert [node.op for node in graph.nodes] == ["Relu", "Neg"]
    assert [node.output.name for node in graph.nodes] == ["h", "y"]
    assert [node.origin for node in graph.nodes] == [("first",), ("Neg_1",)]
    assert graph.outputs == (graph.nodes[1].output,)


@pytest.mark.parametrize("way", [bytes, Path, str, ModelProto])
def test_ways_to_give_a_model(way: type, tmp_path: Path) -> None:
    model, path = model_of("y = Relu(x)"), tmp_path / "model.onnx"
    onnx.save(model, path)
    given = {bytes: path.read_bytes(), Path: path, str: str(path), ModelProto: model}[way]
    assert [node.op for node in import_model(given).nodes] == ["Relu"]


def test_initializers_become_constants_once_and_only_where_read() -> None:
    model = model_of("y = Add(x, w)", rest="")
    for name in ("w", "unused"):
        model.graph.initializer.append(numpy_helper.from_array(np.ones((2, 3), np.float32), name))
    graph = import_model(model)
    assert list(graph.constants) == ["w"]
    assert graph.nodes[0].attributes["value"] == Constant("w", np.ones((2, 3), np.float32))


def test_an_initializer_that_is_an_input_is_no_input() -> None:
    model = model_of("y = Add(x, w)", "float[2,3] x, float[2,3] w")
    model.graph.initializer.append(numpy_helper.from_array(np.ones((2, 3), np.float32), "w"))
    assert [value.name for value in import_model(model).inputs] == ["x"]


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("value_float = 1.5", np.array(1.5, np.float32)),
        ("value_floats = [1.5, 2.5]", np.array([1.5, 2.5], np.float32)),
        ("value_int = 7", np.array(7)),
        ("value_ints = [7, 8]", np.array([7, 8])),
        ("value = double[1,2] {1.0, 2.0}", np.array([[1.0, 2.0]])),
    ],
)
def test_constants_of_every_spelling(attribute: str, expected: np.ndarray) -> None:
    dtype = {"f": "float", "i": "int64"}[expected.dtype.kind]
    dtype = "double" if expected.dtype == np.float64 else dtype
    graph = imported(f"y = Constant <{attribute}> ()", "", f"{dtype}[] y")
    handle = graph.nodes[0].attributes["value"]
    assert isinstance(handle, Constant)
    assert handle.array.dtype == expected.dtype
    assert handle.array.tolist() == expected.tolist()


def test_sparse_constants_and_initializers_become_dense() -> None:
    values = numpy_helper.from_array(np.array([5], np.float32), "w")
    tensor = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([2]), "i"), [3])
    sparse_node = helper.make_node("Constant", [], ["c"], sparse_value=tensor)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    add = helper.make_node("Add", ["c", "w"], ["y"])
    graph = helper.make_graph([sparse_node, add], "g", [], [output], sparse_initializer=[tensor])
    constants = import_model(helper.make_model(graph)).constants
    assert [constants[name].array.tolist() for name in ("w", "c")] == [[0, 0, 5]] * 2


def test_attributes_are_plain_python() -> None:
    body = 'c = Cast <to = 10> (x) y = Pad <mode = "reflect"> (c, p)'
    model = model_of(body, outputs="float16[2,5] y")
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 1, 0, 1]), "p"))
    graph = import_model(model)
    assert dict(node(graph, "Cast").attributes) == {"to": F16}
    assert dict(node(graph, "Pad").attributes) == {"mode": "reflect"}
    transpose = node(imported("y = Transpose <perm = [1, 0]> (x)", outputs="float[3,2] y"), "Transpose")
    assert transpose.attributes["perm"] == (1, 0)
    leaky = node(imported("y = LeakyRelu <alpha = 0.5> (x)"), "LeakyRelu")
    assert leaky.attributes["alpha"] == 0.5


def test_absent_operands_and_outputs_nobody_reads() -> None:
    model = model_of('y = Clip(x, "", m)')
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "m"))
    graph = import_model(model)
    assert [value and value.name for value in node(graph, "Clip").inputs] == ["x", None, "m"]
    graph = imported('"", b = Split <axis = 1, num_outputs = 3> (x) y = Neg(b)', outputs="float[2,1] y")
    assert len({value.name for value in node(graph, "Split").outputs} - {""}) == 2
    model = model_of("h, unread = Dropout(x) y = Neg(h)")
    assert [node.op for node in import_model(model).nodes] == ["Identity", "Neg"]


def test_parts_that_nobody_reads_keep_their_number() -> None:
    graph = imported("y, a, b = Split <axis = 1> (x)", outputs="float[2,1] y", opset=13)
    assert node(graph, "Split").attributes["num_outputs"] == 3
    assert len(node(graph, "Split").outputs) == 3


def test_other_domains_carry_their_name() -> None:
    graph = imported("y = com.microsoft.FusedMatMul <transA = 1> (x, x)", outputs="float[3,3] y")
    assert [node.op for node in graph.nodes] == ["com.microsoft.FusedMatMul"]
    assert graph.outputs[0].type == TensorType(F32, (3, 3))


def test_nodes_out_of_order_are_sorted() -> None:
    graph = imported("y = Neg(h) h = Relu(g) g = Abs(x)")
    assert [node.op for node in graph.nodes] == ["Abs", "Relu", "Neg"]
    assert graph.nodes[2].origin == ("Neg_0",)


# Symbolic dimensions.


def shape_of(graph: Graph, position: int = 0) -> tuple[Dim, ...]:
    return graph.inputs[position].shape


def test_named_and_unnamed_dimensions() -> None:
    graph = imported("y = Relu(x)", "float[batch, ?, 3] x", "float[a, b, c] y")
    assert shape_of(graph) == (symbol("batch"), symbol("x_1"), 3)
    assert graph.outputs[0].shape == shape_of(graph)


def names(*texts: str) -> ModelProto:
    """A model whose input has axes of these names."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(texts))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [output]))


def test_names_become_distinct_identifiers() -> None:
    shape = shape_of(import_model(names("batch-size", "batch_size", "batch size", "2d", "lambda", "größe", "?")))
    assert len({str(dim) for dim in shape}) == 7
    assert all(str(dim).isidentifier() and str(dim).isascii() for dim in shape)
    assert shape[1] == symbol("batch_size")


B, S = symbol("b"), symbol("s")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s + 1", S + 1), ("2*s", 2 * S), ("b * s - 1", B * S - 1), ("s//2", floordiv(S, 2)),
        ("floor(s/2)", floordiv(S, 2)),
        ("floor((s - 1)/2) + 1", floordiv(S - 1, 2) + 1), ("ceiling(s/4)", ceildiv(S, 4)), ("Max(1, s)", dim_max(1, S)),
        ("floor(floor(s/2)/3)", floordiv(S, 6)), ("-s + 8", 8 - S), ("s % 4", S - 4 * floordiv(S, 4)),
        ("s/2", symbol("s_2")), ("s + other", symbol("s___other")), ("s**2", symbol("s__2")), ("f(s)", symbol("f_s_")),
        ("s.t", symbol("s_t")), ("floor(s/0)", symbol("floor_s_0_")), ("f('s')", symbol("f__s__")),
    ],
)  # fmt: skip
def test_expressions_over_known_names(text: str, expected: Dim) -> None:
    assert shape_of(import_model(names("b", "s", text))) == (B, S, expected)


def test_dims_and_shapes_specialise() -> None:
    model = names("batch", "seq", "seq + 1")
    assert shape_of(import_model(model, dims={"batch": 2})) == (2, symbol("seq"), symbol("seq") + 1)
    assert shape_of(import_model(model, shapes={"x": (2, 5, 6)})) == (2, 5, 6)
    assert import_model(model, dims={"batch": 2, "seq": 4}).outputs[0].shape == (2, 4, 5)
    assert shape_of(import_model(names("batch-size"), dims={"batch-size": 3})) == (3,)
    assert shape_of(import_model(names("past", "past + 2*seq"), shapes={"x": (3, 13)}, dims={})) == (3, 13)


def test_a_shape_for_an_input_without_one() -> None:
    model = model_of("y = Relu(x)")
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert shape_of(import_model(model, shapes={"x": (4, 1)})) == (4, 1)
    with pytest.raises(UnsupportedError, match=r'"x" declares no shape; give it with shapes=\{"x"'):
        import_model(model)


def test_sizes_of_minus_one_are_dynamic() -> None:
    model = model_of("y = Relu(x)")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert shape_of(import_model(model)) == (symbol("x_0"), 3)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -5
    with pytest.raises(ModelError, match=r'axis 0 of "x" has the size -5.*shapes='):
        import_model(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": {"nope": 1}}, '"nope".*batch, seq'),
        ({"shapes": {"z": (1, 2, 3)}}, '"z".*inputs are x'),
        ({"shapes": {"x": (1, 2)}}, r'"x" the shape \(1, 2\).*f32\[batch, seq'),
        ({"shapes": {"x": (1, 2, 4)}}, 'axis 2 of "x" is declared as seq\\+1.*4'),
        ({"dims": {"batch": 2}, "shapes": {"x": (3, 4, 5)}}, '"batch" is 2 by dims.*3 by axis 0 of "x"'),
        ({"dims": {"batch": -1}}, r'dims\["batch"\].*-1'),
        ({"dims": {"batch": 1.5}}, "integers.*1.5"),
        ({"shapes": {"x": (1, "n", 4)}}, "integers.*'n'"),
    ],
)
def test_contradicting_sizes(options: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        import_model(names("batch", "seq", "seq + 1"), **options)  # type: ignore[arg-type]


def test_shapes_that_leave_an_expression_open() -> None:
    with pytest.raises(ShapeError, match=r"past\+seq.*give dims="):
        model = model_of("y = Relu(x)", "float[N] x, float[past] p, float[seq] s", "float[N] y")
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "past + seq"
        import_model(model, shapes={"x": (4,)})


# Functions.


def test_local_functions_are_inlined() -> None:
    functions = """
        <opset_import: ["" : 21], domain: "local"> scaled <factor> (a) => (b) {
            c = Constant <value_float: float = @factor> () b = Mul(a, c) }
        <opset_import: ["" : 21, "local" : 1], domain: "local"> twice (a) => (b) {
            h = local.scaled <factor = 3.0> (a) [last] b = local.scaled <factor = 0.5> (h) }
    """
    model = model_of("[call] h = local.twice(x) y = local.twice(h)", rest=functions)
    graph = import_model(model)
    verify_graph(graph)
    assert [node.op for node in graph.nodes if node.op != "Constant"] == ["Mul"] * 4
    assert graph.outputs[0].name == "y"
    assert graph.nodes[3].origin == ("call/last/Mul_1",)
    agrees(model, graph, np.ones((2, 3), np.float32))


def test_attribute_defaults_and_absent_operands_of_functions() -> None:
    function = """
        <opset_import: ["" : 21], domain: "local"> f <slope: float = 0.25> (a, low, high) => (c, b) {
            c = LeakyRelu <alpha: float = @slope> (a) b = Clip(a, low, high) }
    """
    model = model_of("y, z = local.f(x)", outputs="float[2,3] y, float[2,3] z", rest=function)
    graph = import_model(model)
    assert node(graph, "LeakyRelu").attributes["alpha"] == 0.25
    assert len(node(graph, "Clip").operands) == 1


def test_a_function_that_returns_its_operand() -> None:
    function = '<opset_import: ["" : 21], domain: "local"> same (a) => (a) { unused = Neg(a) }'
    graph = imported("y = local.same(x)", rest=function)
    assert graph.nodes[-1].op == "Identity"
    assert graph.outputs[0].name == "y"


def test_a_function_has_its_own_opset() -> None:
    function = '<opset_import: ["" : 12], domain: "local"> f (a) => (b) { b = Squeeze <axes = [0]> (a) }'
    graph = imported("y = local.f(x)", "float[1,3] x", "float[3] y", rest=function)
    assert node(graph, "Squeeze").inputs[1] is not None


def test_recursion_is_refused() -> None:
    functions = """
        <opset_import: ["" : 21, "local" : 1], domain: "local"> f (a) => (b) { b = local.g(a) }
        <opset_import: ["" : 21, "local" : 1], domain: "local"> g (a) => (b) { b = local.f(a) }
    """
    with pytest.raises(ModelError, match=r"calls itself: local.f -> local.g -> local.f"):
        imported("y = local.f(x)", rest=functions)


def test_schema_functions_get_unique_names_and_keep_the_origin() -> None:
    call = "MeanVarianceNormalization <axes = [0, 1]>"
    model = model_of(f"[one] h = {call} (x) [two] y = {call} (h)")
    graph = import_model(model)
    verify_graph(graph)
    assert {node.origin for node in graph.nodes} <= {("one",), ("two",)}
    agrees(model, graph, np.arange(6, dtype=np.float32).reshape(2, 3))


# Control flow.


def test_branches_are_regions_that_read_values_around() -> None:
    model = model_of(BRANCHES, "bool p, float[2,3] x, float[2,3] w")
    graph = import_model(model)
    verify_graph(graph)
    branch = node(graph, "If")
    assert set(branch.regions) == {"then_branch", "else_branch"}
    assert {value.name for value in branch.captures()} == {"x", "w"}
    assert branch.output.type == TensorType(F32, (2, 3))
    for condition in (True, False):
        agrees(model, graph, np.array(condition), np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))


def test_of_a_condition_that_is_known_the_branch_is_taken() -> None:
    body = """
        shape = Shape(x) rows = Gather <axis = 0> (shape, zero) p = Equal(rows, one)
        y = If(p) <then_branch = yes () => (float[C] out) { out = Squeeze(x, axes) },
                   else_branch = no () => (float[R,C] out) { h = Neg(x) out = Identity(h) }>
    """
    model = model_of(body, "float[R,3] x", "float y")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for name, array in (("zero", np.array(0)), ("one", np.array(1)), ("axes", np.array([0]))):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    with pytest.raises(UnsupportedError, match=r"If.*rank"):
        import_model(model)
    for rows, op, shape in ((1, "Squeeze", (3,)), (2, "Neg", (2, 3))):
        graph = import_model(model, dims={"R": rows})
        verify_graph(graph)
        assert graph.outputs[0].shape == shape
        assert {"If", "Squeeze", "Neg"} & {n.op for n in graph.walk()} == {op}
        agrees(model, graph, np.ones((rows, 3), np.float32))


def test_names_defined_again_in_a_branch_are_renamed() -> None:
    body = """
        out = Neg(x)
        z = If(p) <then_branch = yes () => (float[2,3] out) { out = Abs(x) },
                   else_branch = no () => (float[2,3] h) { h = Relu(out) }>
        y = Add(out, z)
    """
    model = model_of(body, "bool p, float[2,3] x")
    graph = import_model(model)
    verify_graph(graph)
    for condition in (True, False):
        agrees(model, graph, np.array(condition), np.full((2, 3), -2, np.float32))


def loop(
    start: str, body: str, state: str = "float[N] s", out: str = "float[N] t", result: str = "float[N] y"
) -> ModelProto:
    text = f"y = Loop(n, c, {start}) <body = b (int64 i, bool k, {state}) => (bool k2, {out}) {{ {body} }}>"
    return model_of(text, "int64 n, bool c, float[3] x", result)


def test_loops_with_a_state_of_fixed_shape() -> None:
    model = loop("x", "k2 = Identity(k) t = Add(s, x)")
    graph = import_model(model)
    verify_graph(graph)
    body = node(graph, "Loop").regions["body"]
    assert [value.type for value in body.inputs] == [TensorType(I64, ()), TensorType(BOOL, ()), TensorType(F32, (3,))]
    agrees(model, graph, np.array(4), np.array(True), np.arange(3, dtype=np.float32))


def test_loops_with_a_state_that_grows() -> None:
    model = loop("x", "k2 = Identity(k) t = Concat <axis = 0> (s, x)")
    graph = import_model(model)
    verify_graph(graph)
    body = node(graph, "Loop").regions["body"]
    (grown,) = body.inputs[2].shape
    assert grown != 3
    assert body.outputs[1].shape == (grown + 3,)
    assert not isinstance(graph.outputs[0].shape[0], int)
    assert [value.name for value in body.inputs] == ["i", "k", "s"]
    agrees(model, graph, np.array(2), np.array(True), np.arange(3, dtype=np.float32))


def test_loops_whose_state_changes_its_kind() -> None:
    with pytest.raises(ModelError, match=r"state 0 enters an iteration as f32\[3\], but leaves as f16\[3\]"):
        import_model(loop("x", "k2 = Identity(k) t = Cast <to = 10> (s)", out="float16[N] t"))
    body = "k2 = Identity(k) a = Constant <value_ints = [0]> () t = Unsqueeze(s, a)"
    with pytest.raises(UnsupportedError, match="changes its rank"):
        import_model(loop("x", body, out="float[1,N] t"))


def test_scans_take_slices() -> None:
    body = """
        y, z = Scan(s, x) <num_scan_inputs = 1, scan_input_axes = [1],
            body = b (float[2] total, float[2] slice) => (float[2] next, float[2] each) {
                next = Add(total, slice) each = Neg(next) }>
    """
    graph = imported(body, "float[2] s, float[2,5] x", "float[2] y, float[5,2] z")
    assert [value.shape for value in node(graph, "Scan").regions["body"].inputs] == [(2,), (2,)]
    assert [value.shape for value in graph.outputs] == [(2,), (5, 2)]


def test_constants_of_branches_stay_there() -> None:
    body = """
        y = If(p) <then_branch = yes () => (float[2] out) { out = Constant <value_floats = [1.0, 2.0]> () },
                   else_branch = no () => (float[2] out) { out = Identity(x) }>
    """
    graph = imported(body, "bool p, float[2] x", "float[2] y")
    assert [n.op for n in node(graph, "If").regions["then_branch"].nodes] == ["Constant"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_cases_of_onnx_itself_keep_their_results() -> None:
    """A sample of ONNX's node tests through import and export, evaluated by ONNX's reference."""
    agreeing = 0
    for case in sorted(load_model_tests(kind="node"), key=lambda case: case.name)[::7]:
        # Random results; a Loop whose scalars ONNX's reference stacks as columns.
        if any(word in case.name for word in ("bernoulli", "train", "range_")):
            continue
        arrays, expected = case.data_sets[0]
        try:
            graph = import_model(case.model.SerializeToString())
        except UnsupportedError:
            continue
        verify_graph(graph)
        inputs = {value.name: array for value, array in zip(case.model.graph.input, map(as_array, arrays), strict=True)}
        found = ReferenceEvaluator(to_onnx(graph)).run(None, {value.name: inputs[value.name] for value in graph.inputs})
        for value, left, right in zip(graph.outputs, found, map(as_array, expected), strict=True):
            assert left.shape == right.shape, case.name
            assert value.dtype.kind == "string" or value.dtype.numpy == left.dtype == right.dtype, case.name
            assert all(a == b or not isinstance(a, int) for a, b in zip(value.shape, left.shape, strict=True)), (
                case.name
            )
            if right.dtype.kind in "OUS":
                assert left.tolist() == right.tolist(), case.name
            else:
                wide = np.complex128 if right.dtype.kind == "c" else np.float64
                np.testing.assert_allclose(
                    left.astype(wide), right.astype(wide), case.rtol, max(case.atol, 1e-5), err_msg=case.name
                )
        agreeing += 1
    assert agreeing > 150


def as_array(value: object) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
