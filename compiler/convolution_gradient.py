"""Gradients of convolutions and of pooling by the greatest element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..ir.dims import product
from ..ir.errors import UnsupportedError
from ..ir.graph import Node, Value
from .calls import Call
from .expand import Nodes


def numbers_of(node: Node, name: str, default: Sequence[int]) -> list[int]:
    """An attribute that is a list of integers."""
    found = node.attributes.get(name, tuple(default))
    assert isinstance(found, tuple)
    return [int(item) for item in found]  # type: ignore[arg-type]


def _pads(node: Node, extents: Sequence[Any], kernel: Sequence[int], strides: list[int], steps: list[int]) -> list[int]:
    """The padding before and after each axis, those by `auto_pad` computed."""
    mode, rank = node.attributes.get("auto_pad", "NOTSET"), len(kernel)
    if mode in ("NOTSET", "VALID"):
        return numbers_of(node, "pads", (0,) * (2 * rank)) if mode == "NOTSET" else [0] * (2 * rank)
    before, after = [], []
    for extent, size, stride, step in zip(extents, kernel, strides, steps, strict=True):
        total = max((-(-extent // stride) - 1) * stride + (size - 1) * step + 1 - extent, 0)
        small = total // 2
        before.append(small if mode == "SAME_UPPER" else total - small)
        after.append(total - before[-1])
    return before + after


def conv(
    n: Nodes, node: Node, gradients: Sequence[Value | None], known: Callable[[Value | None], Any]
) -> Sequence[Value | None]:
    """For the image a transposed convolution with the same weights; for the weights a convolution of the image with the
    gradient, in which batch and channels, and strides and dilations, change places; for the bias a sum."""
    x, w = node.operands[:2]
    gradient = gradients[0]
    assert gradient is not None
    rank = x.tensor.rank - 2
    extents, kernel = x.shape[2:], list(w.shape[2:])
    strides, steps = numbers_of(node, "strides", (1,) * rank), numbers_of(node, "dilations", (1,) * rank)
    if any(not isinstance(d, int) for d in (*extents, *w.shape)):
        raise UnsupportedError(f"{node.where}: the gradient of a convolution of images whose size only the run tells")
    pads = _pads(node, extents, kernel, strides, steps)  # type: ignore[arg-type]
    group = node.attributes.get("group", 1)
    assert isinstance(group, int)
    # What the last window leaves of the padded image.
    spare = [(extents[a] + pads[a] + pads[rank + a] - (kernel[a] - 1) * steps[a] - 1) % strides[a] for a in range(rank)]
    image = n(
        "ConvTranspose", gradient, w, strides=tuple(strides), dilations=tuple(steps), pads=tuple(pads), group=group,
        output_padding=tuple(spare),
    )  # fmt: skip
    order = (1, 0, *range(2, rank + 2))
    parts = []
    images = n.split(x, [x.shape[1] // group] * group, 1) if group > 1 else (x,)
    slopes = n.split(gradient, [gradient.shape[1] // group] * group, 1) if group > 1 else (gradient,)
    for mine, slope in zip(images, slopes, strict=True):
        part = n(
            "Conv", n.transpose(mine, *order), n.transpose(slope, *order), strides=tuple(steps),
            dilations=tuple(strides), pads=tuple(pads),
        )  # fmt: skip
        for axis in range(rank):
            part = n.slice(part, axis + 2, 0, kernel[axis])
        parts.append(n.transpose(part, *order))
    weights = parts[0] if group == 1 else n.concat(parts, 0)
    found: list[Value | None] = [image, weights]
    if len(node.inputs) > 2:
        found.append(n("ReduceSum", gradient, n.dims(0, *range(2, rank + 2)), keepdims=0))
    return found


def max_pool(
    n: Nodes, node: Node, gradients: Sequence[Value | None], known: Callable[[Value | None], Any]
) -> Sequence[Value | None]:
    """Each window's gradient goes to the element that MaxPool names as the greatest."""
    x, gradient = node.operands[0], gradients[0]
    assert gradient is not None
    order = {name: value for name, value in node.attributes.items() if name != "storage_order"}
    names = ("", f"{n.stem}.{node.output.name}.places")
    _, places = n.build.emit(Call("MaxPool", (x,), order, names, origin=n.call.origin))
    count, size = product(gradient.shape), product(x.shape)
    start = n.expand(n.like(0, gradient), size)
    flat = (n.reshape(places, count), n.reshape(gradient, count))
    return [n.reshape(n("ScatterElements", start, *flat, axis=0, reduction="add"), *x.shape)]
