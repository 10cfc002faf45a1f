"""What ONNX's nodes say: schema, attributes and captured names, checked before anything is built of them."""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto
from onnx.defs import OpSchema

from ..ir.dtypes import BY_ONNX
from ..ir.errors import ModelError, UnsupportedError
from ..ir.export import schema_of, type_name
from ..ir.graph import Attribute, Constant
from .calls import Call
from .dimensions import Symbols, type_of
from .functions import domain_of
from .weights import Weights

_ELEMENT_TYPES = ("to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision", "precision")
"""Attributes of ONNX's own operators whose number stands for an element type."""

_FIELDS: Mapping[int, str] = {
    AttributeProto.FLOAT: "f", AttributeProto.INT: "i", AttributeProto.STRING: "s", AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g", AttributeProto.SPARSE_TENSOR: "sparse_tensor", AttributeProto.TYPE_PROTO: "tp",
    AttributeProto.FLOATS: "floats", AttributeProto.INTS: "ints", AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors",
}  # fmt: skip


WITHOUT_OPSET = {("LayerNormalization", ""): 17, ("ThresholdedRelu", ""): 10}
"""Operators with the opset of their first form, which ONNX Runtime knows (and may write) whatever the model imports."""


def operator_name(node: NodeProto) -> str:
    """The operator as the graph language spells it, its domain in front."""
    domain = domain_of(node.domain)
    return f"{domain}.{node.op_type}" if domain else node.op_type


def node_name(node: NodeProto, index: int) -> str:
    """The node's name, or operator and place where it has none."""
    return node.name or f"{node.op_type}_{index}"


def schema_in(node: NodeProto, opsets: Mapping[str, int]) -> OpSchema | None:
    """The operator's schema in the opset that the model imports; None for an operator that ONNX does not define.

    Raises ModelError where the model does not import the domain, UnsupportedError where the operator is younger.
    """
    domain, name = domain_of(node.domain), node.op_type
    if not onnx.defs.has(name, domain=domain):
        return None
    if domain not in opsets:
        raise ModelError(f'the model imports no opset of the domain "{domain or "ai.onnx"}"; export it again')
    if (name, domain) in WITHOUT_OPSET:
        return onnx.defs.get_schema(name, max(opsets[domain], WITHOUT_OPSET[name, domain]), domain)
    if not onnx.defs.has(name, opsets[domain], domain):
        since = min(
            s.since_version for s in onnx.defs.get_all_schemas_with_history() if (s.name, s.domain) == (name, domain)
        )
        raise ModelError(
            f"the operator is of opset {since}, but the model imports opset {opsets[domain]}; export it again"
        )
    return onnx.defs.get_schema(name, opsets[domain], domain)


def kind_of(attribute: AttributeProto) -> int:
    """The attribute's type; files of the first IR version do not say it."""
    if attribute.type != AttributeProto.UNDEFINED:
        return attribute.type
    present = {descriptor.name for descriptor, _ in attribute.ListFields()}
    return next((kind for kind, field in _FIELDS.items() if field in present), AttributeProto.INTS)


def check_node(node: NodeProto, attributes: Iterable[AttributeProto], schema: OpSchema) -> None:
    """Raises ModelError where counts or attributes contradict the operator's schema."""
    for what, count, least, most in (
        ("operands", len(node.input), schema.min_input, schema.max_input),
        ("outputs", len(node.output), schema.min_output, schema.max_output),
    ):
        if not least <= count <= most:
            expected = str(least) if least == most else f"{least} to {most}" if most < 1 << 20 else f"at least {least}"
            raise ModelError(f"it has {count} {what}, the operator takes {expected}")
    given = {attribute.name: attribute for attribute in attributes}
    for name, attribute in given.items():
        declared = schema.attributes.get(name)
        if declared is None:
            known = ", ".join(schema.attributes) or "none"
            raise ModelError(
                f'it has the attribute "{name}", which opset {schema.since_version} does not know; known: {known}'
            )
        if kind_of(attribute) != declared.type.value:  # type: ignore[attr-defined]
            found = AttributeProto.AttributeType.Name(kind_of(attribute))
            raise ModelError(f'its attribute "{name}" is of type {found}, not {declared.type.name}')  # type: ignore[attr-defined]
    for name, declared in schema.attributes.items():
        if declared.required and name not in given:
            raise ModelError(f'it lacks the attribute "{name}"')


def check_call(call: Call) -> None:
    """Raises ModelError where operand types contradict the newest schema, or each other, UnsupportedError for what is
    left of an older form."""
    schema = schema_of(call.op)
    if schema is None:
        return
    left = [name for name in call.attributes if name not in schema.attributes]
    if left or len(call.inputs) > schema.max_input:
        what = f'attribute "{left[0]}"' if left else f"{len(call.inputs)} operands"
        raise UnsupportedError(f"its {what} has no meaning any more; export the model with opset 13 or newer")
    bound: dict[str, str] = {}
    for position, value in enumerate(call.inputs):
        if value is None:
            continue
        part = schema.inputs[min(position, len(schema.inputs) - 1)]
        name = type_name(value.type)
        if name not in part.types:
            raise ModelError(
                f'operand {position} ("{part.name}") is a {name}; {call.op} takes {", ".join(sorted(part.types))}'
            )
        if part.is_homogeneous and "(" not in part.type_str and bound.setdefault(part.type_str, name) != name:
            raise ModelError(
                f'operand {position} ("{part.name}") is a {name}, where another operand is a {bound[part.type_str]}'
            )


