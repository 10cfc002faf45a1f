"""Operands of a product as loaders: read off the expression that their elements are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ....ir import scalars as s
from ....ir.dims import Dim, divide_exactly, linear, symbol
from ....ir.dtypes import I64, DType
from ....ir.loops import Alloc, Let, Statement, Store
from ....ir.scalars import Buffer, Load, Scalar
from .tiles import Loader, Piece, Pieces

COPIES = (16, 8, 4)
"""Bytes that an asynchronous copy moves."""
_WITHIN, _WHICH = "piece.within", "piece.which"


@dataclass(frozen=True)
class Matrix:
    """An operand by definition: its element is `value` over the symbols `position` and "depth" (and "batch").

    `extents` are those of position and depth.
    """

    side: str
    value: Scalar
    position: str
    extents: tuple[Dim, Dim]

    @property
    def dtype(self) -> DType:
        return self.value.dtype

    def axis(self, along_depth: bool) -> tuple[str, Dim]:
        """Name and extent of an axis."""
        return ("depth", self.extents[1]) if along_depth else (self.position, self.extents[0])


@dataclass(frozen=True)
class Read:
    """A value that is an element of memory, or 0 where the condition is false."""

    load: Load
    condition: Scalar | None = None


def as_read(value: Scalar) -> Read | None:
    """The element of memory that a value is, or None."""
    if isinstance(value, s.Select) and isinstance(value.no, s.Const) and value.no.value == 0:
        inner = as_read(value.yes)
        if inner is not None and inner.condition is None:
            return Read(inner.load, value.condition)
    if isinstance(value, Load) and value.stride == 1 and value.lanes == 1 and value.buffer.space == "parameter":
        return Read(s.load(value.buffer, value.offset), value.predicate)  # type: ignore[arg-type]
    return None


def neighbours(matrix: Matrix, read: Read, count: int, along_depth: bool) -> Dim | None:
    """The offset of the first of `count` elements that are neighbours in the matrix along an axis and in memory, all
    there or none, as a function of `position` and "depth"; None where they are not."""
    name, extent = matrix.axis(along_depth)
    pieces = divide_exactly(extent, count)
    if pieces is None:
        return None
    within, which = symbol(_WITHIN, 0, count - 1), symbol(_WHICH, 0, pieces - 1)
    at = s.Rewriter(dims={name: which * count + within})
    split = linear(at.dim(read.load.offset), _WITHIN)
    if split is None or split[0] != 1 or divide_exactly(split[1], count) is None:
        return None
    if read.condition is not None and at(read.condition).mentions(_WITHIN):
        return None
    return read.load.offset


class MemoryLoader(Loader):
    """Pieces that lie in memory. What their addresses take of a position is found once, where it can be told from what
    they take of the depth."""

    def __init__(self, matrix: Matrix, read: Read, elements: int, along_depth: bool) -> None:
        self.matrix, self.read, self.elements, self.along_depth = matrix, read, elements, along_depth
        self.dtype = matrix.dtype
        offset = read.load.offset
        self.start = s.Rewriter(dims={"depth": 0}).dim(offset)
        self.deeper = offset - self.start
        name = matrix.position
        slope = linear(self.start, name)
        constant = slope is not None and name not in s.free_symbols(slope[0])
        self.slope = slope[0] if slope is not None and constant else None
        self.separate = name not in s.free_symbols(self.deeper)

    @property
    def _origin(self) -> str:
        return f"{self.matrix.side}_from"

    def _registers(self, pieces: Pieces) -> Buffer:
        return Buffer(self._origin, I64, pieces.count, "register")

    def _start(self, position: Dim) -> Dim:
        return s.Rewriter(dims={self.matrix.position: position}).dim(self.start)

    def begin(self, pieces: Pieces) -> list[Statement]:
        if not self.separate:
            return []
        if self.slope is not None:
            return [Let(self._origin, self._start(pieces.position(0)))]
        registers = self._registers(pieces)
        start = s.index(self._start(pieces.position(pieces.number)))
        return [Alloc(registers), *pieces.each([Store(registers, pieces.number, start)])]

    def piece(self, pieces: Pieces, number: Dim, tile: Dim) -> Piece:
        position, depth = pieces.position(number), pieces.depth(number, tile)
        here = s.Rewriter(dims={self.matrix.position: position, "depth": depth})
        valid = None if self.read.condition is None else here(self.read.condition)
        if not self.separate:
            offset = here.dim(self.read.load.offset)
        elif self.slope is not None:
            steps = position - pieces.position(0)
            offset = symbol(self._origin) + steps * self.slope + here.dim(self.deeper)
        else:
            offset = s.as_dim(s.load(self._registers(pieces), number)) + here.dim(self.deeper)
        return Piece(self.read.load.buffer, offset, valid)


class ValueLoader(Loader):
    """Elements by expression, one by one: whatever else an operand may be, and rows that are aligned to nothing."""

    asynchronous = False
    elements = 1

    def __init__(self, matrix: Matrix, along_depth: bool) -> None:
        self.matrix, self.along_depth, self.dtype = matrix, along_depth, matrix.dtype
        self.held = max(1, self.dtype.bytes // 4)

    def piece(self, pieces: Pieces, number: Dim, tile: Dim) -> Piece:
        raise NotImplementedError

    def value(self, pieces: Pieces, number: Dim, tile: Dim) -> Scalar:
        dims = {self.matrix.position: pieces.position(number), "depth": pieces.depth(number, tile)}
        return s.Rewriter(dims=dims)(self.matrix.value)


def loader_of(matrix: Matrix, alignment: Callable[[str], int], depth_only: bool = False) -> Loader:
    """The loader of the widest pieces that the operand's place in memory allows.

    `alignment` gives the bytes to which a buffer is aligned; `depth_only` asks for pieces along depth.
    """
    read = as_read(matrix.value)
    axes: Sequence[bool] = (True,) if depth_only else (True, False)
    if read is not None:
        for width in COPIES:
            count = width // matrix.dtype.bytes
            aligned = count * matrix.dtype.bytes == width and alignment(read.load.buffer.name) >= width
            if not aligned:
                continue
            for along_depth in sorted(axes, key=lambda deep: not _runs(matrix, deep)):
                if count and neighbours(matrix, read, count, along_depth) is not None:
                    return MemoryLoader(matrix, read, count, along_depth)
    return ValueLoader(matrix, depth_only or not _runs(matrix, False))


def _runs(matrix: Matrix, along_depth: bool) -> bool:
    """Whether elements that follow one another along an axis do so in memory."""
    name, _ = matrix.axis(along_depth)
    read = as_read(matrix.value)
    split = None if read is None else linear(read.load.offset, name)
    return split is not None and split[0] == 1
