"""Functions of a model in place of their calls: any of them may hold what Python has to run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter

from onnx import ModelProto, NodeProto
from onnx.inliner import inline_local_functions

from ...ir.errors import LimitError, ModelError, UnsupportedError
from ..functions import Key, domain_of, local_functions
from ..limits import most_nodes
from ..nodes import graphs_in


def expanded(model: ModelProto) -> ModelProto:
    """The model without functions.

    Raises ModelError where they call themselves, LimitError where they expand to too many nodes, UnsupportedError where
    the onnx package cannot expand them.
    """
    if not model.functions:
        return model
    functions = local_functions(model)
    calls = {key: [_key(node) for node in _walk(function.proto.node)] for key, function in functions.items()}
    sizes: dict[Key, int] = {}
    try:
        for key in TopologicalSorter(calls).static_order():
            sizes[key] = sum(sizes.get(called, 1) for called in calls[key]) if key in calls else 1
    except CycleError as error:
        chain = " -> ".join(key[1] for key in reversed(error.args[1]))
        raise ModelError(f"functions call themselves: {chain}; ONNX has no recursion") from error
    if sum(sizes.get(_key(node), 1) for node in _walk(model.graph.node)) > most_nodes(model):
        raise LimitError("the model's functions expand to too many nodes")
    light = ModelProto()
    light.CopyFrom(model)
    del light.graph.initializer[:]  # the package's inliner takes the model as bytes
    try:
        found = inline_local_functions(light, True)
    except Exception as error:  # the binding raises its own kinds
        raise UnsupportedError(f"the model's functions cannot be expanded for Python: {error}") from error
    found.graph.initializer.extend(model.graph.initializer)
    return found


def _key(node: NodeProto) -> Key:
    return domain_of(node.domain), node.op_type, node.overload


def _walk(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for graph in graphs_in(node):
            yield from _walk(graph.node)
