"""Transposed convolutions as ordinary ones, which have integer forms.

Outputs that are equal modulo the stride s take the same taps, so that a convolution with s * s times the filters
computes all of them, and DepthToSpace puts them in place (Shi et al. 2016, "Is the deconvolution layer the same as a
convolutional layer?"). Of k taps a phase takes up to ceil(k / s): none is wasted where the stride divides k.
Activations that follow are applied before the results are put in place, so that integers are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from .graph import GraphDraft
from .model import attribute, make_node
from .settings import Settings

Array = NDArray[Any]
MOST_WORK = 2.0
"""Products, beside those of the transposed convolution, up to which it is worth it: those of integers take a quarter of
the time."""
ELEMENTWISE = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Gelu", "Mish")
"""Activations of one operand, which do not care where it stands."""


def split_transposed(draft: GraphDraft, settings: Settings) -> int:
    """Replaces transposed convolutions of images by known weights; how many there were."""
    readers, fixed = draft.readers(), draft.fixed()
    nodes: list[NodeProto] = []
    moved: set[str] = set()
    count = 0
    for node in draft.graph.node:
        if node.name in moved:
            continue
        plan = None if settings.kept(node) or node.op_type != "ConvTranspose" or node.domain else _plan(node, draft)
        if plan is None:
            nodes.append(node)
            continue
        count += 1
        activations: list[NodeProto] = []
        result = node.output[0]
        while result not in fixed and len(readers.get(result, ())) == 1:
            (following,) = readers[result]
            if following.op_type not in ELEMENTWISE or following.domain or following.input[0] != result:
                break
            if any(name and name not in draft.constants for name in following.input[1:]):
                break
            activations.append(following)
            result = following.output[0]
        moved.update(following.name for following in activations)
        nodes += _replaced(node, plan, activations, result, draft)
    if count:
        draft.replace_nodes(nodes)
    return count


class _Plan:
    """Weights [filters * s * s, channels, m, m], what is added around the image, and what is cut off results."""

    def __init__(self, weights: Array, stride: int, pads: list[int], cut: list[tuple[int, int]]) -> None:
        self.weights, self.stride, self.pads, self.cut = weights, stride, pads, cut


def _plan(node: NodeProto, draft: GraphDraft) -> _Plan | None:
    """None for what stays: other than two axes, strides that differ, sizes that are derived, or too much more work."""
    if not all(draft.is_float(name) for name in node.input[1:] if name) or len(draft.shape(node.input[1])) != 4:
        return None
    strides, spread = (list(attribute(node, name, [1, 1])) for name in ("strides", "dilations"))
    if strides[0] != strides[1] or attribute(node, "output_shape", None) is not None:
        return None
    if attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID", b""):
        return None
    stride, groups = strides[0], attribute(node, "group", 1)
    stored = draft.array(node.input[1])
    channels, filters, *kernel = stored.shape
    taps = [-(-((k - 1) * d + 1) // stride) for k, d in zip(kernel, spread, strict=True)]
    if np.prod(taps) * stride**2 > MOST_WORK * np.prod(kernel):
        return None
    # Tap t reaches t * dilation pixels on: phase t * dilation % stride, and so many pixels of the image back.
    parts = np.zeros((groups, filters, stride, stride, channels // groups, *taps), np.float32)
    by_group = stored.reshape(groups, channels // groups, filters, *kernel)
    for row, column in np.ndindex(*kernel):
        (down, phase), (along, side) = divmod(row * spread[0], stride), divmod(column * spread[1], stride)
        place = taps[0] - 1 - down, taps[1] - 1 - along
        parts[:, :, phase, side, :, *place] = by_group[:, :, :, row, column].swapaxes(1, 2)
    pads, more = list(attribute(node, "pads", [0] * 4)), list(attribute(node, "output_padding", [0, 0]))
    around, cut = [0] * 4, []
    for axis in range(2):
        before, after = pads[axis], pads[axis + 2]
        reach = (kernel[axis] - 1) * spread[axis] + 1
        beyond = stride * taps[axis] - more[axis] - reach + after  # of stride * (size + taps - 1) results
        first = min(before // stride, taps[axis] - 1)
        last = min(beyond // stride, taps[axis] - 1)  # less than 0 where output_padding is behind all results
        around[axis], around[axis + 2] = taps[axis] - 1 - first, taps[axis] - 1 - last
        cut.append((before - first * stride, beyond - last * stride))
    if groups == 1:  # The filters of a phase side by side: what puts them in place copies runs of pixels' channels.
        parts = parts.transpose(0, 2, 3, 1, 4, 5, 6)
    weights = parts.reshape(groups * filters * stride**2, channels // groups, *taps)
    return _Plan(weights, stride, around, cut)


def _replaced(
    node: NodeProto, plan: _Plan, activations: list[NodeProto], result: str, draft: GraphDraft
) -> list[NodeProto]:
    """Convolution, activations, DepthToSpace and Slice; `result` is what the last activation gave."""
    s, alone = plan.stride, attribute(node, "group", 1) == 1
    operands = [node.input[0], draft.add_constant(f"{node.input[1]}_phases", plan.weights)]
    if len(node.input) > 2 and node.input[2]:
        bias = draft.array(node.input[2])
        bias = np.tile(bias, s * s) if alone else np.repeat(bias, s * s)
        operands.append(draft.add_constant(f"{node.input[2]}_phases", bias))
    value = draft.unused(f"{node.output[0]}_phases")
    options = {"group": attribute(node, "group", 1), "pads": plan.pads, "kernel_shape": list(plan.weights.shape[2:])}
    made = [make_node("Conv", operands, value, node.name, **options)]
    for following in activations:
        copied = NodeProto()
        copied.CopyFrom(following)
        copied.input[0], copied.output[0] = value, draft.unused(f"{following.output[0]}_phases")
        made.append(copied)
        value = copied.output[0]
    if s > 1:
        placed = draft.unused(f"{node.output[0]}_placed")
        name = draft.unused(f"{node.name}_DepthToSpace")
        made.append(make_node("DepthToSpace", [value], placed, name, blocksize=s, mode="DCR" if alone else "CRD"))
        value = placed
    if any(low or high for low, high in plan.cut):
        far = np.iinfo(np.int64).max
        bounds = [low for low, _ in plan.cut], [-high if high else far for _, high in plan.cut], [2, 3]
        constants = [
            draft.add_constant(f"{node.name}_{what}", np.array(numbers, np.int64))
            for what, numbers in zip(("starts", "ends", "axes"), bounds, strict=True)
        ]
        made.append(make_node("Slice", [value, *constants], result, draft.unused(f"{node.name}_Slice")))
    made[-1].output[0] = result
    return made


__all__ = ["split_transposed"]
