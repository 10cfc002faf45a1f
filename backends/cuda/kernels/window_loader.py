"""The left operand of an implicit GEMM: a row is an output pixel, the depth goes over taps, in each over channels.

What an address takes of the pixel is found once and kept in registers: where its window begins, and as bits which taps
of each axis lie inside the image. What it takes of the depth is found once for each stage, or where the pieces of a
thread differ in depth, looked up in a table in shared memory that the block makes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, divide_exactly, product, symbol
from ....ir.dtypes import BOOL, I32, I64, U16, DType
from ....ir.loops import Alloc, Barrier, Define, For, If, Let, Statement, Store
from ....ir.ops.windows import Windows
from ....ir.scalars import Buffer, Scalar
from ....ir.tensors import inside, unflatten
from ...kernels.operands import Affine
from ..launch import LARGEST_32
from .loaders import COPIES
from .tiles import Loader, Piece, Pieces

MOST_TAPS = 30
"""Taps along all axes together that the bits of a register tell; one more tells of what lies behind the depth."""
_BEHIND = 1 << MOST_TAPS


@dataclass(frozen=True)
class Image:
    """Windows over an image in memory, [images, *spatial, channels], as the rows of a matrix.

    A row has `channels` of each tap; those of group number `group` begin at group * channels. `depth` is that of the
    matrix: what lies behind the last tap is zero. Where not all windows have all taps, `own_taps` are theirs by axis.
    """

    memory: Affine
    windows: Windows
    group: Dim
    channels: int
    depth: int
    own_taps: tuple[Dim, ...] | None = None

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(int(str(extent)) for extent in self.windows.kernel)

    @property
    def taps(self) -> int:
        return int(str(product(self.kernel)))

    @property
    def padded(self) -> tuple[int, ...]:
        """The axes whose taps may be outside."""
        return tuple(axis for axis, padded in enumerate(self.windows.padded) if padded)

    @property
    def tested(self) -> bool:
        """Whether there are elements of the matrix that are none of the image."""
        return bool(self.padded) or self.depth != self.taps * self.channels

    @property
    def is_supported(self) -> bool:
        return sum(self.kernel[axis] for axis in self.padded) <= MOST_TAPS

    def first_bit(self, axis: int) -> int:
        """Where the bits of an axis begin."""
        return sum(self.kernel[other] for other in self.padded if other < axis)

    def pixel(self, row: Dim) -> tuple[Dim, ...]:
        """Image and place in the output."""
        return unflatten(row, (1, *self.windows.output))  # the first extent does not matter

    def lines(self, row: Dim) -> list[Dim]:
        """Where the window of an output pixel begins along each axis."""
        _, *output = self.pixel(row)
        windows = self.windows
        return [o * step - first for o, step, first in zip(output, windows.strides, windows.before, strict=True)]

    def origin(self, row: Dim) -> Dim:
        """The offset of the first channel of an output pixel's first tap."""
        strides = self.memory.strides
        offset = self.memory.start + self.pixel(row)[0] * strides[0]
        for line, stride in zip(self.lines(row), strides[1:-1], strict=True):
            offset = offset + line * stride
        return offset + self.group * self.channels * strides[-1]

    def tap(self, depth: Dim) -> tuple[Dim, ...]:
        """The tap along each axis, of an element of the depth."""
        return unflatten(depth // self.channels, self.kernel) if self.taps > 1 else (0,) * len(self.kernel)

    def shift(self, depth: Dim) -> Dim:
        """How far from the origin an element of the depth lies."""
        strides = self.memory.strides
        channel = depth % self.channels if self.taps > 1 else depth
        offset = channel * strides[-1]
        for tap, spread, stride in zip(self.tap(depth), self.windows.dilations, strides[1:-1], strict=True):
            offset = offset + tap * spread * stride
        return offset

    def needed(self, depth: Dim) -> Scalar:
        """The bits that a pixel must have for an element of the depth."""
        taps = self.tap(depth)
        places = [s.cast(s.index(taps[axis] + self.first_bit(axis)), I32) for axis in self.padded]
        each = [s.binary("shl", s.const(1, I32), place) for place in places] or [s.const(0, I32)]
        bits = reduce(lambda a, b: s.binary("or", a, b), each)
        if self.depth != self.taps * self.channels:
            behind = s.binary("le", s.const(self.taps * self.channels, I64), s.index(depth))
            bits = s.select(behind, s.const(_BEHIND, I32), bits)
        return bits


class _Windows(Loader):
    """What loaders of windows share; `elements` neighbouring channels or, along rows, single pixels in a piece."""

    def __init__(self, image: Image, elements: int = 1) -> None:
        self.image, self.elements = image, elements
        self.dtype = image.memory.buffer.dtype
        # Pixels one by one: neighbouring threads take neighbouring pixels, and need to find but one each. Bytes are
        # multiplied along the depth only.
        self.along_depth = elements > 1 or self.dtype.bytes == 1
        size = image.memory.buffer.size
        self.index_type = I64 if isinstance(size, int) and size > LARGEST_32 else I32
        self.held = (2 if self.along_depth else 0) + (0 if self.asynchronous else 1)

    # Where names stand for what

    def _rows(self, pieces: Pieces) -> int:
        """How many pixels a thread has: its pieces go round them."""
        if "piece" not in s.free_symbols(pieces.position(pieces.number)):
            return 1
        across = 0 if self.along_depth else pieces.shared.inner // self.elements
        return across // pieces.threads if across and across % pieces.threads == 0 else pieces.count

    def _has_table(self, pieces: Pieces) -> bool:
        return "piece" in s.free_symbols(pieces.depth(pieces.number, 0))

    def _origins(self, pieces: Pieces) -> Buffer:
        return Buffer(f"{pieces.side}_origin", self.index_type, self._rows(pieces), "register")

    def _bits(self, pieces: Pieces) -> Buffer:
        return Buffer(f"{pieces.side}_inside", I32, self._rows(pieces), "register")

    def _needed(self, pieces: Pieces) -> Buffer:
        return Buffer(f"{pieces.side}_needed", I32, 1, "register")

    def _table(self, pieces: Pieces) -> Buffer:
        """For each element of the depth how far it is from the origin, and the bits that it needs where any does."""
        size = self._table_size(pieces) * self._told_of
        return Buffer(f"{pieces.side}_table", self.index_type, size, "shared")

    @property
    def _told_of(self) -> int:
        return 2 if self.image.tested else 1

    def _table_size(self, pieces: Pieces) -> int:
        """All elements of the depth, in whole stages."""
        stage = pieces.shared.inner if self.along_depth else pieces.shared.outer
        return -(-self.image.depth // stage) * stage

    def begin(self, pieces: Pieces) -> list[Statement]:
        image, count = self.image, self._rows(pieces)
        number: Dim = 0 if count == 1 else symbol("piece", 0, count - 1)
        name = f"{pieces.side}_pixel"
        row = symbol(name, 0, pieces.extent - 1)
        origins, bits = self._origins(pieces), self._bits(pieces)
        body: list[Statement] = [
            Let(name, pieces.position(number)),
            Store(origins, number, s.cast(s.index(image.origin(row)), self.index_type)),
        ]
        if image.tested:
            body += self._inside(pieces, row, bits, number)
        result: list[Statement] = [Alloc(origins), *([Alloc(bits)] if image.tested else [])]
        result += [For("piece", count, tuple(body), "unrolled")] if count > 1 else body
        return result + (self._made_table(pieces) if self._has_table(pieces) else [])

    def _inside(self, pieces: Pieces, row: Dim, bits: Buffer, number: Dim) -> list[Statement]:
        """Which taps of a pixel lie in the image, as bits."""
        image = self.image
        result: list[Statement] = [Store(bits, number, s.const(0, I32))]
        lines = image.lines(row)
        for axis in image.padded:
            extent, name = image.kernel[axis], f"{pieces.side}_line{axis}"
            result.append(Let(name, lines[axis]))
            tap = symbol("tap", 0, extent - 1) if extent > 1 else 0
            there = inside(symbol(name, None) + tap * image.windows.dilations[axis], image.windows.input[axis])
            if image.own_taps is not None:
                there = s.binary("and", there, s.index(tap) < s.index(image.own_taps[axis]))
            place = s.cast(s.index(tap + image.first_bit(axis)), I32)
            bit = s.binary("shl", s.cast(there, I32), place)
            store = Store(bits, number, s.binary("or", s.load(bits, number), bit))
            result += [For("tap", extent, (store,), "unrolled")] if extent > 1 else [store]
        return result

    def _made_table(self, pieces: Pieces) -> list[Statement]:
        table, size, width = self._table(pieces), self._table_size(pieces), self._told_of
        turns = ceildiv(size, pieces.threads)
        at = k.index_symbol("turn", turns) * pieces.threads + symbol("thread", 0, pieces.threads - 1)
        entry = symbol("entry", 0, size - 1)
        shift = Store(table, entry * width, s.cast(s.index(self.image.shift(entry)), table.dtype))
        body: list[Statement] = [Let("entry", at), shift]
        if self.image.tested:
            body.append(Store(table, entry * width + 1, s.cast(self.image.needed(entry), table.dtype)))
        inside = s.index(at) < s.index(size)
        whole = tuple(body) if isinstance(inside, s.Const) else (If(inside, tuple(body)),)
        return [Alloc(table), For("turn", turns, whole), Barrier()]

    def turn(self, pieces: Pieces, tile: Dim) -> list[Statement]:
        if self._has_table(pieces):
            return []
        side = pieces.side
        depth = symbol(f"{side}_depth", 0)
        result: list[Statement] = [
            Let(f"{side}_depth", pieces.depth(0, tile)),
            Let(f"{side}_shift", self.image.shift(depth)),
        ]
        if self.image.tested:
            result.append(Define(self._needed(pieces), self.image.needed(depth)))
        return result

    def _told(self, pieces: Pieces, number: Dim, tile: Dim) -> tuple[Scalar, Scalar]:
        """What the depth of a piece tells: how far it is from the origin, and the bits that its pixel must have."""
        if not self._has_table(pieces):
            return s.index(symbol(f"{pieces.side}_shift", None)), s.load(self._needed(pieces), 0)
        entry = self._entry(pieces, number, tile)
        told = [s.load(self._table(pieces), entry + which) for which in range(self._told_of)]
        return told[0], s.cast(told[-1], I32)

    def _entry(self, pieces: Pieces, number: Dim, tile: Dim) -> Dim:
        """Where the table tells of a piece; it ends with the last stage."""
        stage = pieces.shared.inner if self.along_depth else pieces.shared.outer
        last = self._table_size(pieces) // stage - 1
        return pieces.depth(number, dim_min(tile, last)) * self._told_of

    def _found(self, pieces: Pieces, number: Dim, told: tuple[Scalar, Scalar]) -> tuple[Dim, Scalar]:
        """Where the first element of a piece lies, and whether the image has it."""
        count = self._rows(pieces)
        row = number % count if count < pieces.count else number
        shift, needed = told
        offset = s.as_dim(s.load(self._origins(pieces), row)) + s.as_dim(shift)
        if not self.image.tested:
            return offset, s.const(True, BOOL)
        return offset, s.binary("and", s.load(self._bits(pieces), row), needed).equal(needed)


class WindowLoader(_Windows):
    """Windows by asynchronous copies of 16, 8 or 4 bytes."""

    def piece(self, pieces: Pieces, number: Dim, tile: Dim) -> Piece:
        offset, inside = self._found(pieces, number, self._told(pieces, number, tile))
        return Piece(self.image.memory.buffer, offset, None if isinstance(inside, s.Const) else inside)


class WindowValues(_Windows):
    """Windows of narrow elements one at a time, by way of registers, as the bits that memory holds."""

    asynchronous = False

    @property
    def staged(self) -> DType:
        return U16 if self.dtype.bytes == 2 else self.dtype

    def piece(self, pieces: Pieces, number: Dim, tile: Dim) -> Piece:
        raise NotImplementedError

    def fetch(self, pieces: Pieces, number: Dim, tile: Dim, valid: Scalar, staged: Buffer) -> list[Statement]:
        result: list[Statement] = [Store(staged, number, s.const(0, staged.dtype))]
        if isinstance(valid, s.Const) and not valid.value:
            return result
        told = self._told(pieces, number, tile)
        if self._has_table(pieces):  # Read in one whether the element is there or not.
            table, count = self._table(pieces), self._told_of
            entry = Buffer(f"{pieces.side}_entry", table.dtype, count, "register")
            both = s.load(table, self._entry(pieces, number, tile), count, aligned=count > 1)
            result.append(Define(entry, both))
            told = s.load(entry, 0), s.cast(s.load(entry, count - 1), I32)
        offset, inside = self._found(pieces, number, told)
        there = s.binary("and", valid, inside)
        store = Store(staged, number, s.bitcast(s.load(self.image.memory.buffer, offset), staged.dtype))
        return [*result, *([store] if isinstance(there, s.Const) else [If(there, (store,))])]


def window_loader(image: Image, alignment: int) -> _Windows:
    """The loader of the widest pieces that the image's place in memory allows; `alignment` is that of its buffer."""
    memory, size = image.memory, image.memory.buffer.dtype.bytes
    steps: Sequence[Dim] = (memory.start, *memory.strides[:-1], image.channels)
    for width in COPIES:
        elements = width // size
        whole = elements > 1 and all(divide_exactly(step, elements) is not None for step in steps)
        if memory.strides[-1] == 1 and whole and alignment >= width:
            return WindowLoader(image, elements)
    return WindowLoader(image) if size in COPIES and alignment >= size else WindowValues(image)
