"""Products of flattened operands in the shape that their readers want.

Exporters flatten [batch, tokens, channels] to a matrix in front of a Gemm and reshape its result back. As a MatMul of
the shaped operand the result meets what follows it in one shape, so that activations and residual sums become its
epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Graph, Node, Value, unite
from .cleanup import without_dead_code
from .pipeline import Pass, register
from .rewriting import Rewriter


@register
@dataclass(frozen=True)
class Unflatten(Pass):
    """Reshape(Gemm(x, w, row)) that leaves the last axis alone => Add(MatMul(Reshape(x), w), row)."""

    name = "unflatten"

    def run(self, graph: Graph) -> Graph:
        changed = _Sweep(graph).run()
        return graph if changed is graph else without_dead_code(changed)


class _Sweep(Rewriter):
    def visit(self, node: Node) -> None:
        source = node.inputs[0] if node.op == "Reshape" else None
        product = self.made_by(source, "Gemm", "MatMul")
        if product is None or not self._is_plain(product) or not self._keeps_columns(node, product.output):
            self.add(node)
            return
        left, right, *rest = product.inputs
        row = rest[0] if rest else None
        assert left is not None and right is not None
        origin = unite(product.origin, node.origin)
        if product.attributes.get("transB"):
            array = self.array(right)
            assert array is not None
            right = self.constant(array.T, f"{right.name}.transposed", product.origin)
        shape = (*node.output.shape[:-1], left.shape[1])
        reshape = self.made_by(left, "Reshape")
        if reshape is not None and reshape.inputs[0] is not None:
            left = reshape.inputs[0]
        if left.shape != shape:
            left = self.emit("Reshape", (left,), {"shape": shape}, stem=f"{left.name}.shaped", origin=node.origin)
        if row is None:
            self.emit("MatMul", (left, right), stem="", origin=origin, output=node.output)
            return
        plain = self.emit("MatMul", (left, right), stem=f"{product.output.name}.shaped", origin=product.origin)
        self.emit("Add", (plain, row), stem="", origin=origin, output=node.output)

    def _is_plain(self, product: Node) -> bool:
        """Whether a product is x @ w, plus a row, and read once."""
        if self.readers(product.output) != 1 or len(product.output.shape) != 2:
            return False
        if product.op == "MatMul":
            return all(value is not None and len(value.shape) == 2 for value in product.inputs)
        attributes, right = product.attributes, product.inputs[1]
        row = product.inputs[2] if len(product.inputs) > 2 else None
        if attributes.get("transA") or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            return False
        if attributes.get("transB") and self.array(right) is None:
            return False
        return row is None or _is_row(row)

    def _keeps_columns(self, node: Node, matrix: Value) -> bool:
        shape = node.output.shape
        return len(shape) > 2 and shape[-1] == matrix.shape[1]


def _is_row(value: Value) -> bool:
    return len(value.shape) <= 1