def read_attribute(attribute: AttributeProto, handle: str, weights: Weights, symbols: Symbols) -> Attribute | None:
    """An attribute's value in plain Python; tensors become handles named `handle`. None where it says nothing."""
    kind = kind_of(attribute)
    if kind == AttributeProto.FLOAT:
        return attribute.f
    if kind == AttributeProto.INT:
        return attribute.i
    if kind == AttributeProto.STRING:
        return _text(attribute.s)
    if kind == AttributeProto.FLOATS:
        return tuple(attribute.floats)
    if kind == AttributeProto.INTS:
        return tuple(attribute.ints)
    if kind == AttributeProto.STRINGS:
        return tuple(_text(text) for text in attribute.strings)
    if kind == AttributeProto.TENSOR:
        return Constant(handle, weights.array(attribute.t))
    if kind == AttributeProto.SPARSE_TENSOR:
        return Constant(handle, weights.dense(attribute.sparse_tensor))
    if kind == AttributeProto.TENSORS:
        return tuple(Constant(f"{handle}.{i}", weights.array(t)) for i, t in enumerate(attribute.tensors))
    if kind == AttributeProto.TYPE_PROTO:
        type = type_of(attribute.tp, attribute.name, lambda dim, axis: symbols.fresh(f"{handle}_{axis}"))
        return cast(Attribute, type)
    raise UnsupportedError(f'its attribute "{attribute.name}" is of a kind that is not supported')


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def element_type(node: NodeProto, name: str, value: Attribute) -> Attribute | None:
    """The attribute's value, as an element type where its number stands for one; None for the number that says none."""
    if (
        not isinstance(value, int)
        or name not in _ELEMENT_TYPES
        or domain_of(node.domain) not in ("", "ai.onnx.preview")
    ):
        return value
    if value and value not in BY_ONNX:
        raise ModelError(f'its attribute "{name}" is {value}, which is no element type')
    return BY_ONNX.get(value)


def constant_array(attributes: Mapping[str, Attribute]) -> np.ndarray:
    """The array of a Constant node, whichever way it is spelt."""
    if len(attributes) != 1:
        raise ModelError(f"a Constant needs one value, found {', '.join(attributes) or 'none'}")
    ((name, value),) = attributes.items()
    if isinstance(value, Constant):
        return value.array
    if name in ("value_string", "value_strings"):
        array = np.empty(len(value) if isinstance(value, tuple) else (), np.object_)
        array[...] = value
        return array
    return np.array(value, np.float32 if name.startswith("value_float") else np.int64)


def names_read(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """Every name that the nodes or the graphs in them read."""
    for node in nodes:
        yield from _operands(node)
        for graph in graphs_in(node):
            yield from (value.name for value in graph.output)
            yield from names_read(graph.node)


def _operands(node: NodeProto) -> Iterator[str]:
    """What a node reads itself: its operands, and the tensors between which a Gradient differentiates."""
    yield from node.input
    if node.op_type == "Gradient" and node.domain:
        yield from (
            text.decode() for a in node.attribute if a.name in ("xs", "zs", "y") for text in (*a.strings, a.s) if text
        )


def graphs_in(node: NodeProto) -> list[GraphProto]:
    """The graphs among a node's attributes."""
    return [a.g for a in node.attribute if kind_of(a) == AttributeProto.GRAPH]


def free_names(node: NodeProto) -> set[str]:
    """The names that a node needs from the graph that it is in, those for its own graphs included."""
    names = set(_operands(node))
    for graph in graphs_in(node):
        inner = set().union(*map(free_names, graph.node)) | {value.name for value in graph.output}
        inner -= {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        names |= inner.difference(*(other.output for other in graph.node))
    return names - {""}


def in_order(nodes: Sequence[NodeProto]) -> Iterable[tuple[int, NodeProto]]:
    """The nodes with their places, each behind those that it reads. Raises ModelError where they form a cycle."""
    definer: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in filter(None, node.output):
            if name in definer:
                first = node_name(nodes[definer[name]], definer[name])
                raise ModelError(f'"{name}" is defined by two nodes, "{first}" and "{node_name(node, index)}"')
            definer[name] = index
    needs = [{definer[name] for name in free_names(node) if name in definer} for node in nodes]
    if all(need < index for index, found in enumerate(needs) for need in found):
        return enumerate(nodes)
    try:
        order = graphlib.TopologicalSorter(dict(enumerate(needs))).static_order()
        return [(index, nodes[index]) for index in order]
    except graphlib.CycleError as error:
        path = " -> ".join(f'"{node_name(nodes[index], index)}"' for index in reversed(error.args[1]))
        raise ModelError(f"nodes form a cycle: {path}; the model cannot be computed, export it again") from error


def declared_types(graph: GraphProto) -> dict[str, int]:
    """The element types that a graph declares, by name."""
    values = [*graph.value_info, *graph.input, *graph.output]
    return {value.name: value.type.tensor_type.elem_type for value in values if value.type.HasField("tensor_type")}


def all_names(graph: GraphProto) -> Iterator[str]:
    """Every name that a graph or one inside it defines."""
    yield from (value.name for value in (*graph.input, *graph.output))
    yield from (tensor.name for tensor in graph.initializer)
    for node in graph.node:
        yield from node.output
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_names(attribute.g)


def name_of(graph: GraphProto, otherwise: str) -> str:
    """The graph's name; a damaged one, which protobuf gives as bytes, is as good as none."""
    return graph.name if isinstance(graph.name, str) and graph.name else otherwise
