"""Functions: those that a model brings along, and the bodies that ONNX's schemas give for operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TypeProto

from ..ir.errors import ModelError, UnsupportedError
from ..ir.export import node_to_onnx, schema_of, type_to_onnx
from ..ir.graph import Node
from .calls import Call

Key = tuple[str, str, str]
"""Domain, name and overload of a model's function."""


def domain_of(text: str) -> str:
    """The domain as it is compared: ONNX's own is empty."""
    return "" if text == "ai.onnx" else text


@dataclass(frozen=True)
class Function:
    """A function's body with what its attributes are where the call gives none."""

    name: str
    proto: FunctionProto
    defaults: Mapping[str, AttributeProto]
    opsets: Mapping[str, int]


def opsets_of(proto: ModelProto | FunctionProto) -> dict[str, int]:
    """The version of each domain that a model or a function imports.

    Raises UnsupportedError for one that is newer than the installed onnx package, ModelError for one that never was.
    """
    opsets = {domain_of(entry.domain): entry.version for entry in proto.opset_import}
    if not opsets and isinstance(proto, ModelProto) and proto.ir_version < 3:
        return {"": 1}
    newest = onnx.defs.onnx_opset_version()
    if opsets.get("", 1) > newest:
        raise UnsupportedError(
            f"the model is of opset {opsets['']}, the installed onnx {onnx.__version__} knows up to {newest}: "
            "upgrade the package onnx, or export with an older opset"
        )
    for domain, version in opsets.items():
        if not 0 < version < 1 << 31:
            raise ModelError(f'the model imports opset {version} of "{domain or "ai.onnx"}", which does not exist')
    return opsets


def local_functions(model: ModelProto) -> dict[Key, Function]:
    """The functions that the model brings along."""
    found: dict[Key, Function] = {}
    opsets = opsets_of(model)
    for proto in model.functions:
        key = (domain_of(proto.domain), proto.name, proto.overload)
        if key in found:
            raise ModelError(f'the function "{proto.domain}.{proto.name}" is defined twice')
        defaults = {attribute.name: attribute for attribute in proto.attribute_proto}
        name = f"{key[0]}.{proto.name}".lstrip(".")
        found[key] = Function(name, proto, defaults, opsets | opsets_of(proto))
    return found


def call_to_onnx(call: Call) -> NodeProto:
    """The call as a node of the newest opset; its outputs keep their names."""
    (proto,) = node_to_onnx(Node(call.op, call.inputs, (), call.attributes, origin=call.origin))
    proto.output.extend(call.outputs)
    proto.attribute.extend(onnx.helper.make_attribute(name, graph) for name, graph in call.graphs.items())
    return proto


def schema_function(call: Call, node: NodeProto) -> Function | None:
    """The body that the newest schema gives for the operator of a call, if it gives one.

    Raises UnsupportedError where the schema cannot make a body for the types of these operands.
    """
    # The package's stubs lack what its schemas tell of functions.
    schema: Any = schema_of(call.op)
    versions = schema.all_function_opset_versions if schema is not None else []
    if schema is None or not versions:
        return None
    if schema.has_context_dependent_function:
        types = [(TypeProto() if v is None else type_to_onnx(v.type)).SerializeToString() for v in call.inputs]
        try:
            text = schema.get_context_dependent_function_with_opset_version(
                versions[-1], node.SerializeToString(), types
            )
        except Exception as error:  # the binding raises its own kinds
            raise UnsupportedError(f"ONNX gives no body for {call.op} with these operands: {error}") from error
        proto = FunctionProto.FromString(text)
    else:
        proto = FunctionProto.FromString(schema.get_function_with_opset_version(versions[-1]))
    if not proto.node:
        raise UnsupportedError(f"ONNX gives no body for {call.op} with these operands")
    defaults = {a.name: a.default_value for a in schema.attributes.values() if a.default_value.name}
    own = versions[-1] if not schema.domain else onnx.defs.onnx_opset_version()
    return Function(call.op, proto, defaults, {"": own} | opsets_of(proto))
