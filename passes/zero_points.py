"""Products of integers without zero points: what tensor cores multiply are bytes as they lie in memory.

    sum of (a - za) * (b - zb)  =  sum of a * b  -  za * (sum of b)  -  zb * (sum of a - za)

over the axis that is summed (Jacob et al. 2018, section 2.3), everything modulo 2^32, so the result is the same.
Weights that are known take their zero point in where they stay 8 bits wide, and their sums are constants: what is left
is one addition to the product's sums, which fusion takes in. An image is surrounded by its zero point before it is
convolved, where that is not 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..ir.dtypes import I8, I32, U8
from ..ir.graph import Graph, Node, Value
from ..ir.ops.windows import sliding
from .cleanup import without_dead_code
from .pipeline import Pass, register
from .rewriting import Rewriter

BYTES = (I8, U8)


@register
@dataclass(frozen=True)
class ZeroPoints(Pass):
    """Takes the zero points out of MatMulInteger and ConvInteger; see the module."""

    name = "zero-points"

    def run(self, graph: Graph) -> Graph:
        return without_dead_code(_Without(graph).run())


class _Without(Rewriter):
    def visit(self, node: Node) -> None:
        taken = {"MatMulInteger": self.product, "ConvInteger": self.convolution}.get(node.op)
        if taken is None or len(node.inputs) < 3 or not taken(node):
            self.add(node)

    # What both have.

    def weights(self, node: Node, axis: int) -> tuple[Value, Value | None, np.ndarray | None]:
        """The second operand and its zero point, none where the operand is a constant that takes it in (there is one
        for all, or one along `axis`); and the array of that operand where it is known."""
        value, zero = node.operands[1], (*node.inputs, None, None)[3]
        array, point = self.array(value), self.array(zero)
        if array is None or (zero is not None and point is None):
            return value, zero, array
        if point is not None:
            spread = point.reshape(-1, *(1,) * (-1 - axis)) if point.ndim == 1 else point
            moved = array.astype(np.int32) - spread.astype(np.int32)
            for dtype in (np.int8, np.uint8):
                if moved.size == 0 or (moved.min() >= np.iinfo(dtype).min and moved.max() <= np.iinfo(dtype).max):
                    array = moved.astype(dtype)
                    return self.constant(array, f"{node.output.name}.weights", node.origin), None, array
            return value, zero, array
        return value, None, array

    def wide(self, value: Value, node: Node) -> Value:
        """A value in i32."""
        return self.emit("Cast", (value,), {"to": I32}, stem=f"{node.output.name}.wide", origin=node.origin)

    def combine(self, op: str, node: Node, *values: Value, output: Value | None = None) -> Value:
        stem = f"{node.output.name}.{op.lower()}"
        return self.emit(op, values, stem=stem, origin=node.origin, output=output)

    def column(self, zero: Value, node: Node) -> Value:
        """Zero points of rows, a vector, as a column: in i32."""
        zero = self.wide(zero, node)
        if zero.tensor.rank != 1 or zero.shape == (1,):
            return zero
        axes = self.constant(np.array([-1], np.int64), f"{node.output.name}.axes", node.origin)
        return self.emit("Unsqueeze", (zero, axes), stem=f"{node.output.name}.column", origin=node.origin)

    def is_nothing(self, zero: Value | None) -> bool:
        """Whether a zero point is 0 throughout."""
        array = self.array(zero)
        return zero is None or (array is not None and not array.any())

    # Products: a [..., M, K] and b [..., K, N].

    def product(self, node: Node) -> bool:
        """Adds a product of bytes and what its zero points bring; False where there is none or they are no bytes."""
        a, za, stem, origin = node.operands[0], node.inputs[2], node.output.name, node.origin
        if min(a.tensor.rank, node.operands[1].tensor.rank) < 2 or not {a.dtype, node.operands[1].dtype} <= set(BYTES):
            return False
        b, zb, array = self.weights(node, -1)
        terms: list[Value] = []
        if not self.is_nothing(za):
            assert za is not None
            if array is None:
                sums = self.sums(self.wide(b, node), -2, node)
            else:
                known = array.sum(-2, keepdims=True, dtype=np.int64).astype(np.int32)
                sums = self.constant(known[..., 0, :] if array.ndim == 2 else known, f"{stem}.sums", origin)
            terms.append(self.combine("Mul", node, sums, self.column(za, node)))
        if not self.is_nothing(zb):
            assert zb is not None
            rows = self.wide(a, node)
            if not self.is_nothing(za):
                assert za is not None
                rows = self.combine("Sub", node, rows, self.column(za, node))
            terms.append(self.combine("Mul", node, self.sums(rows, -1, node), self.wide(zb, node)))
        self.without("MatMulInteger", node, a, b, terms)
        return True

    def sums(self, value: Value, axis: int, node: Node) -> Value:
        stem, origin = f"{node.output.name}.sums", node.origin
        return self.emit("ReduceSum", (value,), {"axes": (axis,), "keepdims": 1}, stem=stem, origin=origin)

    def without(self, op: str, node: Node, a: Value, b: Value, terms: list[Value]) -> None:
        """Adds the sums of the bytes, less the terms, as the node's result."""
        stem, origin = f"{node.output.name}.bytes", node.origin
        own = None if terms else node.output
        total = self.emit(op, (a, b), node.attributes, stem=stem, origin=origin, output=own)
        for number, term in enumerate(terms, 1):
            own = node.output if number == len(terms) else None
            total = self.combine("Sub", node, total, term, output=own)

    # Convolutions: x [N, C, *spatial] and weights [M, C/group, *kernel] that are known.

    def convolution(self, node: Node) -> bool:
        """Adds a convolution of bytes and what the image's zero point brings; False where that cannot be."""
        x, zero, rank = node.operands[0], node.inputs[2], node.operands[0].tensor.rank
        if "layout" in node.attributes or not {x.dtype, node.operands[1].dtype} <= set(BYTES):
            return False
        if zero is not None and zero.tensor.rank and zero.shape != (1,):
            return False
        pads = None if self.is_nothing(zero) else self.padding(node)
        if not self.is_nothing(zero) and pads is None:
            return False
        w, own, array = self.weights(node, -rank)
        if array is None or not self.is_nothing(own):
            return False
        if self.is_nothing(zero):
            self.without("ConvInteger", node, x, w, [])
            return True
        assert zero is not None and pads is not None
        stem, origin = node.output.name, node.origin
        if any(pads):
            half = len(pads) // 2
            around = {"pads": (0, 0, *pads[:half], 0, 0, *pads[half:])}
            fill = zero
            if zero.tensor.rank:
                shape = self.constant(np.array([], np.int64), f"{stem}.shape", origin)
                fill = self.emit("Reshape", (zero, shape), stem=f"{stem}.zero", origin=origin)
            x = self.emit("Pad", (x, None, fill), around, stem=f"{stem}.padded", origin=origin)
        known = array.reshape(len(array), -1).sum(1, dtype=np.int64).astype(np.int32)
        sums = self.constant(known.reshape(-1, *(1,) * (rank - 2)), f"{stem}.sums", origin)
        left = {name: value for name, value in node.attributes.items() if name not in ("auto_pad", "pads")}
        term = self.combine("Mul", node, sums, self.wide(zero, node))
        self.without("ConvInteger", Node(node.op, node.inputs, node.outputs, left, {}, origin), x, w, [term])
        return True

    def padding(self, node: Node) -> tuple[int, ...] | None:
        """How far the windows reach beyond the image: before each spatial axis, then behind; None where only the run
        tells."""
        names = ("strides", "dilations", "pads", "auto_pad")
        options = {name: node.attributes[name] for name in names if node.attributes.get(name) is not None}
        image, weights = node.operands[0], node.operands[1]
        windows = sliding(image.shape[2:], weights.shape[2:], **options)  # type: ignore[arg-type]
        widths = (*windows.before, *windows.after)
        if not all(isinstance(width, int) for width in widths):
            return None
        return tuple(int(str(width)) for width in widths)
