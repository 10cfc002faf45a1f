"""Weights of a few bits in panels of columns, as they lie in memory and as they are unpacked in registers.

A panel is [group][column]: a group is a word of 32 bits that holds the codes of 32 / bits neighbours along the depth of
one column, the first in the lowest bits, so that a vector of words unpacks to vectors of columns by a mask or a shift
alone. Scales and zero points are [block][column].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ....ir import scalars as s
from ....ir.dims import Dim
from ....ir.dtypes import BF16, F16, F32, I32, U8, U32, DType, of_numpy
from ....ir.loops import Alias, Statement
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Region
from ...kernels.operands import Affine, affine, constant_array
from .packing import Columns, Panels
from .product import Axis
from .register_tile import Tile

WORD = 32
"""Bits of a group of codes of one column."""
STEP = 16
"""Elements of which the depth of a prepared left operand is a multiple: of as many as there are codes in a word."""


MOST_SUMMED = 256
"""Elements along the depth that are summed before they are scaled and added to the rest: errors grow with such a run,
and with what a zero point takes off its sum."""


@dataclass(frozen=True)
class PackedProduct:
    """A region's product of rows by packed weights: `rows` are the axes of the result before its last, with the
    distances along them in the left operand `left`; the arrays are as `onnxc.PackedMatMul` has them."""

    left: Affine
    rows: tuple[Axis, ...]
    column: str
    columns: int
    depth: int
    bits: int
    block: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    accuracy_level: int

    @property
    def group(self) -> int:
        """Codes of a word."""
        return WORD // self.bits

    @property
    def blocks(self) -> int:
        return int(self.scales.shape[1])

    @property
    def run(self) -> int:
        """Neighbours along the depth that are summed at once: a block or an even part of it."""
        groups = self.block // self.group
        most = max(d for d in range(1, groups + 1) if groups % d == 0 and (d == 1 or d * self.group <= MOST_SUMMED))
        return most * self.group

    @property
    def padded(self) -> int:
        """The depth with what fills the last block."""
        return self.blocks * self.block


def packed_product(region: Region) -> PackedProduct | None:
    """The region's product; None where weights are no constants, or blocks end within a word."""
    left, output = affine(region.operands[0]) if region.operands[0] is not None else None, region.anchor_output
    arrays = [constant_array(region, tensor) for tensor in region.operands[1:3]]
    last = region.operands[3] if len(region.operands) > 3 else None
    zeros = constant_array(region, last)
    if left is None or output is None or any(a is None for a in arrays) or (last is not None and zeros is None):
        return None
    assert region.anchor is not None and arrays[0] is not None and arrays[1] is not None
    given = {name: int(str(region.anchor.attributes.get(name, 0))) for name in _ATTRIBUTES}
    columns, depth, bits, block = output.shape[-1], given["depth"], given["bits"], given["block_size"]
    if not isinstance(columns, int) or columns < 2 or 0 in output.shape or depth < 1:
        return None
    if arrays[1].shape[1] == 1:
        unit = STEP if depth <= MOST_SUMMED else 4 * STEP
        block = -(-depth // unit) * unit
    if block % (WORD // bits):
        return None
    steps = zip(output.shape[:-1], left.strides[:-1], strict=True)
    rows = tuple(Axis(f"o{axis}", extent, step, 0) for axis, (extent, step) in enumerate(steps) if extent != 1)
    column = f"o{len(output.shape) - 1}"
    return PackedProduct(
        left, rows, column, columns, depth, bits, block, arrays[0], arrays[1], zeros, given["accuracy_level"]
    )


_ATTRIBUTES = ("depth", "bits", "block_size", "accuracy_level")


class WeightPanels:
    """Codes, scales and zero points in panels of `tile.vectors` vectors, and how they are read from there."""

    def __init__(self, found: PackedProduct, tile: Tile, target: Target) -> None:
        self.found, self.lanes = found, tile.lanes
        self.panels = Panels(tile, found.columns, found.padded)
        self.groups = found.padded // found.group
        padded = int(str(self.panels.padded))
        self.words = Buffer("packed_codes", U32, padded * self.groups)
        scale = of_numpy(found.scales.dtype)
        narrow = scale == BF16 or (scale == F16 and (target.has("f16c") or target.has("neon")))
        self.scales = Buffer("packed_scales", scale if narrow else F32, padded * found.blocks)
        whole = found.zeros is not None and found.zeros.dtype == np.uint8
        self.zeros = Buffer("packed_zeros", U8 if whole else F32, padded * found.blocks)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return (self.words, self.scales, *([] if self.found.zeros is None else [self.zeros]))

    # When the model is compiled

    def packed(self) -> dict[str, Callable[[], np.ndarray]]:
        """What makes the arrays of the buffers."""
        found = self.found
        makers = {self.words.name: lambda: self._by_panels(self._codes(), U32)}
        makers[self.scales.name] = lambda: self._by_panels(found.scales, self.scales.dtype)
        if (zeros := found.zeros) is not None:
            makers[self.zeros.name] = lambda: self._by_panels(zeros, self.zeros.dtype)
        return makers

    def _codes(self) -> np.ndarray:
        """The words [columns, groups] of the codes."""
        codes, room = self.found.codes, self.groups * 4
        if codes.shape[1] < room:
            codes = np.pad(codes, ((0, 0), (0, room - codes.shape[1])))
        return np.ascontiguousarray(codes[:, :room]).view("<u4")

    def _by_panels(self, array: np.ndarray, dtype: DType) -> np.ndarray:
        """[columns, positions] as panels, each [position][column]."""
        (columns, positions), width = array.shape, self.panels.tile.width
        padded = int(str(self.panels.padded))
        result, at = np.zeros(padded * positions, dtype.numpy), 0
        for first in range(0, columns, width):
            room, here = min(width, padded - first), min(width, columns - first)
            result[at : at + room * positions].reshape(positions, room)[:, :here] = array[first : first + here].T
            at += room * positions
        return result

    # In a kernel

    @cached_property
    def _places(self) -> dict[str, Buffer]:
        return {b.name: Buffer(b.name.removeprefix("packed_"), b.dtype) for b in self.buffers}

    def aliases(self, column: Dim) -> Iterator[Statement]:
        """Names the panel that begins at a column."""
        for buffer in self.buffers:
            positions = self.groups if buffer is self.words else self.found.blocks
            yield Alias(self._places[buffer.name], buffer, column * positions)

    def word(self, columns: Columns, group: Dim, v: int) -> Scalar:
        """A vector of words."""
        return s.load(self._places[self.words.name], (group * columns.vectors + v) * self.lanes, self.lanes)

    @property
    def centre(self) -> float:
        """What `code` is less than the code in memory: of 8 bits most of a sum of codes would be that."""
        return 128.0 if self.found.bits == 8 else 0.0

    def code(self, word: Scalar, place: int) -> Scalar:
        """The codes of number `place` of each word, less `centre`, times `weight_of(place)`, as f32."""
        bits, lanes = self.found.bits, self.lanes
        if place == self.found.group - 1:
            chosen = s.binary("shr", word, s.const(WORD - bits, U32, lanes))
        else:
            chosen = word & s.const(((1 << bits) - 1) << (place * bits), U32, lanes)
        found = s.cast(s.bitcast(chosen, I32), F32)
        return found - s.const(self.centre * self.weight_of(place), F32, lanes) if self.centre else found

    def alone(self, word: Scalar, place: int) -> Scalar:
        """The codes of number `place` of each word, as integers."""
        bits, lanes = self.found.bits, self.lanes
        low = s.binary("shr", word, s.const(place * bits, U32, lanes)) if place else word
        last = place == self.found.group - 1
        return low if last else low & s.const((1 << bits) - 1, U32, lanes)

    def weight_of(self, place: int) -> float:
        """By what `code` is too large: a power of two."""
        return 1.0 if place == self.found.group - 1 else float(1 << (place * self.found.bits))

    def scale(self, columns: Columns, block: Dim, v: int) -> Scalar:
        """A vector of scales."""
        place = self._places[self.scales.name]
        return s.cast(s.load(place, (block * columns.vectors + v) * self.lanes, self.lanes), F32)

    def zero(self, columns: Columns, block: Dim, v: int) -> Scalar | None:
        """A vector of zero points less `centre`; None where all are 0."""
        if self.found.zeros is None:
            zero = float(1 << (self.found.bits - 1)) - self.centre
            return s.const(zero, F32, self.lanes) if zero else None
        zeros = self.full_zero(columns, block, v)
        return zeros - s.const(self.centre, F32, self.lanes) if self.centre else zeros

    def full_zero(self, columns: Columns, block: Dim, v: int) -> Scalar:
        """A vector of zero points of codes as they are in memory."""
        if self.found.zeros is None:
            return s.const(float(1 << (self.found.bits - 1)), F32, self.lanes)
        place = self._places[self.zeros.name]
        return s.cast(s.load(place, (block * columns.vectors + v) * self.lanes, self.lanes), F32)

    def zero_codes(self, columns: Columns, block: Dim, v: int) -> Scalar:
        """A vector of zero points as integers."""
        if self.found.zeros is None:
            return s.const(1 << (self.found.bits - 1), U32, self.lanes)
        place = self._places[self.zeros.name]
        return s.cast(s.load(place, (block * columns.vectors + v) * self.lanes, self.lanes), U32)
