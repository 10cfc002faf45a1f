"""Models in half precision computed in f32: integer forms begin and end with f32 in engines for CPUs.

Inputs and outputs keep their types, behind Cast; weights become twice as large until they are quantised.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ...compiler.nodes import all_names, graphs_in, names_read
from ...compiler.weights import Weights

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
TYPES = ("to", "dtype", "output_dtype")
"""Attributes that name the type of a result."""


def widen(proto: ModelProto, weights: Weights) -> int:
    """Makes f32 of all values of 16 bits within a model; how many inputs, outputs and constants were of these."""
    graph = proto.graph
    taken = {*all_names(graph), *names_read(graph.node)}
    inner = {tensor.name for tensor in graph.initializer}
    changed = {v.name: f"{v.name}_f32" for v in (*graph.input, *graph.output) if _half(v) and v.name not in inner}
    for name, wide in changed.items():
        while wide in taken:
            wide += "_"
        changed[name] = wide
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    count = len(changed) + _widen(graph, weights, True)
    if not count:
        return 0
    _rename(graph, changed)
    inputs = [v.name for v in graph.input if v.name in changed]
    before = [_cast(name, changed[name], TensorProto.FLOAT) for name in inputs]
    after = [_cast(changed[v.name], v.name, kinds[v.name]) for v in graph.output if v.name in changed]
    nodes = [*before, *graph.node, *after]
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return count


def _cast(source: str, result: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [result], f"{result}_Cast", to=to)


def _half(value: ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type in HALVES


def _widen(graph: GraphProto, weights: Weights, main: bool) -> int:
    """Of the constants, attributes and declarations of a graph."""
    count = sum(_constant(tensor, weights) for tensor in graph.initializer)
    constants = {tensor.name for tensor in graph.initializer}
    for value in (*graph.input, *graph.output):
        if _half(value) and (not main or value.name in constants):
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                count += _constant(attribute.t, weights)
            if attribute.name in TYPES and attribute.i in HALVES:
                attribute.i = TensorProto.FLOAT
                count += 1
        count += sum(_widen(inner, weights, False) for inner in graphs_in(node))
    return count


def _constant(tensor: TensorProto, weights: Weights) -> int:
    if tensor.data_type not in HALVES:
        return 0
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(weights.array(tensor)).astype(np.float32), tensor.name))
    return 1


def _rename(graph: GraphProto, changed: Mapping[str, str]) -> None:
    """Other names for values of the main graph, wherever they are read."""
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name in changed:
                    names[place] = changed[name]
        for inner in graphs_in(node):
            hidden = {value.name for value in inner.input} | {tensor.name for tensor in inner.initializer}
            hidden.update(name for other in inner.node for name in other.output)
            left = {name: wide for name, wide in changed.items() if name not in hidden}
            _rename(inner, left)
            for value in inner.output:
                value.name = left.get(value.name, value.name)


__all__ = ["widen"]
