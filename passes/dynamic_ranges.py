"""DynamicQuantizeLinear as what it is made of: the least and the greatest element, and a QuantizeLinear.

The range is a reduction that whatever makes the tensor need not wait for, and the quantizing an elementwise operator
like any other: transposes pass both, the operators before them stay with the product or convolution that they follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..ir.graph import Graph, Node
from .cleanup import without_dead_code
from .pipeline import Pass, register
from .rewriting import Rewriter


@register
@dataclass(frozen=True)
class DynamicRanges(Pass):
    """Spells DynamicQuantizeLinear out."""

    name = "dynamic-ranges"

    def run(self, graph: Graph) -> Graph:
        return without_dead_code(_Ranges(graph).run())


class _Ranges(Rewriter):
    def visit(self, node: Node) -> None:
        if node.op != "DynamicQuantizeLinear":
            self.add(node)
            return
        x, stem, origin = node.operands[0], node.outputs[0].name, node.origin
        quantized, scale, zero = node.outputs
        nothing, one, steps = (self.constant(np.array(n, x.dtype.numpy), f"{stem}.c") for n in (0, 1, 255))

        def emit(op: str, *inputs: object, **more: object) -> object:
            return self.emit(op, inputs, stem=f"{stem}.{op.lower()}", origin=origin, **more)  # type: ignore[arg-type]

        low = emit("Min", emit("ReduceMin", x, attributes={"keepdims": 0}), nothing)
        high = emit("Max", emit("ReduceMax", x, attributes={"keepdims": 0}), nothing)
        unit = emit("Div", emit("Sub", high, low), steps)
        emit("Where", emit("Equal", high, low), one, unit, output=scale)
        emit("QuantizeLinear", emit("Neg", low), scale, output=zero)
        emit("QuantizeLinear", x, scale, zero, output=quantized)
