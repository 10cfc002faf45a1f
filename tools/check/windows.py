"""Convolutions of f32 as matrix products, whose code is made for a shape and not for certain weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

Array = NDArray[Any]
LARGEST = 1 << 28
"""Bytes that the copy of an image for its windows may take."""


def factors(node: NodeProto, x: Array, w: Array) -> tuple[Array, Array, tuple[int, ...]] | None:
    """A Conv of x [n, channels, *sizes] by w [filters, channels / group, *kernel], its bias left out, as a product of
    filters [group, filters / group, depth] and columns [n, group, depth, pixels], and the shape that its result has.

    None for what is no Conv of f32, and where the columns, in which each window is a copy, were too large.
    """
    if node.op_type != "Conv" or node.domain not in ("", "ai.onnx") or {x.dtype, w.dtype} != {np.dtype(np.float32)}:
        return None
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    rank, group, kernel = x.ndim - 2, int(attributes.get("group", 1)), w.shape[2:]
    strides, dilations = (tuple(attributes.get(name, (1,) * rank)) for name in ("strides", "dilations"))
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    before, after = _pads(attributes, x.shape[2:], reach, strides)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    windows: Array = np.lib.stride_tricks.sliding_window_view(padded, reach, tuple(range(2, x.ndim)))
    steps = [slice(None, None, step) for step in (*strides, *dilations)]
    windows = windows[(slice(None), slice(None), *steps)]
    if windows.size * windows.itemsize > LARGEST:
        return None
    sizes = windows.shape[2 : 2 + rank]
    order = (0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))
    columns = windows.transpose(order).reshape(x.shape[0], group, -1, int(np.prod(sizes)))
    return w.reshape(group, w.shape[0] // group, -1), columns, (x.shape[0], w.shape[0], *sizes)


def _pads(
    attributes: Mapping[str, Any], sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int]
) -> tuple[Sequence[int], Sequence[int]]:
    """How much is added before and after each axis."""
    kind, rank = attributes.get("auto_pad", b"NOTSET"), len(sizes)
    if kind not in (b"SAME_UPPER", b"SAME_LOWER"):
        pads = attributes.get("pads") if kind == b"NOTSET" else None
        pads = list(pads or (0,) * 2 * rank)
        return pads[:rank], pads[rank:]
    total = [max(0, (-(-n // s) - 1) * s + k - n) for n, s, k in zip(sizes, strides, reach, strict=True)]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    return (less, more) if kind == b"SAME_UPPER" else (more, less)
