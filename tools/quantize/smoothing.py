"""Channels of very different size made alike before they share one scale of 8 bits.

Where a float operator gives an operand of integer products (a normalisation, a spectrum, an input of the model), each
channel is divided by a factor and the weights that meet it are multiplied by it: x W = (x / s) (s W), with
s = sqrt(max |x| / max |W|) per channel (Xiao et al. 2023, "SmoothQuant"). Factors are powers of two, so that the float
model still computes the same bits; engines fuse the product into the operator before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from .calibrate import Statistics
from .model import Draft, attribute, make_node
from .places import Places, is_mover, of_integers

Array = NDArray[Any]
UNLIKE = 4.0
"""Times the median channel that the largest is, from which on two bits of most channels are to be had."""
MOST = 2.0**10
"""Largest factor, or its inverse, beside that of the median channel."""


def smooth(draft: Draft, places: Places, statistics: Mapping[str, Statistics]) -> dict[str, int]:
    """Divides values by factors and multiplies their weights; the new values, and which axes their channels are."""
    definers, readers, stored = draft.definers(), draft.readers(), set(places.values)
    made: dict[str, tuple[str, NodeProto]] = {}
    axes = {}
    for name in places.values:
        largest, axis = statistics[name].largest, places.channels[name]
        integer = [node for node in readers[name] if node.name in places.anchors and name in node.input[:2]]
        movers = [node for node in readers[name] if is_mover(node) and stored.intersection(node.output)]
        plain = all(node.input[0] == name and node.input[1] in draft.constants for node in integer)
        producer = definers.get(name)
        if largest is None or axis is None or not integer or not plain or movers:
            continue
        if of_integers(name, draft, definers, stored, places) or (producer is not None and is_mover(producer)):
            continue
        if largest.max() < UNLIKE * np.median(largest):
            continue
        weights = [_largest_weights(node, draft.array(node.input[1]), len(largest)) for node in integer]
        if any(part is None for part in weights):
            continue
        factors = _factors(largest, np.max([part for part in weights if part is not None], 0))
        if np.all(factors == 1):
            continue
        trailing = max(draft.array(node.input[1]).ndim - 2 for node in integer) if axis == 1 else 0
        inverse = draft.add_constant(f"{name}_smoothing", (1 / factors).astype(np.float32).reshape(-1, *[1] * trailing))
        result = draft.unused(f"{name}_smoothed")
        made[name] = result, make_node("Mul", [name, inverse], result, draft.unused(f"{name}_smooth"))
        axes[result] = axis
        scaled: dict[tuple[str, bool], str] = {}
        for node in integer:
            weight, key = node.input[1], (node.input[1], bool(attribute(node, "transB", 0)))
            if key not in scaled:
                scaled[key] = draft.add_constant(f"{weight}_smoothed", _scaled(node, draft.array(weight), factors))
            node.input[0], node.input[1] = result, scaled[key]
    if made:
        nodes = [node for value in draft.graph.input if value.name in made for node in [made[value.name][1]]]
        for node in draft.graph.node:
            nodes += [node, *(made[name][1] for name in node.output if name in made)]
        draft.replace_nodes(nodes)
    return axes


def _factors(largest: Array, weights: Array) -> Array:
    """Powers of two [channels] to divide values by, of which and of whose weights these are the largest."""
    known = (largest > 0) & (weights > 0)
    if not np.any(known):
        return np.ones(len(largest))
    factors = np.sqrt(np.where(known, largest, 1.0) / np.where(known, weights, 1.0))
    factors /= np.median(factors[known])
    factors = np.where(known, np.clip(factors, 1 / MOST, MOST), 1.0)
    return np.asarray(2.0 ** np.rint(np.log2(factors)))


def _by_channel(node: NodeProto, weights: Array) -> tuple[Array, int]:
    """Weights [groups, outputs, channels of a group, taps], of a product [1, outputs, channels, 1]."""
    if node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        return weights.reshape(groups, weights.shape[0] // groups, weights.shape[1], -1), groups
    matrix = weights if attribute(node, "transB", 0) else weights.T
    return matrix[None, :, :, None], 1


def _largest_weights(node: NodeProto, weights: Array, channels: int) -> Array | None:
    """The largest weight [channels] of each channel of the left operand; None where the shapes do not tell."""
    if node.op_type != "Conv" and weights.ndim != 2:
        return None
    found = np.abs(_by_channel(node, weights)[0]).max((1, 3)).reshape(-1)
    return found if len(found) == channels else None


def _scaled(node: NodeProto, weights: Array, factors: Array) -> Array:
    """Weights times the factors of the channels that they meet."""
    parts, groups = _by_channel(node, weights)
    scaled = parts * factors.astype(np.float32).reshape(groups, 1, -1, 1)
    if node.op_type == "Conv":
        return np.asarray(scaled.reshape(weights.shape))
    return np.ascontiguousarray(scaled[0, :, :, 0] if attribute(node, "transB", 0) else scaled[0, :, :, 0].T)


__all__ = ["smooth"]
