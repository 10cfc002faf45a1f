"""Weights alone as integers: 8 bits per channel, or 4 bits in blocks along the sums, behind DequantizeLinear."""

from __future__ import annotations

from onnx import NodeProto

from .inner import Scope, rewrite_graphs
from .model import Draft, attribute, make_node
from .settings import Settings, Summary
from .weights import four_bits, in_blocks, quantised

PRODUCTS = ("MatMul", "Gemm")


class WeightsOnly:
    """Rewrites the nodes of a model; integer weights are made once for all nodes that share them."""

    def __init__(self, draft: Draft, settings: Settings, summary: Summary) -> None:
        self.draft, self.settings, self.summary = draft, settings, summary
        self.narrow = settings.weights_only == "int4"
        self.operators = PRODUCTS if self.narrow else (*PRODUCTS, "Conv")

    def run(self) -> None:
        rewrite_graphs(self.draft, self._rewritten)
        self.draft.constants = {tensor.name: tensor for tensor in self.draft.graph.initializer}

    def _rewritten(self, node: NodeProto, scope: Scope) -> list[NodeProto] | None:
        if node.domain not in ("", "ai.onnx") or node.op_type not in self.operators:
            return None
        weight, reason = node.input[1], None
        if self.settings.kept(node):
            reason = "it is to be kept"
        elif not scope.is_float(weight):
            reason = "its weights are computed, or not FLOAT"
        elif len(scope.constants[weight].dims) < 2 or 0 in scope.constants[weight].dims:
            reason = "its weights are no matrix"
        if reason is not None:
            self.summary.leave(node, reason)
            return None
        self.summary.count(node)
        rank = len(scope.constants[weight].dims)
        rows_are_channels = node.op_type == "Conv" or bool(attribute(node, "transB", 0))
        channels, depth = (0, 1) if rows_are_channels else (rank - 1, rank - 2)
        key = (weight, str(depth))
        if key not in scope.made:
            operands = self._made(weight, depth if self.narrow else channels, scope)
            result = self.draft.unused(f"{weight}_DequantizeLinear_Output")
            name = self.draft.unused(f"{weight}_DequantizeLinear")
            more = {"block_size": self.settings.block} if self.narrow else {}
            scope.made[key] = [result]
            made = [
                make_node("DequantizeLinear", operands, result, name, axis=depth if self.narrow else channels, **more)
            ]
        else:
            made = []
        node.input[1] = scope.made[key][0]
        return [*made, node]

    def _made(self, weight: str, axis: int, scope: Scope) -> list[str]:
        """The constants of quantised weights: values, scales, and zero points where there are any."""
        weights = scope.array(weight)
        if not self.narrow:
            plain = quantised(weights, axis)
            values = scope.add_constant(f"{weight}_quantized", plain.values)
            return [values, scope.add_constant(f"{weight}_scale", plain.scale)]
        found = in_blocks(weights, axis, self.settings.block, self.settings.symmetric)
        values = scope.add_constant(f"{weight}_quantized", four_bits(found.values, self.settings.symmetric))
        operands = [values, scope.add_constant(f"{weight}_scale", found.scale)]
        if found.zero is not None:
            operands.append(scope.add_constant(f"{weight}_zero_point", four_bits(found.zero, False)))
        return operands


__all__ = ["WeightsOnly"]
