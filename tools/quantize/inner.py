"""Rewriting every graph of a model, those inside If, Loop and Scan included."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto

from ...compiler.nodes import graphs_in, node_name
from .model import Draft

Array = NDArray[Any]


@dataclass
class Scope:
    """One graph that is being rewritten: its constants and those around it, and names of what was made for its values.

    What is made of a constant is a constant of the graph that reads it: engines look for weights there.
    """

    draft: Draft
    graph: GraphProto
    constants: Mapping[str, TensorProto]
    made: dict[tuple[str, ...], list[str]] = field(default_factory=dict)

    def is_float(self, name: str) -> bool:
        return name in self.constants and self.constants[name].data_type == TensorProto.FLOAT

    def array(self, name: str) -> Array:
        """A constant's elements."""
        return np.asarray(self.draft.weights.array(self.constants[name]))

    def add_constant(self, name: str, array: Array | TensorProto) -> str:
        """A further constant of this graph; its name, which is new in the whole model."""
        return self.draft.add_constant(name, array, self.graph)


Rewrite = Callable[[NodeProto, Scope], "list[NodeProto] | None"]
"""The nodes in place of one, None where it stays."""


def rewrite_graphs(draft: Draft, rewrite: Rewrite) -> None:
    """Rewrites the nodes of all graphs of a model."""
    _rewrite(draft.graph, draft, {}, rewrite)


def _rewrite(graph: GraphProto, draft: Draft, outer: Mapping[str, TensorProto], rewrite: Rewrite) -> None:
    own = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and not node.domain and node.attribute[0].name == "value":
            own[node.output[0]] = node.attribute[0].t
    hidden = {value.name for value in graph.input} | {name for node in graph.node for name in node.output}
    scope = Scope(draft, graph, {name: tensor for name, tensor in outer.items() if name not in hidden} | own)
    nodes: list[NodeProto] = []
    for index, node in enumerate(graph.node):
        node.name = node_name(node, index)
        for inner in graphs_in(node):
            _rewrite(inner, draft, scope.constants, rewrite)
        found = rewrite(node, scope)
        nodes += [node] if found is None else found
    kept = [copy.copy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


__all__ = ["Scope", "rewrite_graphs"]
