"""Tables of vectors, which Gather looks up: 8 bits with a scale for each row, both looked up and multiplied.

So only the rows that are asked for become floats, in standard operators (DequantizeLinear would make all of them).
"""

from __future__ import annotations

from onnx import NodeProto

from .inner import Scope
from .model import attribute, make_node
from .weights import quantised

LEAST = 1 << 16
"""Elements of a table from which on it is worth three nodes instead of one."""


def is_table(node: NodeProto, scope: Scope) -> bool:
    """Whether the node takes rows from a large matrix of floats that is known."""
    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx") or attribute(node, "axis", 0) != 0:
        return False
    table, graph = node.input[0], scope.graph
    if not graph.is_real(table) or len(graph.shape(table)) != 2:
        return False
    rows, width = graph.shape(table)
    return rows * width >= LEAST and width > 1


def looked_up(node: NodeProto, scope: Scope) -> list[NodeProto]:
    """The nodes in its place."""
    graph, (table, places), result = scope.graph, node.input, node.output[0]
    key = (table, "rows")
    if key not in scope.made:
        found = quantised(graph.array(table), 0)
        scales = found.scale.astype(graph.array(table).dtype).reshape(-1, 1)
        scope.made[key] = [
            graph.add_constant(f"{table}_quantized", found.values),
            graph.add_constant(f"{table}_scale", scales),
        ]
    codes, scales_of = scope.made[key]
    names = [graph.unused(f"{result}_{what}") for what in ("quantized", "float", "scale")]
    kind = graph.constants[table].data_type
    return [
        make_node("Gather", [codes, places], names[0], node.name),
        make_node("Cast", [names[0]], names[1], graph.unused(f"{node.name}_Cast"), to=kind),
        make_node("Gather", [scales_of, places], names[2], graph.unused(f"{node.name}_scale")),
        make_node("Mul", [names[1], names[2]], result, graph.unused(f"{node.name}_Mul")),
    ]


__all__ = ["is_table", "looked_up"]
