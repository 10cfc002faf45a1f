"""Pad folded into the convolution or pooling behind it, whose windows know padding."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..ir.graph import Graph, Node, Value, unite
from .cleanup import without_dead_code
from .pipeline import Pass, register
from .rewriting import Rewriter, until_stable

NEVER_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Exp", "Abs", "Sqrt", "Softplus")
"""Operators whose results are 0 at least: zeros around them change no maximum."""
PADDED = ("Conv", "ConvInteger", "AveragePool", "MaxPool")


@register
@dataclass(frozen=True)
class Pads(Pass):
    """Folds Pad into convolutions, AveragePool and MaxPool where the windows then see the same numbers."""

    name = "pads"

    def run(self, graph: Graph) -> Graph:
        return until_stable(lambda found: without_dead_code(_Padding(found).run()), graph)


class _Padding(Rewriter):
    def visit(self, node: Node) -> None:
        pad = self.made_by(node.inputs[0], "Pad") if node.op in PADDED else None
        folded = self.folded(node, pad) if pad is not None else None
        self.add(node if folded is None else folded)

    def folded(self, node: Node, pad: Node) -> Node | None:
        """The window operator reading past the Pad, None where that is not the same."""
        widths = spatial_widths(node, pad)
        if widths is None or node.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return None
        own = node.attributes.get("pads") or (0,) * len(widths)
        assert isinstance(own, tuple)
        fits, more = self.fill(pad) == 0, dict[str, int]()
        if node.op == "ConvInteger":  # outside the image stands the zero point
            zero = node.inputs[2] if len(node.inputs) > 2 else None
            fits = self.fill(pad) == (0 if zero is None else self.scalar(zero)) is not None
        elif node.op != "Conv":
            fits, more = self.pooling_fits(node, pad, widths, any(own))
        if not fits:
            return None
        attributes = {name: value for name, value in node.attributes.items() if name != "auto_pad"} | more
        attributes["pads"] = tuple(a + b for a, b in zip(own, widths, strict=True))  # type: ignore[operator]
        inputs, origin = (pad.inputs[0], *node.inputs[1:]), unite(pad.origin, node.origin)
        return replace(node, inputs=inputs, attributes=attributes, origin=origin)

    def fill(self, pad: Node) -> float | None:
        """The number that a Pad puts around, None where it is not known or not constant."""
        if pad.attributes.get("mode", "constant") != "constant":
            return None
        value = pad.inputs[2] if len(pad.inputs) > 2 else None
        return 0 if value is None else self.scalar(value)

    def pooling_fits(self, node: Node, pad: Node, widths: tuple[int, ...], padded: bool) -> tuple[bool, dict[str, int]]:
        """Whether a pooling may pad instead, and the attributes that this takes."""
        kernel = node.attributes["kernel_shape"]
        assert isinstance(kernel, tuple)
        # ONNX wants windows that reach the image; where sizes are rounded up, padding decides which windows count.
        small = all(width < extent for width, extent in zip(widths, (*kernel, *kernel), strict=True))  # type: ignore[operator]
        if not small or node.attributes.get("ceil_mode", 0) or len(node.outputs) > 1:
            return False, {}
        fill = self.fill(pad)
        if node.op == "AveragePool":
            counts = bool(node.attributes.get("count_include_pad", 0))
            return fill == 0 and (counts or not padded), {"count_include_pad": 1}
        if fill is not None and fill <= node.output.dtype.limits[0]:
            return True, {}
        return fill == 0 and not padded and self.never_negative(pad.inputs[0]), {}

    def never_negative(self, value: Value | None) -> bool:
        """Whether no element can be less than 0."""
        clip = self.made_by(value, "Clip")
        low = self.scalar(clip.inputs[1]) if clip is not None and len(clip.inputs) > 1 else None
        return (low is not None and low >= 0) or self.made_by(value, *NEVER_NEGATIVE) is not None


def spatial_widths(node: Node, pad: Node) -> tuple[int, ...] | None:
    """The widths of a Pad on the spatial axes of the image that `node` reads; None where others are padded, or where
    widths are negative or not known."""
    rank = pad.output.tensor.rank
    pads, axes = pad.attributes.get("pads"), pad.attributes.get("axes", tuple(range(rank)))
    if (
        not isinstance(pads, tuple)
        or not isinstance(axes, tuple)
        or ("axes" not in pad.attributes and len(pads) != 2 * rank)
    ):
        return None
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        pair = pads[place], pads[place + len(axes)]
        if not isinstance(axis, int) or not all(isinstance(width, int) and width >= 0 for width in pair):
            return None
        before[axis], after[axis] = pair  # type: ignore[assignment]
    spatial = slice(1, rank - 1) if "layout" in node.attributes else slice(2, rank)
    others = [0, rank - 1] if "layout" in node.attributes else [0, 1]
    if any(before[axis] or after[axis] for axis in others):
        return None
    return (*before[spatial], *after[spatial])
