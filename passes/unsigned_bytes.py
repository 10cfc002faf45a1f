"""Activations of i8 as u8, 128 higher, for processors that multiply u8 by i8 alone (VPDPBUSD).

Their products would move every element that they read by 128. Where an activation is quantized and where it is read
again, the zero point can be 128 higher as well; what stands between only moves elements or picks the largest. So
products find bytes as they want them, and nothing else changes: every number that the bytes stand for is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..ir.dtypes import I8, U8
from ..ir.graph import Graph, Node, TensorType, Value
from .cleanup import without_dead_code
from .pipeline import Pass, register
from .quantized_moves import MOVED, PICKED
from .rewriting import Rewriter

MOVE = 128
ZEROS = {"QuantizeLinear": 2, "DequantizeLinear": 2, "ConvInteger": 2, "MatMulInteger": 2}
"""Where operators have the zero point of their first operand, or of the result that QuantizeLinear makes."""
PRODUCTS = ("ConvInteger", "MatMulInteger")
CARRIERS = (*MOVED, *PICKED, "Identity", "Squeeze", "Unsqueeze", "Flatten")


@register
@dataclass(frozen=True)
class UnsignedBytes(Pass):
    """Makes activations of products unsigned; see the module."""

    name = "unsigned-bytes"

    def run(self, graph: Graph) -> Graph:
        moved = _moved(graph)
        return without_dead_code(_Unsigned(graph, moved).run()) if moved else graph


def _carried(node: Node) -> tuple[Value, ...]:
    """The operands of which the results consist."""
    return node.operands if node.op == "Concat" else node.operands[:1] if node.op in CARRIERS else ()


def _moved(graph: Graph) -> frozenset[Value]:
    """The tensors of i8 that all their makers and readers can have as u8, together with those they are moved to, where
    a product reads one of them."""
    producers = {value: node for node in graph.nodes for value in node.outputs}
    constants = {value for value, node in producers.items() if node.op == "Constant"}
    fixed = {*graph.inputs, *graph.outputs, *constants}

    def known_zero(node: Node, read: bool) -> bool:
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is not None:
            return zero in constants
        scale = node.inputs[1] if node.op == "DequantizeLinear" else None
        return read and (scale is None or scale.tensor.static)

    def fits(value: Value, among: set[Value]) -> bool:
        maker = producers[value]
        made = maker.op == "QuantizeLinear" and known_zero(maker, False) and not maker.attributes.get("output_dtype")
        if not made and not (_carried(maker) and set(_carried(maker)) <= among):
            return False
        for node in graph.users.get(value, ()):
            if node.op in ZEROS and node.op != "QuantizeLinear":
                alone = list(node.inputs).count(value) == 1 and node.inputs[0] == value
                if not alone or not known_zero(node, True):
                    return False
            elif value not in _carried(node) or not among.issuperset(node.outputs):
                return False
        return True

    found = {v for v in producers if isinstance(v.type, TensorType) and v.dtype == I8 and v not in fixed}
    while rest := {value for value in found if not fits(value, found)}:
        found -= rest
    return frozenset(value for part in _parts(graph, found) if _feeds_product(graph, part) for value in part)


def _parts(graph: Graph, found: set[Value]) -> Iterator[set[Value]]:
    """The tensors by what is moved from one to the other."""
    parts: dict[Value, set[Value]] = {value: {value} for value in found}
    for node in graph.nodes:
        together = [value for value in (*_carried(node), *node.outputs) if value in parts]
        if _carried(node) and together:
            whole = set().union(*(parts[value] for value in together))
            parts.update(dict.fromkeys(whole, whole))
    yield from {id(part): part for part in parts.values()}.values()


def _feeds_product(graph: Graph, part: set[Value]) -> bool:
    return any(node.op in PRODUCTS for value in part for node in graph.users.get(value, ()))


class _Unsigned(Rewriter):
    def __init__(self, graph: Graph, moved: frozenset[Value]) -> None:
        super().__init__(graph)
        self.moved = {value.name for value in moved}

    def with_regions(self, node: Node) -> Node:
        return node  # none reads a tensor that is moved

    def visit(self, node: Node) -> None:
        about = node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0] if node.inputs else None
        if node.op in ZEROS and about is not None and about.name in self.moved:
            node = replace(node, inputs=(*(*node.inputs, None)[:2], self.raised(node), *node.inputs[3:]))
        outputs = list(node.outputs)
        for number, value in enumerate(outputs):
            if value.name in self.moved:
                outputs[number] = Value(value.name, replace(value.tensor, dtype=U8))
                self.replace(value, outputs[number])
        self.add(replace(node, outputs=tuple(outputs)) if outputs != list(node.outputs) else node)

    def raised(self, node: Node) -> Value:
        """The zero point 128 higher."""
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        array = self.array(zero)
        if array is None:
            scale = node.inputs[1] if node.op == "DequantizeLinear" else None
            shape = () if scale is None else tuple(int(str(extent)) for extent in scale.shape)
            array = np.zeros(shape, np.int8)
        stem = f"{node.output.name}.zero" if zero is None else f"{zero.name}.unsigned"
        return self.constant((array.astype(np.int16) + MOVE).astype(np.uint8), stem, node.origin)
