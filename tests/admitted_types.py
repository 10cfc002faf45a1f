"""Every operator of ONNX with every element type that its schema admits: a model each, made of ONNX's own node case."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from conformance.suite import cases, data_sets, model_of
from onnx import TensorProto, defs, helper
from onnxc.ir.dtypes import BY_ONNX, DType

TYPES = {onnx.TensorProto.DataType.Name(dtype.onnx).lower(): dtype for dtype in BY_ONNX.values()} | {
    "float": BY_ONNX[TensorProto.FLOAT], "double": BY_ONNX[TensorProto.DOUBLE],
}  # fmt: skip
DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype")
"""Attributes that say the type of the result, where no operand does."""
WINDOWS = ("BlackmanWindow", "HammingWindow", "HannWindow")
RANDOM = ("Normal", "Uniform")


@dataclass(frozen=True)
class Typed:
    """A node whose type variable `variable` is `dtype`, and operands for it."""

    op: str
    variable: str
    dtype: DType
    model: onnx.ModelProto
    inputs: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        return f"{self.op}-{self.variable}-{self.dtype}"


@dataclass(frozen=True)
class Example:
    """A node, arrays for its operands, and for what its regions read besides."""

    node: onnx.NodeProto
    operands: tuple[np.ndarray, ...]
    captured: dict[str, np.ndarray] = field(default_factory=dict)


@functools.cache
def schemas() -> dict[str, Any]:
    """The newest schema of every operator of the default domain."""
    found: dict[str, Any] = {}
    for schema in defs.get_all_schemas_with_history():
        if schema.domain == "" and (
            schema.name not in found or found[schema.name].since_version < schema.since_version
        ):
            found[schema.name] = schema
    return {name: schema for name, schema in sorted(found.items()) if not schema.deprecated}


def _body(kind: str) -> onnx.GraphProto:
    """A region that passes on what it is given: of If nothing, of Loop an iteration and a condition besides."""
    tensor, boolean, number = (onnx.TypeProto() for _ in range(3))
    boolean.tensor_type.elem_type, number.tensor_type.elem_type = TensorProto.BOOL, TensorProto.INT64
    names = {"If": ["x"], "Loop": ["i", "go", "x"], "Scan": ["x", "row"]}[kind]
    types = {"i": number, "go": boolean}
    given = [helper.make_value_info(f"{n}.in", types.get(n, tensor)) for n in names] if kind != "If" else []
    made = [n for n in names if n != "i"]
    nodes = [helper.make_node("Identity", ["x" if kind == "If" else f"{n}.in"], [f"{n}.out"]) for n in made]
    return helper.make_graph(
        nodes, kind, given, [helper.make_value_info(f"{n}.out", types.get(n, tensor)) for n in made]
    )


def _made() -> dict[str, Example]:
    """Examples of operators of which ONNX has no case of one node, or none with numbers that it is sure of."""
    x = np.arange(-4, 8, dtype=np.float32).reshape(3, 4)
    axis, one = np.array(1, np.int64), np.array([1], np.float32)
    image = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
    bytes_ = image.astype(np.uint8)
    regions = {"then_branch": _body("If"), "else_branch": _body("If")}
    return {
        "If": Example(helper.make_node("If", ["go"], ["y"], **regions), (np.array(True),), {"x": x}),
        "Loop": Example(helper.make_node("Loop", ["n", "", "x"], ["y"], body=_body("Loop")), (np.array(2), x)),
        "Scan": Example(
            helper.make_node("Scan", ["x", "rows"], ["y", "all"], body=_body("Scan"), num_scan_inputs=1), (x[0], x)
        ),
        "CumSum": Example(helper.make_node("CumSum", ["x", "axis"], ["y"]), (x, axis)),
        "CumProd": Example(helper.make_node("CumProd", ["x", "axis"], ["y"]), (x, axis)),
        "OneHot": Example(
            helper.make_node("OneHot", ["i", "depth", "values"], ["y"]), (x[2], np.array(6.0, np.float32), x[0, :2])
        ),
        "GlobalLpPool": Example(helper.make_node("GlobalLpPool", ["x"], ["y"]), (image,)),
        "ConvInteger": Example(helper.make_node("ConvInteger", ["x", "w"], ["y"]), (bytes_, bytes_[..., :2])),
        "QLinearConv": Example(
            helper.make_node("QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"]),
            (
                bytes_,
                one[0],
                bytes_[0, 0, 0, 1],
                bytes_[..., :2],
                one[0],
                bytes_[0, 0, 0, 0],
                one[0] * 8,
                bytes_[0, 0, 0, 2],
            ),
        ),
        "DynamicQuantizeLinear": Example(helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"]), (x,)),
        "MaxRoiPool": Example(
            helper.make_node("MaxRoiPool", ["x", "rois"], ["y"], pooled_shape=[2, 2]),
            (image, np.array([[0, 0, 0, 3, 3]], np.float32)),
        ),
        "MelWeightMatrix": Example(
            helper.make_node("MelWeightMatrix", ["a", "b", "c", "d", "e"], ["y"]),
            (np.array(8), np.array(16), np.array(8000), np.array(0.0, np.float32), np.array(4000.0, np.float32)),
        ),
        "Dropout": Example(helper.make_node("Dropout", ["x", "ratio"], ["y"]), (x, one[0])),
        **{w: Example(helper.make_node(w, ["n"], ["y"]), (np.array(7),)) for w in WINDOWS},
        **{f"Random{k}Like": Example(helper.make_node(f"Random{k}Like", ["x"], ["y"]), (x,)) for k in RANDOM},
        **{f"Random{k}": Example(helper.make_node(f"Random{k}", [], ["y"], shape=[3]), ()) for k in RANDOM},
        "Multinomial": Example(helper.make_node("Multinomial", ["x"], ["y"], sample_size=3), (x,)),
    }


@functools.cache
def examples() -> dict[str, Example]:
    """For each operator the least of ONNX's cases that is one node of it, over tensors alone; else ours."""
    found: dict[str, Any] = {}
    for case in cases().values():
        if case.kind != "node":
            continue
        model = model_of(case)
        nodes = model.graph.node
        arrays = [a for pair in data_sets(case) for side in pair for a in side]
        if len(nodes) != 1 or nodes[0].domain or not all(isinstance(a, np.ndarray) for a in arrays):
            continue
        if any(a.dtype.kind in "OUS" for a in arrays):
            continue
        opset = next(item.version for item in model.opset_import if not item.domain)
        if nodes[0].op_type not in schemas() or opset < schemas()[nodes[0].op_type].since_version:
            continue
        size = sum(a.size for a in arrays) + len(arrays)
        if nodes[0].op_type not in found or size < found[nodes[0].op_type][0]:
            found[nodes[0].op_type] = size, case
    theirs = {
        op: Example(model_of(case).graph.node[0], tuple(next(data_sets(case))[0])) for op, (_, case) in found.items()
    }
    return dict(sorted((theirs | _made()).items()))


