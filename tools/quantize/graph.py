"""A graph that is being rewritten, of a model or inside one of its nodes: nodes in order, constants by name."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ...compiler.nodes import all_names, free_names, graphs_in, in_order, names_read, node_name
from ...compiler.weights import Weights
from ..check.evaluate import RANDOM, by_reference
from .widened import HALVES

Array = NDArray[Any]
LARGEST_FOLDED = 1 << 28
NEVER_FOLDED = RANDOM | {"QuantizeLinear", "DequantizeLinear", "Constant"}


@dataclass
class Shared:
    """What all graphs of a model have in common: the model, its weights, the names that are taken."""

    proto: ModelProto
    weights: Weights
    names: set[str] = field(default_factory=set)
    nodes: Counter[str] = field(default_factory=Counter)


class GraphDraft:
    """A graph open for rewriting. Nodes are in order, each with a name of its own, and no constant is a node.

    `constants` are those of the graphs around it too, and `inner` the graphs in its nodes, as copies: by the names of
    node and attribute. `attach` puts them back.
    """

    def __init__(self, graph: GraphProto, shared: Shared, outer: GraphDraft | None = None) -> None:
        self.graph, self.shared, self.outer = graph, shared, outer
        self.constants: dict[str, TensorProto] = {}
        self.inner: dict[tuple[str, str], GraphDraft] = {}
        self._arrays: dict[str, Array] = {}
        self._normalise()

    def _normalise(self) -> None:
        graph = self.graph
        nodes = []
        for index, node in in_order(graph.node):
            node.name = node_name(node, index)
            if node.op_type == "Constant" and not node.domain and node.attribute[0].name == "value":
                graph.initializer.append(node.attribute[0].t)
                graph.initializer[-1].name = node.output[0]
            else:
                nodes.append(node)
        taken = self.shared.nodes
        for node in nodes:  # two nodes of one name cannot be told apart
            taken[node.name] += 1
            if taken[node.name] > 1:
                node.name = f"{node.name}_{taken[node.name]}"
        if self.outer is None:  # Initializers that are inputs too may be overridden; nobody who quantises them does.
            own = {tensor.name for tensor in graph.initializer}
            inputs = [value for value in graph.input if value.name not in own]
            del graph.input[:]
            graph.input.extend(inputs)
        self.replace_nodes(nodes)
        self._index()
        self.shared.names.update(names_read(nodes), all_names(graph), (node.name for node in nodes))

    def _index(self) -> None:
        """Finds the constants that nodes can read."""
        around = {} if self.outer is None else self.outer.constants
        hidden = {value.name for value in self.graph.input} | set(self.definers())
        own = {tensor.name: tensor for tensor in self.graph.initializer}
        self.constants = {name: tensor for name, tensor in around.items() if name not in hidden} | own

    def open_inner(self) -> None:
        """Opens the graphs in the nodes, those inside them too."""
        for node in self.graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    graph = GraphProto()
                    graph.CopyFrom(attribute.g)
                    inner = GraphDraft(graph, self.shared, self)
                    inner.fold_constants()
                    inner.open_inner()
                    self.inner[node.name, attribute.name] = inner

    def graphs(self) -> Iterator[GraphDraft]:
        """This graph and those that were opened in it."""
        yield self
        for inner in self.inner.values():
            yield from inner.graphs()

    def attach(self) -> None:
        """Puts the graphs that were opened back into their nodes."""
        for inner in self.inner.values():
            inner.attach()
        for node in self.graph.node:
            for attribute in node.attribute:
                if (node.name, attribute.name) in self.inner:
                    attribute.g.CopyFrom(self.inner[node.name, attribute.name].graph)

    def captured(self) -> list[str]:
        """The values of graphs around this one that it reads."""
        inside = {value.name for value in self.graph.input} | set(self.definers()) | set(self.constants)
        read = [name for node in self.graph.node for name in sorted(free_names(node))]
        return list(dict.fromkeys(name for name in (*read, *self.results()) if name not in inside))

    def results(self) -> list[str]:
        """The names of the graph's outputs."""
        return [value.name for value in self.graph.output]

    def given(self) -> list[str]:
        """Values that are there when the graph begins: its inputs, and what it captures."""
        return [*(value.name for value in self.graph.input), *self.captured()]

    def replace_nodes(self, nodes: Iterable[NodeProto]) -> None:
        """Other nodes for the graph."""
        kept = [copy.copy(node) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(kept)

    def array(self, name: str) -> Array:
        """A constant's elements (read-only)."""
        if name not in self._arrays:
            self._arrays[name] = np.asarray(self.shared.weights.array(self.constants[name]))
        return self._arrays[name]

    def forget(self) -> None:
        """Drops the arrays that were read."""
        self._arrays.clear()

    def is_float(self, name: str) -> bool:
        """Whether this is a constant of f32."""
        return name in self.constants and self.constants[name].data_type == TensorProto.FLOAT

    def is_real(self, name: str) -> bool:
        """Whether this is a constant of f32 or a 16-bit float."""
        return self.is_float(name) or (name in self.constants and self.constants[name].data_type in HALVES)

    def shape(self, name: str) -> tuple[int, ...]:
        """A constant's shape."""
        return tuple(self.constants[name].dims)

    def unused(self, name: str) -> str:
        """A name that no value has yet: this one, or with a number behind it."""
        found, number = name, 2
        while found in self.shared.names:
            found, number = f"{name}_{number}", number + 1
        self.shared.names.add(found)
        return found

    def add_constant(self, name: str, array: Array | TensorProto, graph: GraphProto | None = None) -> str:
        """A further constant, of this graph or another; its name, which is new in the model."""
        name = self.unused(name)
        tensor = array if isinstance(array, TensorProto) else numpy_helper.from_array(np.asarray(array), name)
        tensor.name = name
        (self.graph if graph is None else graph).initializer.append(tensor)
        if graph is None or graph is self.graph:
            self.constants[name] = self.graph.initializer[-1]
        return name

    def readers(self) -> dict[str, list[NodeProto]]:
        """The nodes that read each value, those included whose inner graphs do."""
        found: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for name in dict.fromkeys(filter(None, names_read([node]))):
                found.setdefault(name, []).append(node)
        return found

    def definers(self) -> dict[str, NodeProto]:
        """The node that defines each value."""
        return {name: node for node in self.graph.node for name in node.output if name}

    def fixed(self) -> set[str]:
        """Values that must stay under their names: the graph's outputs, and what inner graphs read."""
        inner = (name for node in self.graph.node for graph in graphs_in(node) for name in names_read(graph.node))
        results = (value.name for node in self.graph.node for graph in graphs_in(node) for value in graph.output)
        return {*self.results(), *inner, *results}

    def types(self) -> Mapping[str, int]:
        """The element types that ONNX's inference knows, of the values of all graphs."""
        try:
            found = onnx.shape_inference.infer_shapes(self.shared.proto).graph
        except Exception:  # it raises its own kinds, and protobuf's for what is larger than 2 GB
            found = self.shared.proto.graph
        return _declared(found) | {name: tensor.data_type for name, tensor in self.constants.items()}

    def fold_constants(self) -> None:
        """Evaluates nodes that read nothing but constants, by ONNX's reference."""
        nodes = []
        for node in self.graph.node:
            reads = [name for name in node.input if name]
            size = sum(math.prod(self.shape(name)) for name in reads if name in self.constants)
            plain = not node.domain and node.op_type not in NEVER_FOLDED and not graphs_in(node)
            if not (plain and reads and all(name in self.constants for name in reads)) or size > LARGEST_FOLDED:
                nodes.append(node)
                continue
            try:
                results = by_reference(self._alone(node), {name: self.array(name) for name in reads})
                tensors = [numpy_helper.from_array(np.asarray(result)) for result in results]
            except Exception:  # the reference raises what it likes for what it does not know
                nodes.append(node)
                continue
            for name, tensor in zip(filter(None, node.output), tensors, strict=True):
                tensor.name = name
                self.graph.initializer.append(tensor)
                self.constants[name] = self.graph.initializer[-1]
        self.replace_nodes(nodes)

    def _alone(self, node: NodeProto) -> ModelProto:
        """A model of one node whose operands are inputs."""
        inputs = [
            helper.make_tensor_value_info(name, self.constants[name].data_type, self.shape(name))
            for name in dict.fromkeys(node.input)
            if name
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        return self.model(helper.make_graph([node], "node", inputs, outputs))

    def model(self, graph: GraphProto) -> ModelProto:
        """A graph as a model of the opsets that this one's has."""
        proto = self.shared.proto
        return helper.make_model(graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version)

    def clean(self) -> None:
        """Removes nodes and constants that nobody reads, and what was declared of values that are gone."""
        needed = set(self.results())
        nodes = []
        for node in reversed(self.graph.node):
            if needed.intersection(node.output) or (not any(node.output)):
                nodes.append(node)
                needed.update(names_read([node]))
        self.replace_nodes(reversed(nodes))
        kept = [tensor for tensor in self.graph.initializer if tensor.name in needed]
        if len(kept) < len(self.graph.initializer):
            del self.graph.initializer[:]
            self.graph.initializer.extend(kept)
        self._index()
        del self.graph.value_info[:]


def _declared(graph: GraphProto) -> dict[str, int]:
    """The element types that are declared in a graph and in those inside it."""
    found: dict[str, int] = {}
    for node in graph.node:
        for inner in graphs_in(node):
            found |= _declared(inner)
    values: Sequence[onnx.ValueInfoProto] = [*graph.value_info, *graph.input, *graph.output]
    return found | {v.name: v.type.tensor_type.elem_type for v in values if v.type.HasField("tensor_type")}


__all__ = ["GraphDraft", "Shared"]
