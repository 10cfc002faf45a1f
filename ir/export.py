"""Graph -> ONNX: for evaluation by `onnx.reference`, for checks against other engines, and for the user."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto, numpy_helper

from .dims import Opaque, Sum, atoms
from .dtypes import F32, I64, DType
from .errors import UnsupportedError
from .export_sizes import Sizes
from .export_trees import trees_to_onnx
from .export_weights import packed_product_to_onnx, unpacked_to_onnx
from .graph import Attribute, Constant, Graph, Node, OptionalType, SequenceType, TensorType, Type, Value
from .ops import REGISTRY
from .ops.attention import ZERO
from .ops.declare import CHANNELS_LAST

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


def with_static_operands(node: Node) -> tuple[Node, dict[Value, tuple[Attribute, ...]]]:
    """The node with operands where it has attributes that only onnxc knows, and the content of those operands."""
    operator = REGISTRY.get(node.op)
    if operator is None or not operator.static:
        return node, {}
    inputs, attributes = list(node.inputs), dict(node.attributes)
    contents: dict[Value, tuple[Attribute, ...]] = {}
    for position, parameter in enumerate(operator.parameters):
        elements = attributes.pop(parameter.name, None) if parameter.name in operator.static else None
        if elements is None:
            continue
        assert isinstance(elements, tuple)
        is_float = any(isinstance(element, float) for element in elements)
        dtype = attributes.get("dtype") if node.op == "Range" else F32 if is_float else I64
        assert isinstance(dtype, DType)
        rank = 0 if node.op in SCALAR_OPERANDS else 1
        value = Value(f"{node.outputs[0].name}~{parameter.name}", TensorType(dtype, (len(elements),) * rank))
        inputs += [None] * (position + 1 - len(inputs))
        inputs[position], contents[value] = value, elements
    if node.op == "Range" and contents:
        del attributes["dtype"]
    if node.op == "Reshape" and any(isinstance(element, Sum) for dims in contents.values() for element in dims):
        attributes["allowzero"] = 1  # a size that is 0 at run time is that, not a copy of the operand's
    return replace(node, inputs=tuple(inputs), attributes=attributes), contents


SCALAR_OPERANDS = frozenset(
    ("Trilu", "CumSum", "CumProd", "DFT", "STFT", "MelWeightMatrix", "Range", "OneHot", "Dropout")
)
"""Operators whose static operands ONNX wants as scalars, not as vectors."""


def node_to_onnx(node: Node, sizes: Sizes | None = None) -> list[NodeProto]:
    """The node in ONNX; a group of the compiler's own becomes the nodes of its body.

    Attributes that stand for operands become operands again; `sizes` writes symbolic ones, and knows the values that
    are there. Raises UnsupportedError for an operator of the compiler's own without a body, and for symbolic sizes
    that no value has.
    """
    sizes = sizes or Sizes()
    domain, name = split_operator(node.op)
    body = node.regions.get("body")
    if node.op == "Dims":
        return _dims_to_onnx(node, sizes)
    if "result" in node.attributes:
        return _widened_to_onnx(node, sizes)
    if node.op == "onnxc.TreeEnsemble":
        return trees_to_onnx(node, sizes)
    if node.op == "onnxc.PackedMatMul":
        return packed_product_to_onnx(node, sizes)
    if node.op == "onnxc.UnpackBits":
        return unpacked_to_onnx(node, sizes)
    if node.op == "onnxc.Attention":
        return _attention_to_onnx(node, sizes)
    if schema_of(node.op) is None and (not domain or domain == "onnxc"):
        if body is None:
            raise UnsupportedError(f"{node.where}: the operator has neither a meaning in ONNX nor a body")
        # A body with inputs is given the operands; one without takes them from outside by name.
        names = sizes.apart(value for inner in body.nodes for value in inner.outputs)
        inlined = body.with_captures({**names, **dict(zip(body.inputs, node.operands, strict=bool(body.inputs)))})
        nodes = (replace(n, outputs=tuple(names.get(v, v) for v in n.outputs)) for n in inlined.nodes)
        return [
            *nodes_to_onnx(nodes, sizes),
            *(
                NodeProto(op_type="Identity", input=[inner.name], output=[outer.name])
                for inner, outer in zip(inlined.outputs, node.outputs, strict=True)
            ),
        ]
    if node.attributes.get("layout") == CHANNELS_LAST:
        return _channels_last_to_onnx(node, sizes)
    node, contents = with_static_operands(node)
    for value, elements in contents.items():
        _write_static(value, elements, sizes)
    proto = NodeProto(op_type=name, domain=domain, name=node.origin[0] if node.origin else "")
    proto.input.extend("" if value is None else value.name for value in node.inputs)
    proto.output.extend(value.name for value in node.outputs)
    proto.attribute.extend(_attribute_to_onnx(node, key, value) for key, value in node.attributes.items())
    for key, region in node.regions.items():
        proto.attribute.append(onnx.helper.make_attribute(key, graph_to_onnx(region, sizes)))
    return [*sizes.take(), proto]


def _channels_last_to_onnx(node: Node, sizes: Sizes) -> list[NodeProto]:
    """The operator on channels-first images, between transposes."""
    (image, *others), plain = node.inputs, dict(node.attributes)
    assert image is not None
    del plain["layout"]
    rank = image.tensor.rank
    to_first, to_last = [0, rank - 1, *range(1, rank - 1)], [0, *range(2, rank), 1]

    def first(value: Value, name: str) -> Value:
        return Value(name, TensorType(value.dtype, tuple(value.shape[axis] for axis in to_first)))

    source = first(image, f"{node.outputs[0].name}~image")
    results = tuple(first(value, f"{value.name}~first") for value in node.outputs)
    inner = replace(node, inputs=(source, *others), outputs=results, attributes=plain)
    before = onnx.helper.make_node("Transpose", [image.name], [source.name], perm=to_first)
    after = [
        onnx.helper.make_node("Transpose", [result.name], [value.name], perm=to_last)
        for result, value in zip(results, node.outputs, strict=True)
    ]
    return [before, *node_to_onnx(inner, sizes), *after]


def _attention_to_onnx(node: Node, sizes: Sizes) -> list[NodeProto]:
    """Two products with a softmax between them, and what the region does to the scores."""
    names = iter(f"{node.output.name}~weights{number}" for number in range(4))
    query, key, value = node.operands[:3]
    region = node.regions["scores"]
    (products,), (scores,) = region.inputs, region.outputs
    make, weights = onnx.helper.make_node, next(names)
    protos = [make("MatMul", [query.name, key.name], [products.name]), *nodes_to_onnx(region.nodes, sizes)]
    protos.append(make("Softmax", [scores.name], [weights], axis=-1))
    if scores.dtype != value.dtype:
        protos.append(make("Cast", [weights], [weights := next(names)], to=value.dtype.onnx))
    if node.attributes.get("empty_rows") == ZERO:
        empty, zero = f"{node.output.name}~empty", f"{node.output.name}~zero"
        sizes.constant(np.zeros((), value.dtype.numpy), zero)
        protos += [*sizes.take(), make("IsNaN", [weights], [empty])]
        protos.append(make("Where", [empty, zero, weights], [weights := next(names)]))
    return [*protos, make("MatMul", [weights, value.name], [node.output.name])]


def _widened_to_onnx(node: Node, sizes: Sizes) -> list[NodeProto]:
    """An operator whose result is wider than the operands that it multiplies: on these operands converted, and what is
    no wider converted back."""
    plain = dict(node.attributes)
    dtype = plain.pop("result")
    assert isinstance(dtype, DType)
    inputs, casts = list(node.inputs), []
    for position in REGISTRY[node.op].positions(REGISTRY[node.op].products, len(inputs)):
        value = inputs[position]
        if value is not None and value.dtype != dtype:
            wide = Value(f"{node.outputs[0].name}~operand{position}", TensorType(dtype, value.shape))
            casts.append(onnx.helper.make_node("Cast", [value.name], [wide.name], to=dtype.onnx))
            inputs[position] = wide
    outputs, back = list(node.outputs), []
    for position, value in enumerate(outputs):
        if value.dtype != dtype:
            outputs[position] = Value(f"{value.name}~wide", TensorType(dtype, value.shape))
            back.append(onnx.helper.make_node("Cast", [f"{value.name}~wide"], [value.name], to=value.dtype.onnx))
    node = replace(node, inputs=tuple(inputs), outputs=tuple(outputs), attributes=plain)
    return [*casts, *node_to_onnx(node, sizes), *back]


def static_array(value: Value, elements: tuple[Attribute, ...]) -> np.ndarray:
    """The content of an operand of `with_static_operands`; TypeError where it is symbolic."""
    shape = [extent for extent in value.shape if isinstance(extent, int)]
    return np.array(elements, value.dtype.numpy).reshape(shape)


def _write_static(value: Value, elements: tuple[Attribute, ...], sizes: Sizes) -> None:
    if not any(isinstance(element, Sum) for element in elements):
        sizes.constant(static_array(value, elements), value.name)
        return
    parts = []
    for number, element in enumerate(elements):
        if isinstance(element, int | Sum):
            parts.append(sizes.scalar(element))
        else:
            parts.append(sizes.constant(np.array([element], value.dtype.numpy), f"{value.name}~{number}"))
    sizes.join(parts, value.name, value.dtype.onnx, value.tensor.rank)


def _dims_to_onnx(node: Node, sizes: Sizes) -> list[NodeProto]:
    values, shape = node.attributes["values"], node.attributes["shape"]
    assert isinstance(values, tuple) and isinstance(shape, tuple)
    flat = f"{node.output.name}~values"
    sizes.vector([value for value in values if isinstance(value, int | Sum)], flat)
    sizes.vector([extent for extent in shape if isinstance(extent, int | Sum)], f"{node.output.name}~shape")
    reshape = NodeProto(op_type="Reshape", input=[flat, f"{node.output.name}~shape"], output=[node.output.name])
    return [*sizes.take(), reshape]


def nodes_to_onnx(nodes: Iterable[Node], sizes: Sizes | None = None) -> list[NodeProto]:
    """The nodes in ONNX, in order."""
    sizes = sizes or Sizes()
    protos = []
    for node in nodes:
        protos += node_to_onnx(node, sizes)
        sizes.declare(node.outputs)
    return protos


def graph_to_onnx(graph: Graph, outer: Sizes | None = None) -> GraphProto:
    """The graph, or a region; an output that is defined outside or listed before goes through an Identity."""
    proto = GraphProto(name=graph.name or "graph")
    sizes = Sizes(outer)
    sizes.declare(graph.inputs)
    proto.node.extend(nodes_to_onnx(graph.nodes, sizes))
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
        plain = {name: value for name, value in node.attributes.items() if value != CHANNELS_LAST}
        plain_node = with_static_operands(replace(node, attributes=plain))[0]
        opsets[domain] = max(opsets.get(domain, 1), _opset_of(plain_node))
    proto = onnx.helper.make_model(graph_to_onnx(graph), producer_name="onnxc")
    _drop_repeated_names(proto.graph, set())
    del proto.opset_import[:]
    for domain, version in opsets.items():
        if domain != "onnxc":
            proto.opset_import.add(domain=domain, version=version)
    known = [opset for opset in proto.opset_import if opset.domain in ("", "ai.onnx.ml")]
    proto.ir_version = max(IR_VERSION, onnx.helper.find_min_ir_version_for(known))
    return proto
