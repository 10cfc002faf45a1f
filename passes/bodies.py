"""Bodies of fused groups as passes make them, and masks that are computed where they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..ir.dims import Dim, Opaque, atoms, evaluate, product, symbols
from ..ir.dtypes import BOOL, I64
from ..ir.graph import Attribute, Graph, Names, Node, TensorType, Value, constant_node
from ..ir.infer import Inference
from ..ir.ops import REGISTRY
from .access import AccessAnalysis
from .plan import HINT
from .rewriting import array_type

CHEAP = 16
"""Scalar operations up to which a mask is computed once more for each score rather than read from memory."""


@dataclass
class Body:
    """Nodes of a group or region as they are made, each value under a name of its own."""

    names: Names
    inference: Inference
    nodes: list[Node] = field(default_factory=list)

    def add(self, op: str, inputs: Sequence[Value], stem: str, **attributes: Attribute) -> Value:
        name = self.names.fresh(f"{stem}.inner")
        (type,) = self.inference.outputs(op, inputs, attributes, {}, [name])
        self.nodes.append(Node(op, tuple(inputs), (Value(name, type),), attributes))
        return self.nodes[-1].output

    def clone(self, node: Node, mapping: dict[Value, Value]) -> None:
        """Adds the node with its operands as `mapping` has them, which then has its results too."""
        results = tuple(Value(self.names.fresh(f"{value.name}.inner"), value.type) for value in node.outputs)
        self.nodes.append(replace(node.with_inputs(mapping), outputs=results))
        self.inference.node(self.nodes[-1])
        mapping.update(zip(node.outputs, results, strict=True))

    def reshaped(self, value: Value, shape: tuple[Dim, ...]) -> Value:
        return value if value.shape == shape else self.add("Reshape", (value,), value.name, shape=shape)


class Masks:
    """Biases and masks of one graph: what their elements are made of."""

    def __init__(self, graph: Graph, inference: Inference, names: Names) -> None:
        self.graph, self.inference, self.names = graph, inference, names
        self.analysis = AccessAnalysis(inference)
        self.constants: list[Node] = []
        self.readings: dict[Value, tuple[int, int, bool]] = {}

    def take(self) -> list[Node]:
        """The constants that bodies made since the last call read from outside."""
        constants, self.constants = self.constants, []
        return constants

    def absorb(self, body: Body, value: Value, mapping: dict[Value, Value]) -> None:
        """Lets the region compute a bias or mask where that reads less memory; else it is read as it is."""
        node = self.graph.producers.get(value)
        if value in mapping or node is None or not self.reading(value)[2]:
            return
        if node.op == "Constant":
            mapping[value] = self.formula(body, value)
            return
        for operand in node.operands:
            self.absorb(body, operand, mapping)
        body.clone(node, mapping)

    def reading(self, value: Value) -> tuple[int, int, bool]:
        """What it takes to have a bias or mask at hand: bytes read, scalar operations for an element, and whether it is
        computed."""
        if value not in self.readings:
            node = self.graph.producers.get(value)
            size = _bytes(value) if isinstance(value.type, TensorType) and product(value.shape) != 1 else 0
            found = (size, 0, False)
            if node is not None and node.op == "Constant":
                array = self.graph.constant(value)
                known = array is not None and (diagonal(array) is not None or progression(array) is not None)
                found = (0, 2, True) if known else found
            elif node is not None and (own := self.cost(node)) is not None:
                parts = [self.reading(operand) for operand in node.operands]
                read, cost = sum(part[0] for part in parts), own + sum(part[1] for part in parts)
                if cost <= CHEAP and (read < size or REGISTRY[node.op].movement):
                    found = (min(read, size), cost, True)
            self.readings[value] = found
        return self.readings[value]

    def cost(self, node: Node) -> int | None:
        """Scalar operations for an element of a node that can be computed where it is read; None for others."""
        operator = REGISTRY.get(node.op)
        if operator is None or operator.heavy or len(node.outputs) != 1:
            return None
        if any(node.inputs[position] is not None for position in operator.static_positions(len(node.inputs))):
            return None
        access = self.analysis(node)
        indices = [index for found in access.reads.values() for where in found for index in where]
        if access.kind != "map" or any(isinstance(atom, Opaque) for index in indices for atom in atoms(index)):
            return None
        return 0 if operator.movement else access.cost

    def formula(self, body: Body, value: Value) -> Value:
        """A constant by its indices: numbers one step apart, or a triangle of one number beside one of another."""
        array = self.graph.constant(value)
        assert array is not None
        steps = progression(array)
        if steps is not None:
            start, delta = steps
            limit = start + delta * array.size
            made = body.add("Range", (), value.name, start=(start,), limit=(limit,), delta=(delta,), dtype=value.dtype)
            return body.reshaped(made, value.shape)
        found = diagonal(array)
        assert found is not None
        offset, low, high = found
        rows, columns = value.shape[-2:]
        row = body.add("Range", (), value.name, start=(offset,), limit=(rows + offset,), delta=(1,), dtype=I64)
        column = body.add("Range", (), value.name, start=(0,), limit=(columns,), delta=(1,), dtype=I64)
        row = body.add("Reshape", (row,), value.name, shape=(*(1,) * (value.tensor.rank - 2), rows, 1))
        inverted = value.dtype == BOOL and not low
        made = body.add("Greater" if inverted else "LessOrEqual", (column, row), value.name)
        if value.dtype != BOOL:
            yes, no = (self.number(array.dtype.type(number), value.name) for number in (low, high))
            made = body.add("Where", (made, yes, no), value.name)
        return made

    def number(self, number: np.generic, stem: str) -> Value:
        array = np.asarray(number)
        self.constants.append(constant_node(self.names.fresh(stem), array, array_type(array)))
        self.inference.node(self.constants[-1])
        return self.constants[-1].output


def _bytes(value: Value) -> int:
    """Bytes of a tensor, unknown sizes guessed."""
    size = product(value.shape)
    return evaluate(size, {symbol.name: HINT for symbol in symbols(size)}) * value.dtype.bytes


def diagonal(array: np.ndarray) -> tuple[int, float, float] | None:
    """(d, low, high) of matrices [1, ..., 1, rows, columns] that are `low` where column <= row + d, else `high`."""
    rows, columns = array.shape[-2:] if array.ndim > 1 else (0, 0)
    if min(rows, columns) < 2 or array.size != rows * columns:
        return None
    matrix = array.reshape(rows, columns)
    low, high = matrix[-1, 0], matrix[0, -1]
    below = np.arange(columns) - np.arange(rows)[:, None]  # column - row
    if low == high or array.dtype.kind not in "fiub":
        return None
    offset = int(below[matrix == low].max())
    fits = np.array_equal(matrix, np.where(below <= offset, low, high))
    return (offset, low.item(), high.item()) if fits else None


def progression(array: np.ndarray) -> tuple[int, int] | None:
    """(start, step) of whole numbers along the only axis that is not 1."""
    flat = array.reshape(-1)
    if array.dtype.kind not in "iu" or flat.size < 2 or max(array.shape) != flat.size:
        return None
    start, step = int(flat[0]), int(flat[1]) - int(flat[0])
    return (start, step) if step and np.array_equal(flat, start + step * np.arange(flat.size)) else None