def admitted(op: str) -> Iterator[tuple[str, DType]]:
    """The type variables of an operator and the element types that each may be, text excepted."""
    for constraint in schemas()[op].type_constraints:
        for text in constraint.allowed_type_strs:
            found = re.fullmatch(r"tensor\((\w+)\)", text)
            if found and found[1] != "string":
                yield constraint.type_param_str, TYPES[found[1]]


def formals(declared: Sequence[Any], count: int) -> list[Any]:
    """The formal parameter of each of `count` operands or results; the last may stand for several."""
    return [declared[min(position, len(declared) - 1)] for position in range(count)]


def of_type(array: np.ndarray, dtype: DType) -> np.ndarray:
    """The array with its elements made ones of another type: small whole numbers, most of them."""
    with np.errstate(all="ignore"):
        if dtype.kind == "bool":
            return np.asarray(array.astype(np.float64) > 0)
        if dtype.name == "f8e8m0":  # it has no sign
            return (2.0 ** (np.arange(array.size).reshape(array.shape) % 5 - 2)).astype(dtype.numpy)
        if dtype.is_integer or dtype.is_narrow:
            low, high = (max(-9, dtype.limits[0]), min(9, dtype.limits[1]))
            array = np.clip(np.nan_to_num(np.rint(array.astype(np.float64))), low, high)
        if dtype.kind == "complex" and array.dtype.kind != "c":
            return np.asarray(array.astype(np.float64) * (1 - 0.5j)).astype(dtype.numpy)
        return array.astype(dtype.numpy)


def typed(op: str, variable: str, dtype: DType) -> Typed | None:
    """ONNX's example of an operator with one of its type variables changed; None where there is no example."""
    example = examples().get(op)
    if example is None:
        return None
    node = onnx.NodeProto()
    node.CopyFrom(example.node)
    schema = schemas()[op]
    given = [name for name in node.input if name]
    inputs = dict(zip(given, example.operands, strict=True)) | example.captured
    read = False
    for name, formal in zip(node.input, formals(schema.inputs, len(node.input)), strict=True):
        if name and formal.type_str == variable:
            array = inputs[name] * 0 if dtype.is_narrow and formal.name.endswith("zero_point") else inputs[name]
            inputs[name], read = of_type(array, dtype), True
    if example.captured and variable == "V":
        inputs, read = inputs | {name: of_type(array, dtype) for name, array in example.captured.items()}, True
    if op == "BitCast":  # of another type of the same width
        partner = next(
            t for t in reversed(BY_ONNX.values()) if t.bits == dtype.bits and (t != dtype or t.bits in (6, 128))
        )
        inputs[node.input[0]] = of_type(inputs[node.input[0]], dtype if read else partner)
        node.attribute[0].i = partner.onnx if read else dtype.onnx
        read = True
    attributes = {attribute.name: attribute for attribute in node.attribute}
    produced = variable in [f.type_str for f in formals(schema.outputs, len(node.output))]
    if not read:
        which = [name for name in DTYPE_ATTRIBUTES if name in schema.attributes]
        if which and produced:
            if which[0] in attributes:
                node.attribute.remove(attributes[which[0]])
            node.attribute.append(helper.make_attribute(which[0], dtype.onnx))
        elif op == "ConstantOfShape":
            value = onnx.numpy_helper.from_array(of_type(np.array([2]), dtype), "value")
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", value))
        elif op == "Constant":
            value = onnx.numpy_helper.from_array(of_type(np.arange(6), dtype), "value")
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", value))
        else:
            return None
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in inputs.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    graph = helper.make_graph([node], "typed", values, outputs)
    opset = [helper.make_opsetid("", defs.onnx_opset_version())]
    return Typed(op, variable, dtype, helper.make_model(graph, opset_imports=opset, ir_version=14), inputs)
