"""Graph -> ONNX: for evaluation by `onnx.reference`, for checks against other engines, and for the user."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto, numpy_helper

from .dims import Opaque, Sum, atoms
from .dtypes import DType
from .errors import UnsupportedError
from .graph import Attribute, Constant, Graph, Node, OptionalType, SequenceType, TensorType, Type, Value

IR_VERSION = 10
"""The IR version written at least; opsets above 22 ask for a later one."""

LEAST_OPSET = 21
"""The oldest opset written: no operator changed its meaning since."""


def split_operator(op: str) -> tuple[str, str]:
    """(domain, name) of an operator as nodes spell it; the domain of ONNX's own operators is empty."""
    domain, _, name = op.rpartition(".")
    return domain, name


def schema_of(op: str) -> onnx.defs.OpSchema | None:
    """The newest schema that the onnx package has for an operator as nodes spell it."""
    domain, name = split_operator(op)
    return onnx.defs.get_schema(name, domain=domain) if onnx.defs.has(name, domain=domain) else None


def type_to_onnx(type: Type) -> TypeProto:
    """The same type; a dimension that is no number is named by its expression."""
    proto = TypeProto()
    if isinstance(type, SequenceType):
        proto.sequence_type.elem_type.CopyFrom(type_to_onnx(type.element))
    elif isinstance(type, OptionalType):
        proto.optional_type.elem_type.CopyFrom(type_to_onnx(type.element))
    else:
        proto.tensor_type.elem_type = type.dtype.onnx
        proto.tensor_type.shape.SetInParent()
        for dim in type.shape:
            entry = proto.tensor_type.shape.dim.add()
            if isinstance(dim, int):
                entry.dim_value = dim
            elif not any(isinstance(atom, Opaque) for atom in atoms(dim)):
                entry.dim_param = str(dim)
    return proto


def value_to_onnx(value: Value) -> ValueInfoProto:
    """A declaration of a graph's input or output."""
    return ValueInfoProto(name=value.name, type=type_to_onnx(value.type))


def constant_to_onnx(constant: Constant) -> onnx.TensorProto:
    """A tensor with a copy of the handle's bytes."""
    return numpy_helper.from_array(np.asarray(constant.array), constant.name)


def _attribute_to_onnx(node: Node, name: str, value: Attribute) -> AttributeProto:
    kinds = AttributeProto
    schema = schema_of(node.op)
    declared = schema.attributes.get(name) if schema is not None else None
    kind = int(declared.type.value) if declared is not None else None  # type: ignore[attr-defined]
    if isinstance(value, Constant):
        return onnx.helper.make_attribute(name, constant_to_onnx(value))
    if isinstance(value, TensorType | SequenceType | OptionalType):
        return onnx.helper.make_attribute(name, type_to_onnx(value))
    parts = value if isinstance(value, tuple) else (value,)
    plain: list[int | float | str | bytes] = []
    for part in parts:
        if isinstance(part, DType):
            plain.append(part.onnx)
        elif isinstance(part, int | float | str | bytes | np.integer | np.floating):
            plain.append(int(part) if isinstance(part, bool | np.integer) else part)
        else:
            what = "the symbolic dimension" if isinstance(part, Sum) else f"the {type(part).__name__}"
            raise UnsupportedError(f"{node.where}: ONNX cannot hold {what} {part} of attribute {name}")
    if kind in (kinds.FLOAT, kinds.FLOATS):
        plain = [float(part) for part in plain]
    if isinstance(value, tuple):
        return onnx.helper.make_attribute(name, plain, attr_type=None if plain else kind or kinds.INTS)
    return onnx.helper.make_attribute(name, plain[0])


def node_to_onnx(node: Node) -> list[NodeProto]:
    """The node in ONNX; a group of the compiler's own becomes the nodes of its body.

    Raises UnsupportedError for an operator of the compiler's own without a body, and for a symbolic attribute.
    """
    domain, name = split_operator(node.op)
    body = node.regions.get("body")
    if schema_of(node.op) is None and (not domain or domain == "onnxc"):
        if body is None:
            raise UnsupportedError(f"{node.where}: the operator has neither a meaning in ONNX nor a body")
        inlined = body.with_captures(dict(zip(body.inputs, node.operands, strict=True)))
        return [
            *nodes_to_onnx(inlined.nodes),
            *(
                NodeProto(op_type="Identity", input=[inner.name], output=[outer.name])
                for inner, outer in zip(inlined.outputs, node.outputs, strict=True)
            ),
        ]
    proto = NodeProto(op_type=name, domain=domain, name=node.origin[0] if node.origin else "")
    proto.input.extend("" if value is None else value.name for value in node.inputs)
    proto.output.extend(value.name for value in node.outputs)
    proto.attribute.extend(_attribute_to_onnx(node, key, value) for key, value in node.attributes.items())
    for key, region in node.regions.items():
        proto.attribute.append(onnx.helper.make_attribute(key, graph_to_onnx(region)))
    return [proto]


