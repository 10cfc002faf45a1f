"""Sums of products that are matrix products under other names, written as MatMul between transposes."""

from __future__ import annotations

from ..ir.graph import Graph, Node, Value
from ..ir.ops.contraction import einsum_terms
from .rewriting import Rewriter


def as_matrix_products(graph: Graph) -> Graph:
    """The graph with each Einsum and FusedMatMul that is a matrix product for each batch index as a MatMul."""
    return _Products(graph).run()


class _Products(Rewriter):
    def visit(self, node: Node) -> None:
        if node.op == "Einsum" and len(node.operands) == 2 and self.einsum(node):
            return
        if node.op == "com.microsoft.FusedMatMul" and self.fused(node):
            return
        self.add(node)

    def einsum(self, node: Node) -> bool:
        """batch, rows and columns of the result each on one side or both, one letter summed."""
        terms, result = einsum_terms(str(node.attributes["equation"]), [v.tensor.rank for v in node.operands])
        left, right = map(set, terms)
        batch = [letter for letter in result if letter in left & right]
        summed = (left & right) - set(result)
        rows, columns = left - right, right - left
        alike = all(
            len(set(term)) == len(term) and (rows | columns | summed) <= left | right for term in (*terms, result)
        )
        if not alike or {len(summed), len(rows), len(columns)} != {1} or len(result) != len(batch) + 2:
            return False
        extents = [dict(zip(term, v.shape, strict=True)) for term, v in zip(terms, node.operands, strict=True)]
        if any(extents[0][letter] != extents[1][letter] for letter in left & right):
            return False
        (r,), (c,), (d,) = rows, columns, summed
        operands = list(node.operands)
        if result.index(c) < result.index(r):  # the transposed product
            operands, terms, r, c = operands[::-1], terms[::-1], c, r
        orders = ([*batch, r, d], [*batch, d, c])
        made = [
            self.transposed(value, [term.index(letter) for letter in order], node)
            for value, term, order in zip(operands, terms, orders, strict=True)
        ]
        order = [*batch, r, c]
        self.product(node, made, [order.index(letter) for letter in result])
        return True

    def fused(self, node: Node) -> bool:
        """Transposed operands; a factor only where it is 1."""
        plain = not any(node.attributes.get(name) for name in ("transBatchA", "transBatchB"))
        if node.attributes.get("alpha", 1.0) != 1.0 or not plain or min(v.tensor.rank for v in node.operands) < 2:
            return False
        made = []
        for value, name in zip(node.operands, ("transA", "transB"), strict=True):
            order = list(range(value.tensor.rank))
            if node.attributes.get(name):
                order[-2:] = order[-1], order[-2]
            made.append(self.transposed(value, order, node))
        self.product(node, made, list(range(node.output.tensor.rank)))
        return True

    def transposed(self, value: Value, perm: list[int], node: Node) -> Value:
        if perm == sorted(perm):
            return value
        attributes = {"perm": tuple(perm)}
        return self.emit("Transpose", (value,), attributes, stem=f"{value.name}.moved", origin=node.origin)

    def product(self, node: Node, operands: list[Value], perm: list[int]) -> None:
        if perm == sorted(perm):
            self.emit("MatMul", operands, stem=node.output.name, origin=node.origin, output=node.output)
            return
        total = self.emit("MatMul", operands, stem=f"{node.output.name}.product", origin=node.origin)
        attributes = {"perm": tuple(perm)}
        self.emit("Transpose", (total,), attributes, stem="", origin=node.origin, output=node.output)
