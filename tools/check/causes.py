"""What is wrong with the quantization of a layer, in words."""

from __future__ import annotations

from typing import Any

import numpy as np

from .measured import Grid, Power
from .sensitivity import Comparison, Layer

CLIPPED = 1e-3
"""The share of values outside the range from which on it is told."""
BAD_SHARE, BAD_REACH = 0.01, 0.25
"""The share, and of the range's width how far they reach out of it, from which on calibration alone explains nothing.
"""
USED = 0.125
"""The share of a range from which on it is used well."""
UNEVEN = 16.0
"""Times that one channel reaches further than the median one, from which on it leaves too few steps to the others."""
FINE = 40.0
"""Decibels from which on there is nothing to explain."""


def remark(layer: Layer, comparison: Comparison) -> str:
    """The causes that can be seen, the graver part (values, or weights) first; nothing for what is good."""
    if layer.alone.lowest >= FINE:
        return ""
    parts = [(_level(layer.rounding), _values(layer)), (_level(layer.weighing), _weights(layer, comparison))]
    return "; ".join(text for level, text in sorted(parts) if text and level < FINE)


def _level(power: Power | None) -> float:
    return float("inf") if power is None else power.lowest


def _values(layer: Layer) -> str:
    """About the tensor's own quantization."""
    grid, extent = layer.grid, layer.extent
    if grid is None or not extent.count:
        return ""
    share, (low, high) = extent.outside / extent.count, grid.ends
    reach = f"values reach {extent.low:.3g} to {extent.high:.3g}, the type {low:.3g} to {high:.3g}"
    if share > CLIPPED:
        room = grid.is_one and high - low >= 0.98 * (extent.high - extent.low)
        over = max(low - extent.low, extent.high - high)
        graver = max(share / BAD_SHARE, over / (BAD_REACH * (high - low))) > 1
        why = f", the zero point {int(grid.zero[0])} is wrong" if room else ", the scale is too small"
        return f"{100 * share:.2g} % clipped{why if graver else ''}: {reach}"
    return _spread(extent.high - extent.low, high - low, grid, *extent.uneven)


def _spread(used: float, width: float, grid: Grid, channel: int, times: float) -> str:
    if not grid.is_one:
        return ""
    steps = max(1, round(used / float(grid.step[0])))
    if width > 0 and used / width < USED:
        return f"{steps} of {grid.steps} steps used: the scale is too large"
    if times >= UNEVEN:
        return f"channel {channel} reaches {times:.3g} x as far as most: they have {max(1, round(steps / times))} steps"
    return ""


def _weights(layer: Layer, comparison: Comparison) -> str:
    """About the weights that the layer is computed with."""
    found = []
    side = comparison.quantised
    for name in layer.weights:
        reader = next((node for node in side.readers.get(name, ()) if node.op_type == "DequantizeLinear"), None)
        grid = None if reader is None else comparison.grid(reader)
        array = None if reader is None else side.constant(reader.output[0])
        if grid is None or array is None or np.ndim(array) < 2:
            continue
        text = _matrix(np.asarray(array, np.float64), grid, _plain(layer, comparison, reader, np.shape(array)))
        if text:
            found.append(f"{name}: {text}")
    return "; ".join(found)


def _plain(layer: Layer, comparison: Comparison, reader: Any, shape: tuple[int, ...]) -> Any:
    """The float model's weights in place of quantised ones, where they have the same shape."""
    node = next((n for n in comparison.quantised.readers.get(reader.output[0], ()) if n.name in layer.nodes), None)
    other = None if node is None else comparison.plain_node(node.name)
    if node is None or other is None:
        return None
    place = list(node.input).index(reader.output[0])
    array = comparison.plain.constant(other.input[place]) if place < len(other.input) else None
    return array if array is not None and np.shape(array) == shape else None


def _matrix(array: Any, grid: Grid, plain: Any) -> str:
    low, high = grid.ends
    if plain is not None:
        step = float(np.mean(grid.step))
        shift = float(np.mean(array - plain)) / step
        outside = float(np.mean((plain < low) | (plain > high)))
        if abs(shift) > 1:
            return f"the weights are off by {shift:.3g} steps on average: the zero point is wrong"
        if outside > CLIPPED:
            reach = f"they reach {plain.min():.3g} to {plain.max():.3g}, the type {low:.3g} to {high:.3g}"
            return f"{100 * outside:.2g} % of the weights clipped: {reach}"
        scale = float(np.vdot(array, plain)) / (float(np.vdot(plain, plain)) or 1.0)
        if not 0.8 < scale < 1.25:
            return f"the weights are {scale:.3g} x those of the float model: the scale is wrong"
    if not grid.is_one:
        return ""
    axis = 0 if array.ndim > 2 else array.ndim - 1
    magnitudes = np.abs(array if plain is None else plain).max(tuple(i for i in range(array.ndim) if i != axis))
    median, channel = float(np.median(magnitudes)), int(np.argmax(magnitudes))
    used = float(np.max(magnitudes)) * 2
    return _spread(used, high - low, grid, channel, float(magnitudes[channel]) / median if median else np.inf)
