"""What node-by-node rewrites share: one sweep over a graph and its regions, with names, types and known values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..ir.dims import Dim, Sum, Symbol, as_symbol, known_le, substitute, symbol, symbols
from ..ir.dtypes import of_numpy
from ..ir.graph import (
    Attribute,
    Constant,
    Graph,
    Names,
    Node,
    TensorType,
    Type,
    Value,
    constant_node,
    substitute_type,
)  # fmt: skip
from ..ir.infer import SYMBOLIC_LIMIT, Inference, known_dims
from ..ir.ops import REGISTRY
from ..ir.ops.declare import identifier

MOST_SWEEPS = 16
"""Sweeps of one pass, lest two rewrites that undo each other run forever."""


class Rewriter:
    """Rewrites one graph in one sweep, in order; a subclass says in `visit` what becomes of a node.

    By the time a node is visited it reads what earlier visits put in place of its operands, and its regions have been
    swept, each by a rewriter of the same class whose `parent` is this one. `inference` knows the contents of small
    tensors (all that shape arithmetic needs) of the nodes added so far.
    """

    def __init__(self, graph: Graph, parent: Rewriter | None = None) -> None:
        self.graph, self.parent = graph, parent
        self.names: Names = parent.names if parent else Names(graph)
        self.inference: Inference = parent.inference if parent else Inference()
        self.mapping: dict[Value, Value] = {}
        self.sizes: dict[str, Dim] = parent.sizes if parent else {}
        self.nodes: list[Node] = []
        self._producers: dict[str, Node] = {}
        for value in graph.inputs:
            self._forget(value)

    def visit(self, node: Node) -> None:
        """Adds what `node` becomes: itself by `add`, others by `emit`; or gives its outputs away by `replace`."""
        raise NotImplementedError

    def run(self) -> Graph:
        """The graph rewritten: the same object where nothing changed."""
        for node in self.graph.nodes:
            node = node.with_inputs(self.mapping) if self.mapping else node
            if node.regions and node.op != "Fused":  # what fusion has made is left alone
                node = self.with_regions(node)
            self.visit(node)
        self.finish()
        outputs = tuple(self.mapping.get(value, value) for value in self.graph.outputs)
        if outputs == self.graph.outputs and _same(self.nodes, self.graph.nodes):
            return self.graph
        result = replace(self.graph, nodes=tuple(self.nodes), outputs=outputs)
        if self.parent is not None:
            return result
        own = {symbol.name for symbol in self.graph.symbols()}
        sizes = {name: dim for name, dim in self.sizes.items() if name not in own}
        return keep_output_names(substitute_graph(result, sizes), self.graph)

    def finish(self) -> None:
        """What is left to do when all nodes have been visited."""

    def with_regions(self, node: Node) -> Node:
        """The node with its regions swept."""
        swept = {name: type(self)(region, self).run() for name, region in node.regions.items()}
        changed = any(swept[name] is not region for name, region in node.regions.items())
        return replace(node, regions=swept) if changed else node

    # What is known of values.

    def producer(self, value: Value | None) -> Node | None:
        """The node, already rewritten, that defines a value; None for inputs."""
        if value is None:
            return None
        found = self._producers.get(value.name)
        return found if found is not None or self.parent is None else self.parent.producer(value)

    def made_by(self, value: Value | None, *ops: str) -> Node | None:
        """The node that defines a value where it is one of the given operators."""
        node = self.producer(value)
        return node if node is not None and node.op in ops else None

    def array(self, value: Value | None) -> np.ndarray | None:
        """The array of a constant."""
        node = self.made_by(value, "Constant")
        if node is None:
            return None
        handle = node.attributes["value"]
        assert isinstance(handle, Constant)
        return handle.array

    def scalar(self, value: Value | None) -> float | int | bool | None:
        """The one element of a constant that broadcasts as a number."""
        array = self.array(value)
        return array.reshape(-1)[0].item() if array is not None and array.size == 1 else None

    def readers(self, value: Value) -> int:
        """How often the nodes and outputs of the graph as it was read a value."""
        return len(self.graph.users.get(value, ())) + self.graph.outputs.count(value)

    def learn(self, node: Node) -> None:
        """Takes in what a node tells of the contents of its outputs."""
        for value in node.outputs:
            self._forget(value)
        if node.op == "Constant":
            handle = node.attributes["value"]
            assert isinstance(handle, Constant)
            self.inference.define(node.output, handle.array)
        elif node.op in REGISTRY and any(is_small(value) for value in node.outputs):
            names = [value.name for value in node.outputs]
            self.inference.outputs(node.op, node.inputs, node.attributes, node.regions, names, node.origin)
        for value in node.outputs:
            # Sizes that were known as elements of this value, when its content was not (see Inference.static).
            dims = known_dims(self.inference.values.get(value.name)) or ()
            stem = identifier(value.name) if dims else ""
            for element, dim in enumerate(dims):
                name = f"{stem}_{element}"
                if as_symbol(dim) != Symbol(name) and known_le(0, dim):
                    self.sizes[name] = dim

    def _forget(self, value: Value) -> None:
        """Two regions may give one name to different values."""
        found = self.inference
        for known in (found.values, found.partly, found.arrays, found.ranges):
            known.pop(value.name, None)

    # What a visit may do.

    def add(self, node: Node) -> Node:
        """Adds a node."""
        self.nodes.append(node)
        for value in node.outputs:
            self._producers[value.name] = node
        self.learn(node)
        return node

    def emit(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        stem: str,
        origin: tuple[str, ...] = (),
        output: Value | None = None,
    ) -> Value:
        """Adds a node with one output, `output` or one named after `stem`; returns the output."""
        attributes = attributes or {}
        if output is None:
            name = self.names.fresh(stem)
            output = Value(name, self.inference.outputs(op, inputs, attributes, {}, [name], origin)[0])
        self.add(Node(op, tuple(inputs), (output,), attributes, {}, origin))
        return output

    def constant(self, array: np.ndarray, stem: str, origin: tuple[str, ...] = ()) -> Value:
        """Adds a constant."""
        return self.add(constant_node(self.names.fresh(stem), array, array_type(array), origin)).output

    def replace(self, old: Value, new: Value) -> None:
        """Later readers of `old` use `new`."""
        self.mapping[old] = new
        self.resize(old, new)

    def forward(self, node: Node, value: Value) -> None:
        """Lets `value` stand for the first output of a node that is not added.

        An output of the graph stays the result of a node of its own.
        """
        output = node.outputs[0]
        outputs = [self.mapping.get(other, other) for other in self.graph.outputs]
        if output not in self.graph.outputs or (value.name in self._producers and value not in outputs):
            self.replace(output, value)
        else:
            plain = node.op == "Identity"
            self.add(node if plain else Node("Identity", (value,), (output,), origin=node.origin))

    def resize(self, old: Value, new: Value) -> None:
        """Sizes that were known by the name of `old` are known by that of `new`."""
        if isinstance(old.type, TensorType) and isinstance(new.type, TensorType):
            self.refine(old.type.shape, new.type.shape)
            if old.dtype.is_integer and is_small(old):
                stems = identifier(old.name), identifier(new.name)
                for element in range(math.prod(d for d in old.shape if isinstance(d, int))):
                    self.sizes[f"{stems[0]}_{element}"] = symbol(f"{stems[1]}_{element}", None)

    def refine(self, old: Sequence[Dim], new: Sequence[Dim]) -> None:
        """Symbols that stand for sizes in the shape `old` become what the shape `new` says."""
        for before, after in zip(old, new, strict=True):
            name = as_symbol(before)
            if name is not None and before != after:
                self.sizes[name.name] = after


def _same(new: Sequence[Node], old: Sequence[Node]) -> bool:
    return len(new) == len(old) and all(a is b for a, b in zip(new, old, strict=True))


def until_stable(rewrite: Callable[[Graph], Graph], graph: Graph) -> Graph:
    """The graph rewritten until nothing changes, so that a pass has nothing to do when it runs once more."""
    for _ in range(MOST_SWEEPS):
        changed = rewrite(graph)
        if changed is graph:
            break
        graph = changed
    return graph


def is_small(value: Value) -> bool:
    """Whether the content may be known: few elements, of a type that shape arithmetic uses."""
    type = value.type
    if not isinstance(type, TensorType) or type.dtype.kind in ("string", "complex"):
        return False
    count = 1
    for extent in type.shape:
        if not isinstance(extent, int):
            return False
        count *= extent
    return count <= SYMBOLIC_LIMIT


def array_type(array: np.ndarray) -> TensorType:
    """The type of a constant."""
    return TensorType(of_numpy(array.dtype), tuple(int(extent) for extent in array.shape))


def tensor_bytes(type: Type) -> int | None:
    """The bytes of a tensor of that type; None where a size is not known."""
    if not isinstance(type, TensorType) or not type.static:
        return None
    return math.prod(d for d in type.shape if isinstance(d, int)) * type.dtype.bytes


def substitute_attribute(attribute: Attribute, values: Mapping[str, Dim]) -> Attribute:
    """An attribute with the symbols of its dims replaced."""
    if isinstance(attribute, Sum):
        return substitute(attribute, values)
    if isinstance(attribute, tuple):
        return tuple(substitute_attribute(item, values) for item in attribute)
    return attribute


def substitute_graph(graph: Graph, values: Mapping[str, Dim]) -> Graph:
    """The graph with symbols replaced by name in all types and attributes; replacements may hold such symbols."""
    present = symbol_names(graph) & set(values)
    if not present:
        return graph
    resolved = {name: values[name] for name in present}
    for _ in range(len(values)):
        if not any(symbol.name in values for dim in resolved.values() for symbol in symbols(dim)):
            break
        resolved = {name: substitute(dim, values) for name, dim in resolved.items()}
    return _substituted(graph, resolved)


def _substituted(graph: Graph, values: Mapping[str, Dim]) -> Graph:
    def changed(value: Value) -> Value:
        return Value(value.name, substitute_type(value.type, values))

    nodes = []
    for node in graph.nodes:
        attributes = {key: substitute_attribute(attribute, values) for key, attribute in node.attributes.items()}
        regions = {key: _substituted(region, values) for key, region in node.regions.items()}
        operands = tuple(None if value is None else changed(value) for value in node.inputs)
        results = tuple(map(changed, node.outputs))
        nodes.append(replace(node, inputs=operands, outputs=results, attributes=attributes, regions=regions))
    inputs, outputs = tuple(map(changed, graph.inputs)), tuple(map(changed, graph.outputs))
    return replace(graph, inputs=inputs, outputs=outputs, nodes=tuple(nodes))


def type_symbols(type: Type) -> Iterable[Symbol]:
    """The symbols in a type."""
    if isinstance(type, TensorType):
        return [symbol for dim in type.shape if not isinstance(dim, int) for symbol in symbols(dim)]
    return type_symbols(type.element)


def attribute_symbols(attribute: Attribute) -> Iterable[Symbol]:
    """The symbols in an attribute."""
    if isinstance(attribute, Sum):
        return symbols(attribute)
    if isinstance(attribute, tuple):
        return [symbol for item in attribute for symbol in attribute_symbols(item)]
    return ()


def node_symbols(node: Node) -> set[str]:
    """The names of the symbols that a node's outputs, attributes and regions mention."""
    found = {symbol.name for value in node.outputs for symbol in type_symbols(value.type)}
    found |= {symbol.name for attribute in node.attributes.values() for symbol in attribute_symbols(attribute)}
    for region in node.regions.values():
        found |= symbol_names(region)
    return found


