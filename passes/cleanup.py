"""Common subexpressions and dead code."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from ..ir.graph import Attribute, Constant, Graph, Node, Value, unite
from .fold import RANDOM
from .pipeline import Pass, register
from .rewriting import Rewriter, attribute_symbols, node_symbols, type_symbols, until_stable

DIGEST_LIMIT = 1 << 20
"""Constants of more bytes are compared as objects only: reading all weights once more is not worth it."""


@register
@dataclass(frozen=True)
class Cleanup(Pass):
    """Merges nodes that compute the same, then drops those whose results nobody reads."""

    name = "cleanup"

    def run(self, graph: Graph) -> Graph:
        return until_stable(lambda found: without_dead_code(_Sharing(found).run()), graph)


# Common subexpressions.


class _Sharing(Rewriter):
    """Lets readers of a node's results use those of an earlier node that computes the same."""

    def __init__(self, graph: Graph, parent: _Sharing | None = None) -> None:
        super().__init__(graph, parent)
        self.available: dict[Hashable, int] = {}
        self.around = parent

    def add(self, node: Node) -> Node:
        """Without inference: nothing here depends on contents."""
        self.nodes.append(node)
        return node

    def visit(self, node: Node) -> None:
        if node.op in RANDOM or any(inner.op in RANDOM for r in node.regions.values() for inner in r.walk()):
            self.add(node)
            return
        key = node_key(node, {})
        first = self.find(key)
        if first is None or self.keeps(node):
            self.available.setdefault(key, len(self.nodes))
            self.add(node)
            return
        holder, position = first
        original = holder.nodes[position]
        if holder is self and node.origin != original.origin:
            merged = replace(original, origin=unite(original.origin, node.origin))
            self.nodes[position] = merged
        for old, new in zip(node.outputs, original.outputs, strict=True):
            self.replace(old, new)

    def find(self, key: Hashable) -> tuple[_Sharing, int] | None:
        """Who has a node of this key already, this graph or one around, and where."""
        if key in self.available:
            return self, self.available[key]
        return self.around.find(key) if self.around is not None else None

    def keeps(self, node: Node) -> bool:
        """Outputs of the graph stay results of nodes of their own."""
        return any(value in self.graph.outputs for value in node.outputs)


def node_key(node: Node, local: Mapping[Value, int]) -> Hashable:
    """What two nodes that compute the same have in common; `local` numbers the values of regions around."""
    if node.op == "Constant":
        handle = node.attributes["value"]
        assert isinstance(handle, Constant)
        return "Constant", handle_key(handle)
    inputs = tuple(None if value is None else local.get(value, value.name) for value in node.inputs)
    attributes = tuple(sorted((name, attribute_key(value)) for name, value in node.attributes.items()))
    regions = tuple(sorted((name, region_key(region, local)) for name, region in node.regions.items()))
    types = tuple(str(value.type) for value in node.outputs) if not node.inputs else len(node.outputs)
    return node.op, inputs, attributes, regions, types


def region_key(region: Graph, local: Mapping[Value, int]) -> str:
    """The region with its own values numbered instead of named, as text."""
    numbers = dict(local)
    numbers.update((value, len(numbers) + i) for i, value in enumerate(region.inputs))
    keys: list[Hashable] = [tuple(str(value.type) for value in region.inputs)]
    for node in region.nodes:
        keys.append(node_key(node, numbers))
        numbers.update((value, len(numbers) + i) for i, value in enumerate(node.outputs))
    keys.append(tuple(numbers.get(value, value.name) for value in region.outputs))
    return repr(keys)


def attribute_key(attribute: Attribute) -> str:
    """An attribute as text that equal ones share, and only they: 1, 1.0 and True differ, so do 0.0 and -0.0."""
    if isinstance(attribute, Constant):
        return repr(handle_key(attribute))
    if isinstance(attribute, tuple):
        return f"({', '.join(map(attribute_key, attribute))})"
    return f"{attribute.__class__.__name__} {attribute!r}"


def handle_key(handle: Constant) -> Hashable:
    """Equal for arrays of equal content; large ones are equal to themselves only. A handle keeps its digest."""
    array = handle.array
    if array.nbytes > DIGEST_LIMIT:
        return array.__array_interface__["data"], str(array.dtype), array.shape, array.strides
    return handle.digest


# Dead code.


def without_dead_code(graph: Graph) -> Graph:
    """The graph without nodes that nothing depends on.

    A node whose result is the first to have some size in its shape is needed for that size alone.
    """
    return _Liveness(graph).run()


class _Liveness:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.symbols = {symbol.name for value in graph.outputs for symbol in type_symbols(value.type)}

    def run(self) -> Graph:
        known = {symbol.name for symbol in self.graph.symbols()}
        return self._swept(self.graph, known)

    def _swept(self, graph: Graph, known: set[str]) -> Graph:
        definers: dict[int, set[str]] = {}
        known = known | {symbol.name for value in graph.inputs for symbol in type_symbols(value.type)}
        for position, node in enumerate(graph.nodes):
            new = {symbol.name for value in node.outputs for symbol in type_symbols(value.type)} - known
            if new:
                definers[position] = new
                known |= new
        live = set(graph.outputs)
        kept: list[Node] = []
        for position in reversed(range(len(graph.nodes))):
            node = graph.nodes[position]
            if not any(value in live for value in node.outputs) and not definers.get(position, set()) & self.symbols:
                continue
            if node.regions and node.op != "Fused":
                swept = {name: self._swept(region, known) for name, region in node.regions.items()}
                if any(swept[name] is not region for name, region in node.regions.items()):
                    node = replace(node, regions=swept)
            if definers or any(attribute_symbols(value) for value in node.attributes.values()):
                self.symbols |= node_symbols(node)
            live.update(node.reads)
            kept.append(node)
        if len(kept) == len(graph.nodes) and all(a is b for a, b in zip(reversed(kept), graph.nodes, strict=True)):
            return graph
        return replace(graph, nodes=tuple(reversed(kept)))
