"""Windows that slide over spatial axes: what convolutions and poolings have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..dims import Dim, ceildiv, dim_max, dim_min, floordiv, known_le
from ..errors import LimitError, ShapeError
from ..scalars import Scalar
from ..tensors import Indices, all_of, inside

LARGEST_CERTAIN = 16
"""Windows up to this size keep a loop of fixed length where the size of the input is not known."""


LARGEST_WINDOW = 1 << 22
"""Places of a window that may be padding for the most part: each output looks at them all."""


@dataclass(frozen=True)
class Windows:
    """Windows over axes of the extents `input`: kernel position k of output o reads o*stride + k*dilation - before.

    `after` is the padding behind the last element; all tuples have one entry per spatial axis.
    """

    input: tuple[Dim, ...]
    kernel: tuple[Dim, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[Dim, ...]
    after: tuple[Dim, ...]
    output: tuple[Dim, ...]
    ceil_mode: bool = False

    @property
    def rank(self) -> int:
        return len(self.input)

    @property
    def padded(self) -> tuple[bool, ...]:
        """Which axes have windows that may reach beyond the input."""
        pairs = zip(self.before, self.after, strict=True)
        return tuple((first, last) != (0, 0) or self.ceil_mode for first, last in pairs)

    def positions(self, output: Sequence[Dim], kernel: Sequence[Dim]) -> Indices:
        """The input indices that kernel position `kernel` of output `output` reads."""
        steps = zip(output, kernel, self.strides, self.dilations, self.before, strict=True)
        return tuple(o * stride + k * dilation - before for o, k, stride, dilation, before in steps)

    @property
    def reach(self) -> tuple[Dim, ...]:
        """Kernel positions per axis, without those behind the input for every output: a window may be far larger."""
        found: list[Dim] = []
        for axis, kernel in enumerate(self.kernel):
            most = ceildiv(self.input[axis] + self.before[axis], self.dilations[axis])
            worth = isinstance(most, int) or not known_le(kernel, LARGEST_CERTAIN)
            found.append(dim_max(1, dim_min(kernel, most)) if self.padded[axis] and worth else kernel)
        return tuple(found)

    def within(self, positions: Sequence[Dim]) -> Scalar:
        """Whether the positions lie in the input; axes without padding need no test."""
        entries = zip(positions, self.input, self.padded, strict=True)
        return all_of([inside(position, extent) for position, extent, padded in entries if padded])

    def counts(self, output: Sequence[Dim], with_padding: bool) -> tuple[Dim, ...]:
        """How many kernel positions per axis read the input, or the input with its padding."""
        found: list[Dim] = []
        for axis, o in enumerate(output):
            kernel, dilation, padded = self.kernel[axis], self.dilations[axis], self.padded[axis]
            if not padded or (with_padding and not self.ceil_mode):
                found.append(kernel)
                continue
            first = o * self.strides[axis] - self.before[axis]
            low: Dim = -self.before[axis] if with_padding else 0
            high = self.input[axis] + (self.after[axis] if with_padding else 0)
            skipped = ceildiv(dim_max(0, low - first), dilation)
            found.append(dim_max(0, dim_min(kernel, ceildiv(high - first, dilation)) - skipped))
        return tuple(found)


def per_axis(values: Sequence[int] | None, rank: int, what: str) -> tuple[int, ...]:
    """One value per spatial axis, 1 where none are given."""
    if values is not None and len(values) != rank:
        raise ShapeError(f"{len(values)} {what} for {rank} spatial axes")
    return (1,) * rank if values is None else tuple(values)


def sliding(
    input: Sequence[Dim],
    kernel: Sequence[Dim],
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: bool = False,
) -> Windows:
    """The windows that ONNX's attributes describe; ShapeError where a window is larger than the padded input."""
    rank = len(input)
    if len(kernel) != rank:
        raise ShapeError(f"a kernel of {len(kernel)} axes for {rank} spatial axes")
    steps, spread = per_axis(strides, rank, "strides"), per_axis(dilations, rank, "dilations")
    given: tuple[Dim, ...] = tuple(pads) if pads is not None and auto_pad in ("NOTSET", "") else (0,) * (2 * rank)
    if len(given) != 2 * rank:
        raise ShapeError(f"{len(given)} pads for {rank} spatial axes: two are needed for each")
    if any(isinstance(size, int) and size < 1 for size in (*kernel, *steps, *spread)):
        raise ShapeError(f"kernel {list(kernel)}, strides {list(steps)} and dilations {list(spread)} must be positive")
    before, after, output = list(given[:rank]), list(given[rank:]), list(input)
    for axis, (extent, size, stride, dilation) in enumerate(zip(input, kernel, steps, spread, strict=True)):
        reach = (size - 1) * dilation + 1
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            output[axis] = ceildiv(extent, stride)
            total = dim_max(0, (output[axis] - 1) * stride + reach - extent)
            less = floordiv(total, 2)
            before[axis], after[axis] = (less, total - less) if auto_pad == "SAME_UPPER" else (total - less, less)
            continue
        free = extent + before[axis] + after[axis] - reach
        # With ceil_mode a window that starts within the image may end behind the padding: it is clipped.
        if isinstance(free, int) and free < 0 and not (ceil_mode and free > -stride):
            raise ShapeError(f"a window of {reach} is larger than axis {axis} of {extent} padded to {free + reach}")
        output[axis] = floordiv(free, stride) + 1
        if ceil_mode:  # a last window that would start in the padding behind is left out
            output[axis] = dim_min(ceildiv(free, stride) + 1, ceildiv(extent + before[axis], stride))
    found = Windows(
        tuple(input), tuple(kernel), steps, spread, tuple(before), tuple(after), tuple(output), bool(ceil_mode)
    )
    places = math.prod(size for size in found.reach if isinstance(size, int))
    if places > max(LARGEST_WINDOW, 4 * math.prod(extent for extent in input if isinstance(extent, int))):
        raise LimitError(f"a window of {list(kernel)} over {[str(extent) for extent in input]}, mostly of padding")
    return found
