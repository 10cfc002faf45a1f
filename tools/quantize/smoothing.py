"""Channels of very different size made alike before they share one scale of 8 bits.

Where a float operator gives an operand of integer products (a normalisation, a spectrum, an input of the model), each
channel is divided by a factor and the weights that meet it are multiplied by it: x W = (x / s) (s W), with
s = max |x|^a / max |W|^(1 - a) per channel (Xiao et al. 2023, "SmoothQuant"). The exponent a is that for which rounding
both operands is expected to do least to the result; nothing is done where that is not much less than without factors.
Factors are powers of two, so that the float model still computes the same bits; engines fuse the product into the
operator before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from .graph import GraphDraft
from .model import attribute, make_node
from .places import Places, is_mover, of_integers
from .ranges import range_of
from .settings import Settings
from .statistics import Statistics

Array = NDArray[Any]
SHARES = (0.25, 0.5)
"""Exponents that are tried."""
GAIN = 0.5
"""What is expected to be left of the error, at most, where factors are put in."""
MOST = 2.0**10
"""Largest factor, or its inverse, beside that of the median channel."""


def smooth(
    draft: GraphDraft, places: Places, statistics: Mapping[str, Statistics], settings: Settings
) -> dict[str, int]:
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
        weights = [_by_channel(node, draft.array(node.input[1])) for node in integer]
        if any(part is None or part.shape[0] * part.shape[2] != len(largest) for part in weights):
            continue
        factors = _best(statistics[name], [part for part in weights if part is not None], settings)
        if factors is None:
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
        nodes = [made[name][1] for name in draft.given() if name in made]
        for node in draft.graph.node:
            nodes += [node, *(made[name][1] for name in node.output if name in made)]
        draft.replace_nodes(nodes)
    return axes


def _best(statistics: Statistics, weights: list[Array], settings: Settings) -> Array | None:
    """The factors [channels] for a value that meets these weights, None where they are not worth it."""
    assert statistics.largest is not None and statistics.squares is not None
    largest, powers = statistics.largest.astype(np.float64), statistics.squares / max(statistics.count, 1)
    grid = range_of(statistics.histogram, settings)
    sides = 1 if statistics.histogram.low >= 0 and not settings.symmetric else 2
    others = np.max([np.abs(part).max((1, 3)).reshape(-1) for part in weights], 0)
    found = None
    least = GAIN * expected_error(np.ones(len(largest)), float(grid.scale), powers, weights)
    for share in SHARES:
        factors = _factors(largest, others, share)
        error = expected_error(factors, sides * float((largest / factors).max()) / 255, powers, weights)
        if error < least:
            found, least = factors, error
    return found


def expected_error(factors: Array, step: float, powers: Array, weights: list[Array]) -> float:
    """What rounding does to products of values (with mean squares `powers` [channels], rounded to steps of this size
    after division by `factors`) by weights, as the sum of mean squares: each rounding by itself changes a value by
    step^2 / 12."""
    error = 0.0
    for part in weights:
        groups, _, channels, taps = part.shape
        scaled = part * factors.reshape(groups, 1, channels, 1)
        error += step**2 / 12 * float(np.square(scaled, dtype=np.float64).sum())
        steps = np.abs(scaled).max((2, 3)).astype(np.float64) / 127
        means = (powers / factors**2).reshape(groups, channels).sum(1) * taps
        error += float((np.square(steps).sum(1) / 12 * means).sum())
    return error


def _factors(largest: Array, weights: Array, share: float) -> Array:
    """Powers of two [channels] to divide values by, of which and of whose weights these are the largest."""
    known = (largest > 0) & (weights > 0)
    if not np.any(known):
        return np.ones(len(largest))
    factors = np.where(known, largest, 1.0) ** share / np.where(known, weights, 1.0) ** (1 - share)
    factors /= np.median(factors[known])
    factors = np.where(known, np.clip(factors, 1 / MOST, MOST), 1.0)
    return np.asarray(2.0 ** np.rint(np.log2(factors)))


def _by_channel(node: NodeProto, weights: Array) -> Array | None:
    """Weights as [groups, outputs, channels of a group, taps], of a product [1, outputs, channels, 1]; None where they
    are no matrix."""
    if node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        return weights.reshape(groups, weights.shape[0] // groups, weights.shape[1], -1)
    matrix = weights if attribute(node, "transB", 0) else weights.T
    return matrix[None, :, :, None] if weights.ndim == 2 else None


def _scaled(node: NodeProto, weights: Array, factors: Array) -> Array:
    """Weights times the factors of the channels that they meet."""
    parts = _by_channel(node, weights)
    assert parts is not None
    scaled = parts * factors.astype(np.float32).reshape(parts.shape[0], 1, -1, 1)
    if node.op_type == "Conv":
        return np.asarray(scaled.reshape(weights.shape))
    return np.ascontiguousarray(scaled[0, :, :, 0] if attribute(node, "transB", 0) else scaled[0, :, :, 0].T)


__all__ = ["smooth"]
