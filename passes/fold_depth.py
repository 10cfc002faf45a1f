"""Convolutions over three spatial axes as ones over two: their schedules are the fast ones.

The taps along the first spatial axis become channels: for each result along it, the slices of the image that its taps
read stand side by side, [N * depth, taps * channels, height, width], and the weights are rearranged to match. The sums
are the same products, added in another order. An image is copied as often as there are taps, which costs little beside
the filters that read it. Depthwise convolutions are one over two axes for each tap, and their results are added.
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
        alone = channels == 1 and filters == group
        few = filters // group < LEAST_FILTERS and not alone
        if not all(isinstance(width, int) for width in pads) or few or 0 in weights.shape:
            return False
        if set(weights.shape[2:]) == {1} and set(windows.strides) == {1} and not any(pads):
            return False  # a product of matrices
        stem, origin, depth = node.output.name, node.origin, windows.output[0]
        slices = self.around(x, node, windows)
        attributes = {name: value for name, value in node.attributes.items() if name not in ("auto_pad", "pads")}
        attributes |= {
            "kernel_shape": tuple(kernel),
            "strides": windows.strides[1:],
            "dilations": windows.dilations[1:],
            "pads": (*windows.before[1:], *windows.after[1:]),
        }
        planes: Value | None = None
        if not alone:
            image = self.stacked(slices, node, windows, (group, channels, taps))
            arranged = np.ascontiguousarray(weights.transpose(0, 2, 1, 3, 4)).reshape(filters, taps * channels, *kernel)
            flat = self.constant(arranged, f"{stem}.weights", origin)
            inputs = (image, flat, *node.inputs[2:])
            planes = self.emit(node.op, inputs, attributes, stem=f"{stem}.planes", origin=origin)
        for tap in range(taps if alone else 0):
            image = self.flattened(self.slice(slices, node, windows, tap), node)
            flat = self.constant(np.ascontiguousarray(weights[:, :, tap]), f"{stem}.weights", origin)
            others = node.inputs[2:] if node.op == "ConvInteger" or tap == 0 else ()
            part = self.emit(node.op, (image, flat, *others), attributes, stem=f"{stem}.planes", origin=origin)
            added = (planes, part)
            planes = part if planes is None else self.emit("Add", added, stem=f"{stem}.sum", origin=origin)
        assert planes is not None
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
        area = x.shape[3:]
        apart: tuple[Dim, ...] = (x.shape[0], x.shape[1], group, channels, *area)
        if group != 1:
            x = self.emit("Reshape", (x,), {"shape": apart}, stem=f"{stem}.groups", origin=origin)
        parts = [self.slice(x, node, windows, tap) for tap in range(taps)]
        together = {"axis": 3 if group != 1 else 2}
        joined = parts[0] if taps == 1 else self.emit("Concat", parts, together, stem=f"{stem}.taps", origin=origin)
        shape = (x.shape[0] * windows.output[0], group * taps * channels, *area)
        return self.emit("Reshape", (joined,), {"shape": shape}, stem=f"{stem}.image", origin=origin)

    def slice(self, x: Value, node: Node, windows: Windows, tap: int) -> Value:
        """What a tap reads of an image [N, depth, ...]: as many slices as there are results."""
        count, step, first = windows.output[0], windows.strides[0], tap * windows.dilations[0]
        if windows.kernel[0] == 1 and step == 1:
            return x
        cut = {"starts": (first,), "ends": (first + (count - 1) * step + 1,), "axes": (1,), "steps": (step,)}
        return self.emit("Slice", (x,), cut, stem=f"{node.output.name}.tap", origin=node.origin)

    def flattened(self, x: Value, node: Node) -> Value:
        """[N, depth, C, height, width] as [N * depth, C, height, width]."""
        shape = (x.shape[0] * x.shape[1], *x.shape[2:])
        return self.emit("Reshape", (x,), {"shape": shape}, stem=f"{node.output.name}.image", origin=node.origin)