def symbol_names(graph: Graph) -> set[str]:
    found = {symbol.name for value in graph.inputs for symbol in type_symbols(value.type)}
    return found.union(*map(node_symbols, graph.nodes))


def rename(graph: Graph, names: Mapping[Value, Value]) -> Graph:
    """The graph with the definitions of some values, and all that reads them, under other names."""
    nodes = []
    for node in graph.nodes:
        node = node.with_inputs(names)
        if any(value in names for value in node.outputs):
            node = replace(node, outputs=tuple(names.get(value, value) for value in node.outputs))
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes), outputs=tuple(names.get(value, value) for value in graph.outputs))


def keep_output_names(graph: Graph, before: Graph) -> Graph:
    """The graph with its outputs called as `before` called them, where a node defines them and the name is free."""
    if [value.name for value in graph.outputs] == [value.name for value in before.outputs]:
        return graph
    taken = {value.name for node in graph.walk() for value in node.outputs} | {value.name for value in graph.inputs}
    own = {value.name for value in before.outputs}
    names: dict[Value, Value] = {}
    for value, old in zip(graph.outputs, before.outputs, strict=True):
        free = value.name != old.name and old.name not in taken and value.name not in own
        if free and value in graph.producers and value not in names:
            names[value] = Value(old.name, value.type)
    if not names:
        return graph
    # Sizes and elements that only the run tells are called after the value (see Context.fresh, Inference.static).
    stems = {identifier(name): name for name in sorted(taken)}
    marks = {value.name: identifier(new.name) for value, new in names.items()}
    sizes: dict[str, Dim] = {}
    typed = (value.type for node in graph.walk() for value in node.outputs)
    bounds = {found.name: found for type in typed for found in type_symbols(type)}
    for name in symbol_names(graph):
        stem = max((stem for stem in stems if name.startswith(f"{stem}_")), key=len, default="")
        if stem and stems[stem] in marks:
            found = bounds.get(name, Symbol(name))
            sizes[name] = symbol(marks[stems[stem]] + name.removeprefix(stem), found.lower, found.upper)
    changed = rename(graph, names)
    return substitute_graph(changed, sizes) if sizes else changed
