"""Static quantization: a model with QuantizeLinear and DequantizeLinear around what computes with integers (QDQ).

Names are those that ONNX Runtime's quantizer gives, so that tools which compare such models find their way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from .correction import mean_error
from .graph import GraphDraft
from .model import attribute, make_node
from .places import CLAMPS, Places, data_of, is_mover, of_integers
from .ranges import Grid
from .settings import Settings, Summary
from .statistics import Statistics
from .weights import Quantised, quantised

Array = NDArray[Any]
LARGEST_BIAS = float(1 << 30)
"""Of a bias in integers. Where it would be larger (a channel of tiny weights), the weights' scale is made larger."""
CLOSE = 1e-6
"""Of a bound of Clip, by which the largest quantised value may be beyond it: rounding of the scale."""


class Rewriter:
    """Makes the QDQ form of a model of whose stored values the grids are known."""

    def __init__(
        self,
        draft: GraphDraft,
        places: Places,
        grids: Mapping[str, Grid],
        statistics: Mapping[str, Statistics],
        settings: Settings,
        summary: Summary,
    ) -> None:
        self.draft, self.places, self.grids, self.statistics = draft, places, grids, statistics
        self.settings, self.summary = settings, summary
        self.readers, self.definers, self.fixed = draft.readers(), draft.definers(), draft.fixed()
        self.nodes: list[NodeProto] = []
        self.dequantised: dict[str, str] = {}
        self._grids: dict[str, tuple[str, str]] = {}
        self._weights: dict[tuple[str, int | None, bytes], tuple[Quantised, str]] = {}
        self._biases: dict[str, str] = {}
        """Constants that replace others as operands of an Add, by the Add's name."""

    def run(self) -> None:
        draft = self.draft
        gone = self._removed()
        for name in draft.given():
            self._store(name)
        for node in draft.graph.node:
            if node.name in gone:
                continue
            new = NodeProto()
            new.CopyFrom(node)
            for place, name in enumerate(node.input):
                if name in self.grids and self._reads_integers(node, name):
                    new.input[place] = self.dequantised[name]
            if node.name in self._biases:
                constant = next(place for place, name in enumerate(node.input) if name in draft.constants)
                new.input[constant] = self._biases[node.name]
            if node.name in self.places.anchors:
                self._weigh(node, new)
                self.summary.count(node)
            following = self.readers.get(node.output[0], ()) if node.output else ()
            if len(following) == 1 and following[0].name in gone:
                new.output[0] = following[0].output[0]
            self.nodes.append(new)
            for name in new.output:
                self._store(name)
        draft.replace_nodes(self.nodes)
        self.summary.tensors += len(self.grids)

    def _removed(self) -> set[str]:
        """Activations that saturation does: of values that all read in integers, within the activation's bounds."""
        found = set()
        for node in self.draft.graph.node:
            if (
                node.op_type not in CLAMPS
                or node.domain
                or node.output[0] not in self.grids
                or node.output[0] in self.fixed
            ):
                continue
            result, operand = node.output[0], node.input[0]
            alone = len(self.readers[operand]) == 1 and operand not in self.fixed and operand in self.definers
            integers = all(self._reads_integers(reader, result) for reader in self.readers.get(result, ()))
            bounds, grid = self._bounds(node), self.grids[result]
            if not (alone and integers and bounds is not None) or operand in self.grids or self.settings.kept(node):
                continue
            slack = CLOSE * max(abs(grid.low), abs(grid.high))
            if bounds[0] <= grid.low + slack and grid.high - slack <= bounds[1]:
                found.add(node.name)
        return found

    def _bounds(self, node: NodeProto) -> tuple[float, float] | None:
        """What an activation clips to; None where that is computed."""
        if node.op_type == "Relu":
            return 0.0, np.inf
        given = [node.input[place] if len(node.input) > place else "" for place in (1, 2)]
        if any(name and name not in self.draft.constants for name in given):
            return None
        low, high = (float(self.draft.array(name).reshape(())) if name else None for name in given)
        return -np.inf if low is None else low, np.inf if high is None else high

    def _reads_integers(self, node: NodeProto, name: str) -> bool:
        """Whether this node takes the stored form of a value: whoever computes with integers or moves them, and
        everybody where the value came out of integers. (What a float operator gave is as well read as it was, where an
        engine has it anyway: the sums in transformers, which 8 bits harm most.)"""
        if name not in node.input:  # an inner graph reads it
            return False
        if node.name in self.places.anchors:
            return name in node.input[:2]
        if is_mover(node) and any(result in self.grids for result in node.output):
            return name in data_of(node)
        return of_integers(name, self.draft, self.definers, self.grids, self.places)

    def _store(self, name: str) -> None:
        """Quantises a value that was just computed, if it is to be stored so."""
        if name not in self.grids or name in self.dequantised:
            return
        draft, operands = self.draft, self._grid(name)
        stored, back = (draft.unused(f"{name}_{kind}_Output") for kind in ("QuantizeLinear", "DequantizeLinear"))
        for kind, source, result in (("QuantizeLinear", name, stored), ("DequantizeLinear", stored, back)):
            self.nodes.append(make_node(kind, [source, *operands], result, draft.unused(f"{name}_{kind}")))
        self.dequantised[name] = back

    def _grid(self, name: str) -> tuple[str, str]:
        """The constants of a value's grid: scale and zero point, the same for all values of a group."""
        group, grid = self.places.groups[name], self.grids[name]
        if group not in self._grids:
            scale = self.draft.add_constant(f"{group}_scale", np.array(grid.scale, np.float32))
            zero = self.draft.add_constant(f"{group}_zero_point", np.array(grid.zero, grid.dtype))
            self._grids[group] = scale, zero
        return self._grids[group]

    def _weigh(self, node: NodeProto, new: NodeProto) -> None:
        """Puts the quantised weights and bias into the new form of a node that computes with integers."""
        draft, weight = self.draft, node.input[1]
        if weight not in draft.constants:
            return
        axis = self._axis(node)
        scale_of_x = np.float64(self.grids[node.input[0]].scale)
        bias = self._bias(node, axis)
        # A bias in integers has the scale of the products; channels that hardly have weights would make it overflow.
        least = None if bias is None else np.abs(bias) / (scale_of_x * LARGEST_BIAS)
        found = self._quantised(weight, axis, least)
        new.input[1] = self._dequantised_weight(weight, found)
        means = self.statistics[node.input[0]].means if self.settings.correction else None
        error = None
        if means is not None:
            error = mean_error(node, found.floats - draft.array(weight), means)
        if node.op_type == "MatMul":
            self._correct_sum(node, error)
        elif bias is not None:
            if error is not None:
                bias = bias - error
                self.summary.corrected += 1
            del new.input[2:]
            new.input.append(self._integer_bias(node, bias, np.float32(scale_of_x) * found.scale))

    def _axis(self, node: NodeProto) -> int | None:
        """The axis of the output channels in a node's weights; None where they get one scale."""
        rank = len(self.draft.shape(node.input[1]))
        if self.settings.per_tensor or (node.op_type == "MatMul" and rank != 2):
            return None
        if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
            return 0
        return 1

    def _bias(self, node: NodeProto, axis: int | None) -> Array | None:
        """The bias of a convolution or Gemm, zeros where it has none and is to be corrected; None where there is none
        or it cannot be quantised."""
        if node.op_type == "MatMul":
            return None
        name = node.input[2] if len(node.input) > 2 else ""
        channels = self.draft.shape(node.input[1])[0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1]
        if not name:
            return np.zeros(channels) if self.settings.correction else None
        if not self.draft.is_float(name) or self.draft.shape(name) != (channels,):
            return None
        return self.draft.array(name).astype(np.float64)

    def _quantised(self, weight: str, axis: int | None, least: Array | None) -> Quantised:
        array = self.draft.array(weight)
        if axis is None:
            return quantised(array, None, 0.0 if least is None else float(np.max(least, initial=0.0)))
        return quantised(array, axis, 0.0 if least is None else least)

    def _dequantised_weight(self, weight: str, found: Quantised) -> str:
        """The name of the dequantised weights; nodes that share weights share it."""
        key = (weight, found.axis, found.scale.tobytes())
        if key not in self._weights:
            draft = self.draft
            operands = [
                draft.add_constant(f"{weight}_quantized", found.values),
                draft.add_constant(f"{weight}_scale", found.scale),
                draft.add_constant(f"{weight}_zero_point", np.zeros(found.scale.shape, np.int8)),
            ]
            result = draft.unused(f"{weight}_DequantizeLinear_Output")
            name = draft.unused(f"{weight}_DequantizeLinear")
            axis = {} if found.axis is None else {"axis": found.axis}
            self.nodes.append(make_node("DequantizeLinear", operands, result, name, **axis))
            self._weights[key] = found, result
        return self._weights[key][1]

    def _integer_bias(self, node: NodeProto, bias: Array, scale: Array) -> str:
        """The bias as i32, dequantised."""
        draft, limit = self.draft, (1 << 31) - 1
        own = node.input[2] if len(node.input) > 2 and node.input[2] else f"{node.name}_bias"
        values = np.clip(np.rint(bias / scale.astype(np.float64)), -limit, limit).astype(np.int32)
        operands = [
            draft.add_constant(f"{own}_quantized", values),
            draft.add_constant(f"{own}_quantized_scale", scale.astype(np.float32)),
        ]
        result = draft.unused(f"{own}_DequantizeLinear_Output")
        axis = {"axis": 0} if scale.ndim else {}
        self.nodes.append(
            make_node("DequantizeLinear", operands, result, draft.unused(f"{own}_DequantizeLinear"), **axis)
        )
        return result

    def _correct_sum(self, node: NodeProto, error: Array | None) -> None:
        """Corrects the constant that is added to a matrix product, where there is one."""
        following = self.readers.get(node.output[0], ())
        if error is None or len(following) != 1 or following[0].op_type != "Add" or node.output[0] in self.fixed:
            return
        add, draft = following[0], self.draft
        constant = next((name for name in add.input if draft.is_float(name)), None)
        if constant is None or draft.shape(constant)[-1:] != (len(error),) or draft.array(constant).size != len(error):
            return
        corrected = (draft.array(constant) - error).astype(np.float32)
        self._biases[add.name] = draft.add_constant(f"{constant}_corrected", corrected)
        self.summary.corrected += 1


__all__ = ["Rewriter"]
