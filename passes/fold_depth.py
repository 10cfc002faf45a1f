"""Convolutions over three spatial axes as ones over two: their schedules are the fast ones.

The taps along the first spatial axis become channels: for each result along it, the slices of the image that its taps
read stand side by side, [N * depth, taps * channels, height, width], and the weights are rearranged to match. The sums
are the same products, added in another order. An image is copied as often as there are taps, which costs little beside
the filters that read it; so depthwise convolutions stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..ir.dims import Dim
from ..ir.graph import Graph, Node, Value
from ..ir.ops.windows import Windows, sliding
from .cleanup import without_dead_code
from .pipeline import Pass, register
from .rewriting import Rewriter

LEAST_FILTERS = 4
"""Of each group, for the copies to be repaid."""


@register
@dataclass(frozen=True)
class FoldDepth(Pass):
    """Conv and ConvInteger of rank 5 by those of rank 4; see the module."""

    name = "fold-depth"

    def run(self, graph: Graph) -> Graph:
        return without_dead_code(_Folding(graph).run())


class _Folding(Rewriter):
    def visit(self, node: Node) -> None:
        folds = node.op in ("Conv", "ConvInteger") and node.operands[0].tensor.rank == 5
        if not folds or not self.folded(node):
            self.add(node)

    def folded(self, node: Node) -> bool:
        """Adds what the convolution becomes; False where it stays."""
        x, weights = node.operands[0], self.array(node.inputs[1])
        group = node.attributes.get("group", 1)
        if weights is None or "layout" in node.attributes or not isinstance(group, int):
            return False
        filters, channels, taps, *kernel = weights.shape
        names = ("strides", "dilations", "pads", "auto_pad")
        options = {name: node.attributes[name] for name in names if node.attributes.get(name) is not None}
        windows = sliding(x.shape[2:], weights.shape[2:], **options)  # type: ignore[arg-type]
        pads = (*windows.before, *windows.after)
        if not all(isinstance(width, int) for width in pads) or filters // group < LEAST_FILTERS or 0 in weights.shape:
            return False
        if set(weights.shape[2:]) == {1} and set(windows.strides) == {1} and not any(pads):
            return False  # a product of matrices
        stem, origin, depth = node.output.name, node.origin, windows.output[0]
        image = self.stacked(self.around(x, node, windows), node, windows, (group, channels, taps))
        arranged = np.ascontiguousarray(weights.transpose(0, 2, 1, 3, 4)).reshape(filters, taps * channels, *kernel)
        flat = self.constant(arranged, f"{stem}.weights", origin)
        attributes = {name: value for name, value in node.attributes.items() if name not in ("auto_pad", "pads")}
        attributes |= {
            "kernel_shape": tuple(kernel),
            "strides": windows.strides[1:],
            "dilations": windows.dilations[1:],
            "pads": (*windows.before[1:], *windows.after[1:]),
        }
        inputs = (image, flat, *node.inputs[2:])
        planes = self.emit(node.op, inputs, attributes, stem=f"{stem}.planes", origin=origin)
        shape = (x.shape[0], depth, *planes.shape[1:])
        apart = self.emit("Reshape", (planes,), {"shape": shape}, stem=f"{stem}.apart", origin=origin)
        perm = {"perm": (0, 2, 1, 3, 4)}
        self.emit("Transpose", (apart,), perm, stem=stem, origin=origin, output=node.output)
        return True

    def around(self, x: Value, node: Node, windows: Windows) -> Value:
        """The image as [N, depth, C, height, width], padded along its depth."""
        stem, origin = node.output.name, node.origin
        x = self.emit("Transpose", (x,), {"perm": (0, 2, 1, 3, 4)}, stem=f"{stem}.slices", origin=origin)
        before, after = windows.before[0], windows.after[0]
        if before == 0 and after == 0:
            return x
        fill = node.inputs[2] if node.op == "ConvInteger" and len(node.inputs) > 2 else None
        if fill is not None and fill.tensor.rank:
            fill = self.emit("Reshape", (fill,), {"shape": ()}, stem=f"{stem}.zero", origin=origin)
        pads = {"pads": (0, before, 0, 0, 0, 0, after, 0, 0, 0)}
        return self.emit("Pad", (x, None, fill), pads, stem=f"{stem}.padded", origin=origin)

    def stacked(self, x: Value, node: Node, windows: Windows, sizes: tuple[int, int, int]) -> Value:
        """The slices that each result reads, as [N * depth, group * taps * channels, height, width]."""
        stem, origin, (group, channels, taps) = node.output.name, node.origin, sizes
        count, step, spread = windows.output[0], windows.strides[0], windows.dilations[0]
        area = x.shape[3:]
        apart: tuple[Dim, ...] = (x.shape[0], x.shape[1], group, channels, *area)
        if group != 1:
            x = self.emit("Reshape", (x,), {"shape": apart}, stem=f"{stem}.groups", origin=origin)
        parts: list[Value] = []
        for tap in range(taps):
            first = tap * spread
            cut = {"starts": (first,), "ends": (first + (count - 1) * step + 1,), "axes": (1,), "steps": (step,)}
            whole = taps == 1 and step == 1
            parts.append(x if whole else self.emit("Slice", (x,), cut, stem=f"{stem}.tap", origin=origin))
        together = {"axis": 3 if group != 1 else 2}
        joined = parts[0] if taps == 1 else self.emit("Concat", parts, together, stem=f"{stem}.taps", origin=origin)
        shape = (x.shape[0] * count, group * taps * channels, *area)
        return self.emit("Reshape", (joined,), {"shape": shape}, stem=f"{stem}.image", origin=origin)
