"""What the importer makes of broken models: an error that names the node, never another exception."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imported_models import BRANCHES, imported, model_of
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxc.compiler.importer import import_model
from onnxc.ir.errors import LimitError, ModelError, OnnxcError, ShapeError, UnsupportedError
from onnxc.ir.verify import verify_graph


def broken(change: Callable[[ModelProto], object], body: str = "[one] h = Relu(x) [two] y = Neg(h)") -> ModelProto:
    model = model_of(body)
    change(model)
    return model


def test_messages_name_file_node_and_operator(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(broken(lambda m: m.graph.node[1].input.__setitem__(0, "lost")), path)
    with pytest.raises(ModelError, match=r'net.onnx: node "two" \(Neg\): it reads "lost".*export'):
        import_model(path)


def tensor(name: str) -> TensorProto:
    return numpy_helper.from_array(np.ones((2, 3), np.float32), name)


def set_type(value: onnx.ValueInfoProto, number: int) -> None:
    value.type.tensor_type.elem_type = number


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ModelError, r'cycle: "one" -> "two" -> "one"', lambda g: g.node[0].input.__setitem__(0, "y")),
        (ModelError, r'"h" is defined by two nodes, "one" and "two"', lambda g: g.node[1].output.__setitem__(0, "h")),
        (ModelError, r'"two" .*defines "y", which an input or an init', lambda g: g.initializer.append(tensor("y"))),
        (ModelError, r'two inputs .* "x"', lambda g: g.input.add().CopyFrom(g.input[0])),
        (ModelError, r'two outputs .* "y"', lambda g: g.output.add().CopyFrom(g.output[0])),
        (ModelError, r'the graph\'s outputs: it reads "none"', lambda g: setattr(g.output[0], "name", "none")),
        (UnsupportedError, r'"one" \(Rely\): neither ONNX nor', lambda g: setattr(g.node[0], "op_type", "Rely")),
        (UnsupportedError, r'"one" \(acme.Relu\): neither', lambda g: setattr(g.node[0], "domain", "acme")),
        (ModelError, r'"one" .*has 2 operands, the operator takes 1', lambda g: g.node[0].input.append("x")),
        (ModelError, r'"one" .*has 0 operands', lambda g: g.node[0].ClearField("input")),
        (ModelError, r'"one" .*has 2 outputs', lambda g: g.node[0].output.append("z")),
        (
            ModelError,
            r'"alpha", which opset',
            lambda g: g.node[0].attribute.append(helper.make_attribute("alpha", 1.0)),
        ),
        (ModelError, r'"y" is declared as i64, but the operator gives f32', lambda g: set_type(g.output[0], 7)),
        (ModelError, r'"x" declares the unknown element type 77', lambda g: set_type(g.input[0], 77)),
        (ModelError, r'"x" declares the unknown element type 0', lambda g: set_type(g.input[0], 0)),
        (UnsupportedError, r'"x" is a value without a type', lambda g: g.input[0].ClearField("type")),
    ],
)
def test_broken_graphs(error: type[OnnxcError], message: str, change: Callable[[onnx.GraphProto], object]) -> None:
    model = broken(lambda model: change(model.graph))
    for way in (model, model.SerializeToString()):
        with pytest.raises(error, match=message):
            import_model(way)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (UnsupportedError, r"opset 999.*upgrade", lambda m: setattr(m.opset_import[0], "version", 999)),
        (ModelError, r"opset 0 .*does not exist", lambda m: setattr(m.opset_import[0], "version", 0)),
        (ModelError, r"imports no opset", lambda m: m.opset_import.pop(0)),
    ],
)
def test_broken_models(error: type[OnnxcError], message: str, change: Callable[[ModelProto], object]) -> None:
    model = broken(change)
    with pytest.raises(error, match=message):
        import_model(model)
    with pytest.raises(error, match=message):
        import_model(model.SerializeToString())


def test_more_broken_nodes() -> None:
    with pytest.raises(ModelError, match='lacks the attribute "axis"'):
        imported("y = Concat(x, x)")
    with pytest.raises(ModelError, match=r'"to" is of type FLOAT, not INT'):
        imported("y = Cast <to = 1.5> (x)")
    with pytest.raises(ModelError, match=r'"to" is 99, which is no element type'):
        imported("y = Cast <to = 99> (x)")
    with pytest.raises(ModelError, match=r'Add.*operand 1 \("B"\) is a tensor\(int64\).*tensor\(float\)'):
        imported("y = Add(x, i)", "float[2,3] x, int64[3] i")
    with pytest.raises(ModelError, match=r"operand 0 .* is a tensor\(bool\); Neg takes"):
        imported("y = Neg(x)", "bool[2] x")
    with pytest.raises(ShapeError, match=r"Add.*\[2, 3\].*\[2, 4\]"):
        imported("y = Add(x, z)", "float[2,3] x, float[2,4] z")
    with pytest.raises(ModelError, match="opset 20, but the model imports opset 13"):
        imported("y = Gelu(x)", opset=13)
    with pytest.raises(ModelError, match=r"local.f has 1 inputs and 1 outputs, the node gives 2"):
        imported("y = local.f(x, x)", rest='<opset_import: ["" : 21], domain: "local"> f (v) => (w) { w = Neg(v) }')


def test_branches_with_inputs() -> None:
    body = """y = If(p) <then_branch = yes (float[2] a) => (float[2] out) { out = Neg(a) },
                         else_branch = no () => (float[2] out) { out = Neg(x) }>"""
    with pytest.raises(ModelError, match='the graph "yes" has 1 inputs, its node gives 0'):
        imported(body, "bool p, float[2] x", "float[2] y")


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"not a model at all", b"PK\x03\x04" + bytes(100), bytes(range(256)) * 8]
)
def test_what_is_no_model(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    for model in (path, content):
        with pytest.raises(ModelError, match=r"not an ONNX model|file is empty"):
            import_model(model)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none.onnx: the model cannot be read: No such file"):
        import_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        import_model(tmp_path)


def survives(data: bytes) -> None:
    """Whether the bytes give a graph or one of our errors, never another exception."""
    try:
        verify_graph(import_model(data))
    except OnnxcError as error:
        assert str(error)


def rich_model() -> bytes:
    model = model_of(BRANCHES.replace("y = If", "z = If") + "y = local.f(z)", "bool p, float[2,3] x, float[2,3] w",
                     rest='<opset_import: ["" : 21], domain: "local"> f <k> (a) => (b) { b = Neg(a) }')  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.ones((20, 30), np.float32), "large"))
    return model.SerializeToString()


def test_truncated_models() -> None:
    data = rich_model()
    for length in range(0, len(data), max(1, len(data) // 700)):
        survives(data[:length])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_models(changes: list[tuple[float, int]]) -> None:
    data = bytearray(rich_model())
    for place, value in changes:
        data[math.floor(place * len(data))] = value
    survives(bytes(data))


def test_opsets_before_7() -> None:
    graph = imported("y = Add(x, x)", opset=6)
    assert [node.op for node in graph.nodes] == ["Add"]


def test_large_dimensions_are_only_numbers_and_impossible_ones_are_refused() -> None:
    large, huge = 1 << 23, 1 << 40
    graph = imported("y = Relu(x)", f"float[{large},{large}] x", f"float[{large},{large}] y")
    assert graph.outputs[0].shape == (large, large)
    with pytest.raises(LimitError, match=r'"x" of .* has more elements than any memory holds'):
        imported("y = Relu(x)", f"float[{huge},{huge}] x", f"float[{huge},{huge}] y")
