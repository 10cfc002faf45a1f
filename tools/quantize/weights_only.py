"""Weights alone as integers: 8 bits per channel, or 4 bits in blocks along the sums, behind DequantizeLinear."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from .embeddings import is_table, looked_up
from .inner import Scope, rewrite_graphs
from .model import Draft, attribute, make_node
from .settings import Settings, Summary
from .weights import four_bits, in_blocks, quantised

Array = NDArray[Any]
RECURRENT = ("LSTM", "GRU", "RNN")
AXES = {"Conv": 0, "ConvTranspose": 1, **dict.fromkeys(RECURRENT, 1)}
"""Of the channels that have a scale each, where it is not that of a matrix's columns: filters, or the rows of gates."""


class WeightsOnly:
    """Rewrites the nodes of a model; integer weights are made once for all nodes that share them."""

    def __init__(self, draft: Draft, settings: Settings, summary: Summary) -> None:
        self.draft, self.settings, self.summary = draft, settings, summary
        self.narrow = settings.weights_only == "int4"
        self.operators = ("MatMul", "Gemm", *(() if self.narrow else AXES))

    def run(self) -> None:
        rewrite_graphs(self.draft, self._rewritten)

    def _rewritten(self, node: NodeProto, scope: Scope) -> list[NodeProto] | None:
        if is_table(node, scope) and not self.settings.kept(node):
            self.summary.count(node)
            return looked_up(node, scope)
        if node.domain not in ("", "ai.onnx") or node.op_type not in self.operators:
            return None
        places = (1, 2) if node.op_type in RECURRENT else (1,)
        reasons = [self._refusal(node, node.input[place], scope) for place in places]
        if any(reasons):
            self.summary.leave(node, next(filter(None, reasons)))
            return None
        self.summary.count(node)
        made: list[NodeProto] = []
        for place in places:
            node.input[place] = self._dequantised(node, node.input[place], scope, made)
        return [*made, node]

    def _refusal(self, node: NodeProto, weight: str, scope: Scope) -> str | None:
        if self.settings.kept(node):
            return "it is to be kept"
        if weight not in scope.graph.constants:
            return "both its operands are computed"
        if not scope.graph.is_real(weight):
            return "its weights are no floats"
        dims = scope.graph.constants[weight].dims
        return "its weights are no matrix" if len(dims) < 2 or 0 in dims else None

    def _dequantised(self, node: NodeProto, weight: str, scope: Scope, made: list[NodeProto]) -> str:
        """The name of a node's dequantised weights; what makes them, if nothing did yet, goes into `made`."""
        rank = len(scope.graph.constants[weight].dims)
        axis = AXES.get(node.op_type, 0 if attribute(node, "transB", 0) else rank - 1)
        if self.narrow:  # blocks along the sums
            axis = 1 if axis == 0 else rank - 2
        key = (weight, str(axis))
        if key not in scope.made:
            result = self.draft.unused(f"{weight}_DequantizeLinear_Output")
            name = self.draft.unused(f"{weight}_DequantizeLinear")
            more = {"block_size": self.settings.block} if self.narrow else {}
            operands = self._made(weight, axis, scope)
            made.append(make_node("DequantizeLinear", operands, result, name, axis=axis, **more))
            scope.made[key] = [result]
        return scope.made[key][0]

    def _made(self, weight: str, axis: int, scope: Scope) -> list[str]:
        """The constants of quantised weights: values, scales of the weights' type, and zero points where there are
        any."""
        weights, graph = scope.graph.array(weight), scope.graph
        if self.narrow:
            found = in_blocks(weights, axis, self.settings.block, self.settings.symmetric, self.settings.threads)
            values: Array | TensorProto = four_bits(found.values, self.settings.symmetric)
        else:
            found = quantised(weights, axis)
            values = found.values
        operands = [graph.add_constant(f"{weight}_quantized", values)]
        operands.append(graph.add_constant(f"{weight}_scale", found.scale.astype(weights.dtype)))
        if found.zero is not None:
            operands.append(graph.add_constant(f"{weight}_zero_point", four_bits(found.zero, False)))
        return operands


__all__ = ["WeightsOnly"]