def nodes_to_onnx(nodes: Iterable[Node]) -> list[NodeProto]:
    """The nodes in ONNX, in order."""
    return [proto for node in nodes for proto in node_to_onnx(node)]


def graph_to_onnx(graph: Graph) -> GraphProto:
    """The graph, or a region; an output that is defined outside or listed before goes through an Identity."""
    proto = GraphProto(name=graph.name or "graph")
    proto.node.extend(nodes_to_onnx(graph.nodes))
    proto.input.extend(map(value_to_onnx, graph.inputs))
    own = {value.name for node in graph.nodes for value in node.outputs} | {value.name for value in graph.inputs}
    for position, value in enumerate(graph.outputs):
        name = value.name
        if name not in own:
            name = f"{graph.name}.{value.name}.out{position}"
            proto.node.add(op_type="Identity", input=[value.name], output=[name])
        own.discard(name)
        proto.output.append(value_to_onnx(Value(name, value.type)))
    return proto


def type_name(type: Type) -> str:
    """The type as ONNX's schemas spell it, without the shape."""
    if isinstance(type, TensorType):
        return f"tensor({onnx.TensorProto.DataType.Name(type.dtype.onnx).lower()})"
    return f"{'seq' if isinstance(type, SequenceType) else 'optional'}({type_name(type.element)})"


def _serves(older: onnx.defs.OpSchema, newest: onnx.defs.OpSchema, node: Node) -> bool:
    """Whether the node is written alike in an older version of its operator."""
    if older.deprecated or len(node.inputs) > older.max_input or len(node.outputs) > older.max_output:
        return False
    if not set(node.attributes) <= set(older.attributes) <= set(newest.attributes):
        return False
    if any(a.default_value != newest.attributes[name].default_value for name, a in older.attributes.items()):
        return False
    for values, parts in ((node.inputs, older.inputs), (node.outputs, older.outputs)):
        for position, value in enumerate(values):
            part = parts[min(position, len(parts) - 1)]
            if value is not None and type_name(value.type) not in part.types:
                return False
    return [part.name for part in older.inputs] == [part.name for part in newest.inputs[: len(older.inputs)]]


def _opset_of(node: Node) -> int:
    """The least opset in which the node has its newest meaning.

    From LEAST_OPSET on operators were only extended, by element types, inputs and attributes, so that an older version
    serves where it has what the node uses.
    """
    newest = schema_of(node.op)
    if newest is None:
        return 1
    domain, name = split_operator(node.op)
    schema = newest
    while not domain and schema.since_version > LEAST_OPSET and onnx.defs.has(name, schema.since_version - 1):
        older = onnx.defs.get_schema(name, schema.since_version - 1)
        if not _serves(older, newest, node):
            break
        schema = older
    return schema.since_version


def _drop_repeated_names(graph: GraphProto, seen: set[str]) -> None:
    """Leaves a node's name to the first that has it: several nodes may come from one, and engines refuse twins."""
    for node in graph.node:
        if node.name in seen:
            node.name = ""
        seen.add(node.name)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _drop_repeated_names(attribute.g, seen)


def to_onnx(graph: Graph) -> ModelProto:
    """A model with the meaning of `graph`, constants included.

    Its opset is the least in which every operator used has its newest meaning, so that engines behind the newest opset
    can run it. Raises UnsupportedError as `node_to_onnx` does.
    """
    opsets = {"": LEAST_OPSET}
    for node in graph.walk():
        domain = split_operator(node.op)[0]
        opsets[domain] = max(opsets.get(domain, 1), _opset_of(node))
    proto = onnx.helper.make_model(graph_to_onnx(graph), producer_name="onnxc")
    _drop_repeated_names(proto.graph, set())
    del proto.opset_import[:]
    for domain, version in opsets.items():
        if domain != "onnxc":
            proto.opset_import.add(domain=domain, version=version)
    known = [opset for opset in proto.opset_import if opset.domain in ("", "ai.onnx.ml")]
    proto.ir_version = max(IR_VERSION, onnx.helper.find_min_ir_version_for(known))
    return proto
