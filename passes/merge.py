"""Products of one operand with several weights as one product: the queries, keys and values of attention, gates.

One launch in the place of several, whose grid fills a GPU better, and one call on a CPU; what the parts of the result
are read by takes the slices in, as it does any movement: attention reads them in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..ir.graph import Attribute, Graph, Names, Node, TensorType, Value, constant_node, unite
from .cleanup import without_dead_code
from .pipeline import Pass, register

COLUMNS = {"MatMul": 1, "onnxc.PackedMatMul": 0}
"""Products, and the axis of their constants (the right operand; or codes, scales and zero points) along the columns."""


@dataclass(frozen=True)
class _Branch:
    """A product with constants, and the addition of a constant row behind it, if there is one."""

    product: Node
    weights: tuple[np.ndarray, ...]
    addition: Node | None
    row: np.ndarray | None

    @property
    def columns(self) -> int:
        return int(self.weights[0].shape[COLUMNS[self.product.op]])

    @property
    def result(self) -> Value:
        return (self.addition or self.product).output


@register
@dataclass(frozen=True)
class MergeProducts(Pass):
    """MatMul(x, A), MatMul(x, B), ... with constants, and rows added to each, become one MatMul, and its pieces."""

    name = "merge-products"

    def run(self, graph: Graph) -> Graph:
        merged = _Merger(graph, Names(graph)).run()
        return graph if merged is graph else without_dead_code(merged)


class _Merger:
    """Merges within one graph; bodies of control flow are run too rarely to be worth it."""

    def __init__(self, graph: Graph, names: Names) -> None:
        self.graph, self.names = graph, names
        self.producers = {value: node for node in graph.nodes for value in node.outputs}

    def run(self) -> Graph:
        groups: dict[tuple[object, ...], list[_Branch]] = {}
        for node in self.graph.nodes:
            branch = self._branch(node)
            if branch is not None:
                key = (node.inputs[0], node.op, repr(sorted(node.attributes.items())), branch.row is None)
                groups.setdefault((*key, *(array.dtype.name for array in branch.weights)), []).append(branch)
        placed: dict[Value, list[Node]] = {}
        gone: set[Value] = set()
        for branches in groups.values():
            if len(branches) > 1:
                placed[branches[0].product.output] = self._merged(branches)
                gone |= {node.output for b in branches for node in (b.product, b.addition) if node is not None}
        if not placed:
            return self.graph
        nodes: list[Node] = []
        for node in self.graph.nodes:
            if node.outputs and node.outputs[0] in placed:
                nodes += placed[node.outputs[0]]
            elif not node.outputs or node.outputs[0] not in gone:
                nodes.append(node)
        return replace(self.graph, nodes=tuple(nodes))

    def _array(self, value: Value | None) -> np.ndarray | None:
        return None if value is None else self.graph.constant(value)

    def _branch(self, node: Node) -> _Branch | None:
        if node.op not in COLUMNS or len(node.outputs) != 1 or self._array(node.inputs[0]) is not None:
            return None
        arrays = [self._array(value) for value in node.inputs[1:] if value is not None]
        weights = tuple(array for array in arrays if array is not None and array.ndim == 2)
        if len(weights) < len(arrays):
            return None
        columns = weights[0].shape[COLUMNS[node.op]]
        readers = self.graph.users.get(node.output, ())
        addition = next(iter(readers), None)
        if (
            len(readers) == 1
            and addition is not None
            and addition.op == "Add"
            and node.output not in self.graph.outputs
        ):
            rows = [self._array(value) for value in addition.inputs if value != node.output]
            row = rows[0] if len(rows) == 1 else None
            if row is not None and row.ndim == 1 and row.shape[0] == columns:
                branch = _Branch(node, weights, addition, row)
                return branch if self._may_be_a_piece(branch) else None
        branch = _Branch(node, weights, None, None)
        return branch if self._may_be_a_piece(branch) else None

    def _may_be_a_piece(self, branch: _Branch) -> bool:
        """Whether nothing needs the result as an array of its own."""
        result = branch.result
        readers = self.graph.users.get(result, ())
        return bool(readers) and result not in self.graph.outputs and not any(reader.regions for reader in readers)

    def _merged(self, branches: Sequence[_Branch]) -> list[Node]:
        first = branches[0].product
        origin = unite(*(node.origin for b in branches for node in (b.product, b.addition) if node is not None))
        nodes: list[Node] = []
        widths = [branch.columns for branch in branches]
        axis = COLUMNS[first.op]

        def constant(arrays: Sequence[np.ndarray], like: Value, axis: int) -> Value:
            array = np.concatenate(arrays, axis)
            name = self.names.fresh(f"{like.name}.merged")
            nodes.append(constant_node(name, array, TensorType(like.dtype, array.shape), origin))
            return nodes[-1].output

        def add(op: str, inputs: tuple[Value, ...], stem: str, node: Node) -> Value:
            shape = (*first.output.shape[:-1], sum(widths))
            value = Value(self.names.fresh(stem), TensorType(first.output.dtype, shape))
            nodes.append(Node(op, inputs, (value,), node.attributes, origin=origin))
            return value

        operand, *constants = (value for value in first.inputs if value is not None)
        merged = (
            constant([branch.weights[n] for branch in branches], value, axis) for n, value in enumerate(constants)
        )
        result = add(first.op, (operand, *merged), f"{first.output.name}.merged", first)
        rows = [branch.row for branch in branches if branch.row is not None]
        if rows and branches[0].addition is not None:
            own = next(v for v in branches[0].addition.inputs if v is not None and self._array(v) is not None)
            row = constant(rows, own, 0)
            result = add("Add", (result, row), f"{branches[0].result.name}.merged", branches[0].addition)
        pieces = tuple(branch.result for branch in branches)
        attributes: dict[str, Attribute] = {"axis": len(result.shape) - 1, "split": tuple(widths)}
        return [*nodes, Node("Split", (result,), pieces, attributes, origin=origin)]
