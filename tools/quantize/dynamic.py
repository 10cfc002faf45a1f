"""Dynamic quantization: ranges of activations are found at run time, by DynamicQuantizeLinear.

Matrix products by constants become MatMulInteger, standard operators all. For recurrent layers ONNX has no integer
form: LSTM becomes com.microsoft's DynamicQuantizeLSTM, as ONNX Runtime's quantizer writes it; others stay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from .inner import Scope, rewrite_graphs
from .model import Draft, attribute, make_node
from .settings import Settings, Summary
from .weights import quantised

Array = NDArray[Any]
MICROSOFT = "com.microsoft"
CONSIDERED = ("MatMul", "Gemm", "LSTM", "GRU", "RNN", "Conv")


class Dynamic:
    """Rewrites the nodes of a model; integer weights are made once for all nodes that share them."""

    def __init__(self, draft: Draft, settings: Settings, summary: Summary) -> None:
        self.draft, self.settings, self.summary = draft, settings, summary
        self.microsoft = False

    def run(self) -> None:
        rewrite_graphs(self.draft, self._rewritten)
        if self.microsoft and all(entry.domain != MICROSOFT for entry in self.draft.proto.opset_import):
            self.draft.proto.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        self.draft.constants = {tensor.name: tensor for tensor in self.draft.graph.initializer}

    def _rewritten(self, node: NodeProto, scope: Scope) -> list[NodeProto] | None:
        if node.domain not in ("", "ai.onnx") or node.op_type not in CONSIDERED:
            return None
        reason = "it is to be kept" if self.settings.kept(node) else self._refusal(node, scope)
        if reason is not None:
            self.summary.leave(node, reason)
            return None
        self.summary.count(node)
        return self._lstm(node, scope) if node.op_type == "LSTM" else self._product(node, scope)

    def _refusal(self, node: NodeProto, scope: Scope) -> str | None:
        if node.op_type in ("GRU", "RNN"):
            return "there is no integer form of it"
        if node.op_type == "Conv":
            return "convolutions are quantised with calibration data"
        constants = node.input[1:3] if node.op_type == "LSTM" else node.input[1:2]
        if not all(scope.is_float(name) for name in constants):
            return "its weights are computed, or not FLOAT"
        if node.op_type == "LSTM":
            return "its batch is the first axis" if attribute(node, "layout", 0) else None
        if len(scope.constants[node.input[1]].dims) != 2:
            return "its weights are no matrix"
        if node.op_type == "Gemm" and attribute(node, "transA", 0):
            return "its left operand is transposed"
        return None

    def _matrix(self, name: str, transposed: bool, scope: Scope) -> list[str]:
        """Integer weights [depth, columns] and their scales."""
        key = (name, str(transposed))
        if key not in scope.made:
            weights = scope.array(name)
            found = quantised(weights.T if transposed else weights, None if self.settings.per_tensor else 1)
            scope.made[key] = [
                scope.add_constant(f"{name}_quantized", np.ascontiguousarray(found.values)),
                scope.add_constant(f"{name}_scale", found.scale),
            ]
        return scope.made[key]

    def _product(self, node: NodeProto, scope: Scope) -> list[NodeProto]:
        """x @ W: the integers' product, times both scales."""
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
        weights, scales = self._matrix(node.input[1], bool(attribute(node, "transB", 0)), scope)
        sums = add("Cast", [add("MatMulInteger", [values, weights, zero], "integer")], "float", to=TensorProto.FLOAT)
        result = add("Mul", [sums, add("Mul", [scale, scales], "scales")], "scaled")
        for place, factor in ((None, "alpha"), (2, "beta")):
            operand = result if place is None else node.input[place] if len(node.input) > place else ""
            by = attribute(node, factor, 1.0)
            if operand and by != 1.0:
                constant = scope.add_constant(f"{node.name}_{factor}", np.array(by, np.float32))
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
            weights = scope.array(name)
            parts = [quantised(part.T, None if self.settings.per_tensor else 1) for part in weights]
            scale = np.stack([part.scale for part in parts])
            operands.append(scope.add_constant(f"{name}_quantized", np.stack([part.values for part in parts])))
            operands += [
                scope.add_constant(f"{name}_scale", scale),
                scope.add_constant(f"{name}_zero_point", np.zeros(scale.shape, np.int8)),
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
