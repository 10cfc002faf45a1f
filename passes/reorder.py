"""Operator order: the nodes of a graph in an order that keeps few bytes alive at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..ir.dims import evaluate, symbols
from ..ir.graph import Graph, TensorType, Value
from ..ir.infer import Inference
from ..ir.ops import REGISTRY
from ..ir.tensors import Tensor
from .access import view_of
from .order import order_steps
from .pipeline import Pass, register
from .plan import HINT


@register
@dataclass(frozen=True)
class Reorder(Pass):
    """Orders nodes for little memory, after fusion has decided what is a kernel. Views share their source's memory."""

    name = "reorder"

    def run(self, graph: Graph) -> Graph:
        constants = [node for node in graph.nodes if node.op == "Constant"]
        nodes = [node for node in graph.nodes if node.op != "Constant"]
        roots = _roots(graph)
        numbers: dict[Value, int] = {}
        sizes: list[int] = []
        for value in [*graph.inputs, *(v for node in nodes for v in node.outputs)]:
            root = roots.get(value, value)
            if root is value:
                numbers[value] = len(sizes)
                free = value in graph.inputs or value in graph.outputs
                sizes.append(0 if free else min(_bytes(value), 1 << 46))  # sums must stay in 64 bits
        for value, root in roots.items():
            if root in numbers:
                numbers[value] = numbers[root]
        reads = [[numbers[v] for v in node.reads if v in numbers] for node in nodes]
        writes = [[numbers[v] for v in node.outputs if roots.get(v, v) is v] for node in nodes]
        readers: dict[Value, list[int]] = {}
        for position, node in enumerate(nodes):
            for value in dict.fromkeys(node.reads):
                readers.setdefault(value, []).append(position)
        # A view must come after its source and before its readers: it stands for a value of no bytes of its own.
        for position, node in enumerate(nodes):
            for value in node.outputs:
                if roots.get(value, value) is not value:
                    marker = len(sizes)
                    sizes.append(0)
                    writes[position].append(marker)
                    for reader in readers.get(value, ()):
                        reads[reader].append(marker)
        order = order_steps(len(nodes), reads, writes, sizes, frozenset())
        return replace(graph, nodes=(*constants, *(nodes[position] for position in order)))


def _roots(graph: Graph) -> Mapping[Value, Value]:
    """For each value that is another's memory: the value whose memory it is in the end."""
    inference = Inference()
    inference.graph(graph)
    roots: dict[Value, Value] = {}
    for node in graph.nodes:
        operator = REGISTRY.get(node.op)
        if operator is None or not (operator.movement or node.op == "Identity") or len(node.outputs) != 1:
            continue
        found = inference.definition(node.op, node.inputs, node.attributes, node.regions, [node.output.name])[0]
        if isinstance(found, Tensor) and found.kind != "opaque" and view_of(found.at, found.shape) is not None:
            source = node.operands[0]
            roots[node.output] = roots.get(source, source)
    return roots


def _bytes(value: Value) -> int:
    if not isinstance(value.type, TensorType):
        return 0
    total = value.dtype.bytes
    for dim in value.shape:
        total *= max(0, evaluate(dim, {symbol.name: HINT for symbol in symbols(dim)}))
    return total
