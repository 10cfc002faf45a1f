"""Dynamic quantization: ranges of activations are found at run time, by DynamicQuantizeLinear.

Matrix products by constants become MatMulInteger and convolutions ConvInteger, standard operators all. For recurrent
layers ONNX has no integer form: LSTM becomes com.microsoft.DynamicQuantizeLSTM, as ONNX Runtime's quantizer writes it;
others stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from .embeddings import is_table, looked_up
from .inner import Scope, rewrite_graphs
from .model import Draft, attribute, make_node
from .settings import Settings, Summary
from .weights import quantised

Array = NDArray[Any]
MICROSOFT = "com.microsoft"
Add: TypeAlias = Callable[..., str]
SIGNAL = "8 bits hold too little of signals and spectra, unless calibration data says how to smooth them"
"""Said of convolutions over one axis. One range for all of a spectrum, silence included, leaves 15 dB of Silero VAD;
with these convolutions in float it is 35."""
CONSIDERED = ("MatMul", "Gemm", "LSTM", "GRU", "RNN", "Conv", "Gather")


class Dynamic:
    """Rewrites the nodes of a model; integer weights are made once for all nodes that share them."""

    def __init__(
        self, draft: Draft, settings: Settings, summary: Summary, operators: Collection[str] = CONSIDERED
    ) -> None:
        """`operators` are looked at, others left as they are."""
        self.draft, self.settings, self.summary, self.operators = draft, settings, summary, operators
        self.microsoft = False

    def run(self) -> None:
        rewrite_graphs(self.draft, self._rewritten)
        if self.microsoft and all(entry.domain != MICROSOFT for entry in self.draft.proto.opset_import):
            self.draft.proto.opset_import.append(helper.make_opsetid(MICROSOFT, 1))

    def _rewritten(self, node: NodeProto, scope: Scope) -> list[NodeProto] | None:
        if "Gather" in self.operators and is_table(node, scope) and not self.settings.kept(node):
            self.summary.count(node)
            return looked_up(node, scope)
        if node.domain not in ("", "ai.onnx") or node.op_type not in self.operators:
            return None
        if node.op_type == "Gather":
            return None
        reason = "it is to be kept" if self.settings.kept(node) else self._refusal(node, scope)
        if reason is not None:
            self.summary.leave(node, reason)
            return None
        self.summary.count(node)
        make = {"LSTM": self._lstm, "Conv": self._convolution}.get(node.op_type, self._product)
        return make(node, scope)

    def _refusal(self, node: NodeProto, scope: Scope) -> str | None:
        if node.op_type in ("GRU", "RNN"):
            return "there is no integer form of it: --weights-only int8"
        if node.input[1] not in scope.graph.constants:
            return "both its operands are computed"
        constants = node.input[1:3] if node.op_type == "LSTM" else node.input[1:2]
        if not all(scope.graph.is_float(name) for name in constants):
            return "its weights are computed, or not FLOAT"
        if node.op_type == "LSTM":
            return "its batch is the first axis" if attribute(node, "layout", 0) else None
        if node.op_type == "Conv" and len(scope.graph.constants[node.input[1]].dims) == 3:
            return SIGNAL
        if node.op_type != "Conv" and len(scope.graph.constants[node.input[1]].dims) != 2:
            return "its weights are no matrix"
        if node.op_type == "Gemm" and attribute(node, "transA", 0):
            return "its left operand is transposed"
        return None

    def _weights(self, name: str, how: str, scope: Scope) -> list[str]:
        """Integer weights and their scales: a matrix [depth, columns] as it is, or "transposed" to that, or the
        "filters" of a convolution, whose scales are [filters, 1...]."""
        key = (name, how)
        if key not in scope.made:
            weights = scope.graph.array(name)
            weights, axis = (weights.T, 1) if how == "transposed" else (weights, 0 if how == "filters" else 1)
            found = quantised(weights, None if self.settings.per_tensor else axis)
            scale = found.scale.reshape(-1, *[1] * (weights.ndim - 2)) if how == "filters" else found.scale
            scope.made[key] = [
                scope.graph.add_constant(f"{name}_quantized", np.ascontiguousarray(found.values)),
                scope.graph.add_constant(f"{name}_scale", scale),
            ]
        return scope.made[key]

    def _sums(self, node: NodeProto, operator: str, how: str, scope: Scope) -> tuple[list[NodeProto], Add, str]:
        """The sums of products of integers times both scales: the nodes, what adds one, and the result's name."""
        draft, nodes = self.draft, list[NodeProto]()

        def add(operator: str, inputs: list[str], suffix: str, **attributes: Any) -> str:
            result = draft.unused(f"{node.output[0]}_{suffix}")
            nodes.append(make_node(operator, inputs, result, draft.unused(f"{node.name}_{suffix}"), **attributes))
            return result

        x = node.input[0]
        if (x,) not in scope.made:
            names = [draft.unused(f"{x}_{what}") for what in ("quantized", "scale", "zero_point")]
            nodes.append(
                helper.make_node("DynamicQuantizeLinear", [x], names, draft.unused(f"{x}_DynamicQuantizeLinear"))
            )
            scope.made[(x,)] = names
        values, scale, zero = scope.made[(x,)]
        weights, scales = self._weights(node.input[1], how, scope)
        integer = add(operator, [values, weights, zero], "integer")
        if operator == "ConvInteger":
            nodes[-1].attribute.extend(node.attribute)
        sums = add("Cast", [integer], "float", to=TensorProto.FLOAT)
        return nodes, add, add("Mul", [sums, add("Mul", [scale, scales], "scales")], "scaled")

    def _convolution(self, node: NodeProto, scope: Scope) -> list[NodeProto]:
        """ConvInteger, with the bias added in float."""
        nodes, add, result = self._sums(node, "ConvInteger", "filters", scope)
        bias = node.input[2] if len(node.input) > 2 else ""
        if bias:
            shape = scope.graph.add_constant(f"{node.name}_shape", np.array([-1, *[1] * (self._rank(node, scope) - 2)]))
            add("Add", [result, add("Reshape", [bias, shape], "bias")], "sum")
        nodes[-1].output[0] = node.output[0]
        return nodes

    @staticmethod
    def _rank(node: NodeProto, scope: Scope) -> int:
        return len(scope.graph.constants[node.input[1]].dims)

    def _product(self, node: NodeProto, scope: Scope) -> list[NodeProto]:
        """x @ W: MatMulInteger."""
        how = "transposed" if attribute(node, "transB", 0) else "matrix"
        nodes, add, result = self._sums(node, "MatMulInteger", how, scope)
        for place, factor in ((None, "alpha"), (2, "beta")):
            operand = result if place is None else node.input[place] if len(node.input) > place else ""
            by = attribute(node, factor, 1.0)
            if operand and by != 1.0:
                constant = scope.graph.add_constant(f"{node.name}_{factor}", np.array(by, np.float32))
                operand = add("Mul", [operand, constant], factor)
            result = operand if place is None else add("Add", [result, operand], "sum") if operand else result
        nodes[-1].output[0] = node.output[0]
        return nodes

    def _lstm(self, node: NodeProto, scope: Scope) -> list[NodeProto]:
        """com.microsoft.DynamicQuantizeLSTM: weights [directions, depth, 4 hidden], scales [directions, 4 hidden] (or
        [directions]), and zero points."""
        self.microsoft = True
        operands = []
        for name in node.input[1:3]:
            weights = scope.graph.array(name)
            parts = [quantised(part.T, None if self.settings.per_tensor else 1) for part in weights]
            scale = np.stack([part.scale for part in parts])
            operands.append(scope.graph.add_constant(f"{name}_quantized", np.stack([part.values for part in parts])))
            operands += [
                scope.graph.add_constant(f"{name}_scale", scale),
                scope.graph.add_constant(f"{name}_zero_point", np.zeros(scale.shape, np.int8)),
            ]
        w, w_scale, w_zero, r, r_scale, r_zero = operands
        others = [*node.input[3:], *[""] * 5][:5]
        new = helper.make_node(
            "DynamicQuantizeLSTM",
            [node.input[0], w, r, *others, w_scale, w_zero, r_scale, r_zero],
            list(node.output),
            node.name,
            domain=MICROSOFT,
        )
        new.attribute.extend(entry for entry in node.attribute if entry.name != "layout")
        return [new]


__all__ = ["Dynamic"]
