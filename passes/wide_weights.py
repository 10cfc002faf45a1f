"""Convolutions of integers whose weights, less their zero points, take more than 8 bits.

No instruction multiplies bytes by those. With weights v = w - 128 (or w, where they are signed) and e what their zero
point is beyond that,

    sum of (x - zero) * (w - own zero)  =  sum of (x - zero) * v  -  e * (sum of x - zero),

where the last sum, over a window of all channels, is one number for all filters: the channels are added up, and then
the pixels of each window. Everything wraps in i32, so the result is the same. Products that are no convolutions of
several pixels are left to their kernels, which sum rows themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..ir.dtypes import I32
from ..ir.graph import Graph, Node, Value
from .cleanup import without_dead_code
from .pipeline import Pass, register
from .rewriting import Rewriter


@register
@dataclass(frozen=True)
class WideWeights(Pass):
    """Makes weights of convolutions 8 bits wide."""

    name = "wide-weights"

    def run(self, graph: Graph) -> Graph:
        return without_dead_code(_Narrowing(graph).run())


class _Narrowing(Rewriter):
    def visit(self, node: Node) -> None:
        found = self._wide(node) if node.op == "ConvInteger" else None
        if found is None:
            self.add(node)
            return
        array, beyond = found
        x, zero = node.operands[0], (*node.inputs, None)[2]
        stem, origin, rank = node.output.name, node.origin, array.ndim
        weights = self.constant(array, f"{stem}.weights", origin)
        narrow = self.emit("ConvInteger", (x, weights, zero), node.attributes, stem=f"{stem}.bytes", origin=origin)
        window = self._window(node, x, zero, array.shape)
        factor = self.constant(beyond.reshape(1, -1, *(1,) * (rank - 2)), f"{stem}.beyond", origin)
        rest = self.emit("Mul", (window, factor), stem=f"{stem}.rest", origin=origin)
        self.emit("Sub", (narrow, rest), stem=stem, origin=origin, output=node.output)

    def _wide(self, node: Node) -> tuple[np.ndarray, np.ndarray] | None:
        """The weights as i8, and for each filter what its zero point is beyond; None where there is nothing to do."""
        array, point = self.array(node.inputs[1]), (*node.inputs, None, None)[3]
        zero = np.zeros(1, np.int32) if point is None else self.array(point)
        if array is None or zero is None or node.attributes.get("group", 1) != 1 or array.ndim < 3:
            return None
        pads, strides = node.attributes.get("pads", ()), node.attributes.get("strides", ())
        assert isinstance(pads, tuple) and isinstance(strides, tuple)
        if set(array.shape[2:]) == {1} and not any(pads) and set(strides) <= {1}:
            return None
        zeros = zero.astype(np.int32).reshape(-1)
        filters = array.reshape(len(array), -1)
        low, high = filters.min(1, initial=127).astype(np.int32), filters.max(1, initial=0).astype(np.int32)
        shift = 128 if array.dtype == np.uint8 else 0
        if array.size == 0 or ((low - zeros).min() >= -128 and (high - zeros).max() <= 127):
            return None
        beyond = np.broadcast_to(zeros - shift, (len(array),)).astype(np.int32)
        return (array.astype(np.int16) - shift).astype(np.int8), beyond

    def _window(self, node: Node, x: Value, zero: Value | None, shape: tuple[int, ...]) -> Value:
        """The sums of x - zero over the windows of all channels, i32 [N, 1, *spatial]."""
        stem, origin = node.output.name, node.origin
        wide = self.emit("Cast", (x,), {"to": I32}, stem=f"{stem}.wide", origin=origin)
        pixels = self.emit("ReduceSum", (wide,), {"axes": (1,), "keepdims": 1}, stem=f"{stem}.pixels", origin=origin)
        if zero is not None:
            count = self.constant(np.array(shape[1], np.int32), f"{stem}.channels", origin)
            moved = self.emit("Cast", (zero,), {"to": I32}, stem=f"{stem}.zero", origin=origin)
            moved = self.emit("Mul", (moved, count), stem=f"{stem}.zeros", origin=origin)
            pixels = self.emit("Sub", (pixels, moved), stem=f"{stem}.centred", origin=origin)
        ones = self.constant(np.ones((1, 1, *shape[2:]), np.int8), f"{stem}.ones", origin)
        return self.emit("ConvInteger", (pixels, ones), node.attributes, stem=f"{stem}.windows", origin=origin)
