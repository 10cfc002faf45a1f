"""Scales and shifts of output channels folded into the weights and bias of what makes them.

BatchNormalization of known statistics is a scale and a shift per channel; so are Mul, Div, Add and Sub by a constant
per channel. Behind a Conv, ConvTranspose, Gemm or MatMul of constant weights they cost nothing: weights and bias are
multiplied once, in f64. A BatchNormalization elsewhere becomes one Mul and one Add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..ir.dtypes import F32, F64
from ..ir.graph import Graph, Node, Value, unite
from .cleanup import without_dead_code
from .pipeline import Pass, register
from .rewriting import Rewriter, until_stable

WIDE = np.float64


@register
@dataclass(frozen=True)
class Scale(Pass):
    """Folds scales and shifts per channel; see the module."""

    name = "scale"

    def run(self, graph: Graph) -> Graph:
        return until_stable(lambda found: without_dead_code(_Scaling(found).run()), graph)


@dataclass(frozen=True)
class Channelwise:
    """y = x * scale + shift, both f64 of one entry per channel; None for no scale, or no shift."""

    scale: np.ndarray | None
    shift: np.ndarray | None


class _Scaling(Rewriter):
    def visit(self, node: Node) -> None:
        found = self.channelwise(node)
        if found is None:
            self.add(node)
            return
        source = node.operands[0]
        producer = self.made_by(source, *SCALED)
        if producer is not None and self.readers(source) == 1 and self.scaled(producer, node, found):
            return
        if node.op == "BatchNormalization" and node.output.dtype in (F32, F64):
            self.multiply_and_add(node, found)
        else:
            self.add(node)

    # What a node does to each channel.

    def channelwise(self, node: Node) -> Channelwise | None:
        """The scale and shift that a node is, None for another one."""
        if len(node.outputs) != 1 or not node.operands or not node.output.dtype.is_float or node.output.tensor.rank < 2:
            return None
        if node.op == "BatchNormalization":
            parameters = [self.array(value) for value in node.inputs[1:]]
            if node.attributes.get("training_mode", 0) or any(array is None for array in parameters):
                return None
            gamma, beta, mean, variance = (array.astype(WIDE) for array in parameters if array is not None)
            epsilon = node.attributes.get("epsilon", 1e-5)
            assert isinstance(epsilon, float)
            scale = gamma / np.sqrt(variance + WIDE(np.float32(epsilon)))
            return Channelwise(scale, beta - mean * scale)
        effect = EFFECTS.get(node.op)
        if effect is None or node.inputs[0] is None or node.inputs[0].type != node.output.type:
            return None
        producer = self.made_by(node.inputs[0], *SCALED)
        constant = self.array(node.inputs[1])
        if producer is None or constant is None:
            return None
        values = per_channel(constant, node.output, channel_axis(producer))
        return None if values is None else effect(values)

    # What becomes of it.

    def scaled(self, producer: Node, node: Node, found: Channelwise) -> bool:
        """Adds the producer with scale and shift in its weights; whether it can take them."""
        arrays = [self.array(value) for value in producer.inputs]
        weights = arrays[1] if len(arrays) > 1 else None
        if weights is None or (node.op == "BatchNormalization" and channel_axis(node) != channel_axis(producer)):
            return False
        if found.scale is not None and self.readers(producer.operands[1]) > 1:
            return False  # a second copy of the weights
        fold = SCALED[producer.op]
        inputs, attributes = list(producer.inputs), dict(producer.attributes)
        changed = fold(producer, weights, arrays[2] if len(arrays) > 2 else None, found)
        if changed is None or (len(producer.inputs) > 2 and producer.inputs[2] is not None and arrays[2] is None):
            return False
        new_weights, bias = changed
        origin = unite(producer.origin, node.origin)
        stem = producer.output.name
        if new_weights is not weights:
            inputs[1] = self.constant(new_weights.astype(weights.dtype), f"{stem}.weights", origin)
        if bias is not None:
            inputs[2:] = [self.constant(bias.astype(weights.dtype), f"{stem}.bias", origin)]
            attributes.pop("beta", None)
        self.add(replace(producer, inputs=tuple(inputs), outputs=node.outputs, attributes=attributes, origin=origin))
        return True

    def multiply_and_add(self, node: Node, found: Channelwise) -> None:
        rank, stem = node.output.tensor.rank, node.output.name
        behind = 0 if "layout" in node.attributes else rank - 2
        value = node.operands[0]
        dtype = node.output.dtype.numpy
        assert found.scale is not None and found.shift is not None
        shape = (len(found.scale), *(1,) * behind)
        scale = self.constant(found.scale.astype(dtype).reshape(shape), f"{stem}.scale", node.origin)
        shift = self.constant(found.shift.astype(dtype).reshape(shape), f"{stem}.shift", node.origin)
        product = self.emit("Mul", (value, scale), stem=f"{stem}.scaled", origin=node.origin)
        self.emit("Add", (product, shift), stem=stem, origin=node.origin, output=node.output)


def channel_axis(node: Node) -> int:
    """The axis of a result along which its weights differ."""
    if node.op in ("Conv", "ConvTranspose", "BatchNormalization") and "layout" not in node.attributes:
        return 1
    return node.output.tensor.rank - 1


def per_channel(array: np.ndarray, result: Value, axis: int) -> np.ndarray | None:
    """The constant that broadcasts to `result` as one f64 number per channel, where it differs along that axis only."""
    channels = result.shape[axis]
    if not isinstance(channels, int) or array.ndim > result.tensor.rank or array.dtype.kind not in "fV":
        return None
    shape = (1,) * (result.tensor.rank - array.ndim) + array.shape
    if any(extent != 1 for i, extent in enumerate(shape) if i != axis) or shape[axis] not in (1, channels):
        return None
    return np.broadcast_to(array.astype(WIDE).reshape(-1), (channels,))


EFFECTS: Mapping[str, Callable[[np.ndarray], Channelwise]] = {
    "Mul": lambda values: Channelwise(values, None),
    "Div": lambda values: Channelwise(1 / values, None),
    "Add": lambda values: Channelwise(None, values),
    "Sub": lambda values: Channelwise(None, -values),
}
"""What an elementwise operator of x and a constant per channel does."""


# How weights and bias take in a scale and a shift.

Folded = tuple[np.ndarray, np.ndarray | None] | None


def _bias(bias: np.ndarray | None, found: Channelwise, channels: int) -> np.ndarray | None:
    """bias * scale + shift, None where that is no bias at all."""
    if bias is None and found.shift is None:
        return None
    total = np.zeros(channels, WIDE) if bias is None else np.broadcast_to(bias.astype(WIDE), (channels,))
    total = total if found.scale is None else total * found.scale
    return total if found.shift is None else total + found.shift


def _conv(node: Node, weights: np.ndarray, bias: np.ndarray | None, found: Channelwise) -> Folded:
    """Weights [M, C/group, *kernel]."""
    scale = found.scale
    new = weights if scale is None else weights * scale.reshape(-1, *(1,) * (weights.ndim - 1))
    return new, _bias(bias, found, weights.shape[0])


def _conv_transpose(node: Node, weights: np.ndarray, bias: np.ndarray | None, found: Channelwise) -> Folded:
    """Weights [C, M/group, *kernel]; the filters of a group belong to its channels."""
    group = node.attributes.get("group", 1)
    assert isinstance(group, int)
    filters = weights.shape[1]
    new = weights
    if found.scale is not None:
        parts = weights.reshape(group, -1, *weights.shape[1:])
        scale = found.scale.reshape(group, 1, filters, *(1,) * (weights.ndim - 2))
        new = (parts * scale).reshape(weights.shape)
    return new, _bias(bias, found, filters * group)


def _gemm(node: Node, weights: np.ndarray, bias: np.ndarray | None, found: Channelwise) -> Folded:
    """Weights [K, N], or [N, K] where transB; the addend must be one row."""
    rows = 0 if node.attributes.get("transB", 0) else 1
    columns = weights.shape[rows]
    if bias is not None:
        if any(extent != 1 for extent in bias.shape[:-1]):
            return None
        beta = node.attributes.get("beta", 1.0)
        assert isinstance(beta, float)
        bias = bias.reshape(-1).astype(WIDE) * beta
    scale = found.scale
    new = weights if scale is None else weights * (scale[:, None] if rows == 0 else scale)
    return new, _bias(bias, found, columns)


def _matmul(node: Node, weights: np.ndarray, bias: np.ndarray | None, found: Channelwise) -> Folded:
    """Weights [K, N]; there is no bias that could take a shift."""
    if found.shift is not None or weights.ndim != 2 or node.operands[0].tensor.rank < 2 or found.scale is None:
        return None
    return weights * found.scale, None


SCALED: Mapping[str, Callable[[Node, np.ndarray, np.ndarray | None, Channelwise], Folded]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
"""Operators that take in scales; each makes f64 weights and a bias."""
