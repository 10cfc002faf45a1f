"""The block tile of a product: a pipeline of stages in shared memory, from which warps multiply.

A block makes `rows` x `columns` of the result. Both operands pass through shared memory in stages of `depth`; while one
stage is multiplied the copies of the next ones are under way (after CUTLASS's multistage pipeline). The parts are:

- `Loader`: where the elements of one operand come from. An operand is a matrix [positions, depth], the positions being
  rows (left) or columns (right) of the result. What a new kind of contraction (an implicit GEMM) brings is a loader:
    `dtype`, `elements`, `along_depth`: a piece is so many neighbours in depth, or in position, of this type;
    `rounded`: elements of f32 are tf32 already; `held`: registers that a thread keeps for each of its pieces;
    `asynchronous`: pieces of 16, 8 or 4 bytes that lie in memory as they are, or else single elements by expression;
    `begin(pieces)`: statements of a thread before the loop, e.g. registers with what its positions cost to find;
    `turn(pieces, tile)`: statements of a thread before it copies its pieces of stage number `tile` of the depth;
    `piece(pieces, number, tile)`: where piece `number` of the thread lies (of asynchronous loaders),
    `value(pieces, number, tile)`: or the element that it is.
  `pieces.position(number)` and `pieces.depth(number, tile)` are the indices of its first element in the operand. Checks
  against the operand's extents are made here; conditions of its own (padding) a loader adds in `Piece.valid`. The
  batch, `symbol("batch")`, is in scope.
- `SharedTile`: how a stage of an operand lies in shared memory, its pieces of 16 bytes permuted by XOR so that neither
  copies nor reads meet in a bank.
- `Multiplier` (`multiply.py`): warps that read a stage and keep sums in registers.
- `finish.py`: what becomes of the sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, symbol
from ....ir.dtypes import BOOL, I64, DType
from ....ir.loops import Address, Alias, Alloc, Barrier, For, If, Intrinsic, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar

CHUNK = 16
"""Bytes that are copied and read together: what one instruction moves at most."""
_GROUPS = 8  # of 16 bytes, that the banks of shared memory serve at once


def unrolled(index: str, extent: int, body: Sequence[Statement]) -> list[Statement]:
    """A loop with constant indices; without one where it has a single iteration (the index is then 0)."""
    return list(body) if extent == 1 else [For(index, extent, tuple(body), "unrolled")]


def counter(index: str, extent: int) -> Dim:
    """The index of an `unrolled` loop."""
    return 0 if extent == 1 else symbol(index, 0, extent - 1)


@dataclass(frozen=True)
class Tile:
    """How a block divides its part of a product: `rows` x `columns` of the result, `depth` in a stage, of which there
    are `stages`; warps along rows, columns and depth (those of one place in depth add up their sums at the end)."""

    rows: int
    columns: int
    depth: int
    warps: tuple[int, int, int]
    stages: int

    @property
    def threads(self) -> int:
        return 32 * self.warps[0] * self.warps[1] * self.warps[2]

    @property
    def warp_rows(self) -> int:
        return self.rows // self.warps[0]

    @property
    def warp_columns(self) -> int:
        return self.columns // self.warps[1]

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}_w{'x'.join(map(str, self.warps))}_s{self.stages}"


@dataclass(frozen=True)
class SharedTile:
    """One operand's stage in shared memory: [outer, inner] elements, inner ones contiguous but for the permutation.

    Chunk c of row r lies where c ^ (r's place among the rows that share a line of banks) would, times `twist`, which is
    2 where neighbouring rows are read by single words of two chunks.
    """

    outer: int
    inner: int
    dtype: DType
    twist: int = 1

    @property
    def size(self) -> int:
        return self.outer * self.inner

    @property
    def chunk(self) -> int:
        """Elements of 16 bytes."""
        return CHUNK // self.dtype.bytes

    def offset(self, outer: Dim, inner: Dim) -> Dim:
        """The element's place in the stage."""
        chunk, within = inner // self.chunk, inner % self.chunk
        return outer * self.inner + self._permuted(outer, chunk) * self.chunk + within

    def _permuted(self, outer: Dim, chunk: Dim) -> Dim:
        chunks = self.inner // self.chunk
        assert chunks & (chunks - 1) == 0, f"{chunks} chunks in a row"
        lines = max(1, _GROUPS // chunks)  # rows that lie in one line of all banks
        turns = min(chunks, _GROUPS) // self.twist
        if turns < 2:
            return chunk
        return xor(chunk, outer // lines % turns * self.twist, chunks - 1)


def xor(a: Dim, b: Dim, upper: int) -> Dim:
    """a ^ b, at most `upper`."""
    if isinstance(a, int) and isinstance(b, int):
        return a ^ b
    return s.as_dim(s.binary("xor", s.index(a), s.index(b)), 0, upper)


@dataclass(frozen=True)
class Piece:
    """Elements of an operand that lie together in memory; `valid` false: zeros instead."""

    buffer: Buffer
    offset: Dim
    valid: Scalar | None = None


@dataclass(frozen=True)
class Pieces:
    """The pieces of a stage that a thread copies, numbered from 0 to `count` - 1.

    `side` is "left" or "right", `origin` the first position of the block, `extent` how many positions there are.
    """

    side: str
    shared: SharedTile
    elements: int
    along_depth: bool
    threads: int
    origin: Dim
    extent: Dim

    @property
    def total(self) -> int:
        return self.shared.size // self.elements

    @property
    def count(self) -> int:
        return -(-self.total // self.threads)

    @property
    def number(self) -> Dim:
        """The index of an unrolled loop over all pieces."""
        return counter("piece", self.count)

    def place(self, number: Dim) -> tuple[Dim, Dim]:
        """Row and first element in the shared tile."""
        flat = number * self.threads + symbol("thread", 0, self.threads - 1)
        in_row = self.shared.inner // self.elements
        return flat // in_row, flat % in_row * self.elements

    def position(self, number: Dim) -> Dim:
        outer, inner = self.place(number)
        return self.origin + (outer if self.along_depth else inner)

    def depth(self, number: Dim, tile: Dim) -> Dim:
        outer, inner = self.place(number)
        stage = self.shared.inner if self.along_depth else self.shared.outer
        return tile * stage + (inner if self.along_depth else outer)

    def there(self, number: Dim) -> Scalar:
        """Whether the thread has this piece: the last round may need fewer threads."""
        if self.total % self.threads == 0:
            return s.const(True, BOOL)
        flat = number * self.threads + symbol("thread", 0, self.threads - 1)
        return s.index(flat) < s.index(self.total)

    def each(self, body: Sequence[Statement]) -> list[Statement]:
        """The body for every piece, its number being `number`."""
        there = self.there(self.number)
        block = tuple(body) if isinstance(there, s.Const) else (If(there, tuple(body)),)
        return unrolled("piece", self.count, block)


class Loader(ABC):
    """Where the elements of one operand come from; see the head of this file."""

    dtype: DType
    elements: int
    along_depth: bool
    asynchronous: ClassVar[bool] = True
    rounded = False
    held = 0

    @property
    def staged(self) -> DType:
        """The type in which registers hold elements, of as many bits."""
        return self.dtype

    def begin(self, pieces: Pieces) -> list[Statement]:
        return []

    def turn(self, pieces: Pieces, tile: Dim) -> list[Statement]:
        return []

    @abstractmethod
    def piece(self, pieces: Pieces, number: Dim, tile: Dim) -> Piece: ...

    def value(self, pieces: Pieces, number: Dim, tile: Dim) -> Scalar:
        raise NotImplementedError

    def fetch(self, pieces: Pieces, number: Dim, tile: Dim, valid: Scalar, staged: Buffer) -> list[Statement]:
        """The statements that bring a computed element to its register, zero where it is not `valid`."""
        value = s.select(valid, self.value(pieces, number, tile), s.const(0, self.dtype))
        return [Store(staged, number, value)]


class Multiplier(ABC):
    """Warps that multiply the stages in shared memory (`left`, `right`) and keep the sums in registers.

    A stage has `steps` steps for each warp. `ahead`: the operands of one step are read while another one is multiplied,
    from the registers of `buffer` 0 and 1 in turn. The sums leave by way of shared memory in `slabs` slabs of
    `slab_rows` rows of the warp's part of the tile.
    """

    dtype: DType
    steps: int
    ahead: bool
    slabs: int
    slab_rows: int = 16

    @abstractmethod
    def declare(self) -> list[Statement]: ...

    @abstractmethod
    def load(self, left: Buffer, right: Buffer, slot: Dim, step: Dim, buffer: Dim) -> list[Statement]: ...

    @abstractmethod
    def multiply(self, buffer: Dim) -> list[Statement]: ...

    @abstractmethod
    def store_slab(self, number: Dim, slab: Buffer, pitch: int) -> list[Statement]: ...


@dataclass(frozen=True)
class Operand:
    """A loader with how its stages lie in shared memory."""

    loader: Loader
    pieces: Pieces

    @property
    def staged(self) -> Buffer:
        """Registers that hold computed elements until their place in shared memory is free."""
        return Buffer(f"{self.pieces.side}_staged", self.loader.staged, self.pieces.count, "register")


@dataclass(frozen=True)
class Pipeline:
    """The loop over the depth of a block's product.

    `first` is the first stage of the depth that the block multiplies, `count` how many: with `partial`, not all.
    `depth` is the extent of the whole operands', which need not be a multiple of a stage.
    """

    tile: Tile
    multiplier: Multiplier
    left: Operand
    right: Operand
    depth: Dim
    first: Dim
    count: Dim
    partial: bool = False

    @property
    def operands(self) -> tuple[Operand, Operand]:
        return self.left, self.right

    @property
    def elements(self) -> int:
        """Elements in shared memory."""
        return self.tile.stages * sum(operand.pieces.shared.size for operand in self.operands)

    def statements(self, memory: Buffer) -> list[Statement]:
        """What a thread does until all sums are in registers and shared memory is free for other use."""
        stages = self.tile.stages
        start = stages * self.left.pieces.shared.size
        left, right = self._buffer(self.left), self._buffer(self.right)
        tile = k.index_symbol("tile", self.count)
        ahead = symbol("ahead", stages - 1, self.count + (stages - 2))
        body: list[Statement] = [
            Let("slot", tile % stages),
            Let("following", (tile + 1) % stages),
            Let("ahead", tile + (stages - 1)),
            Let("filled", ahead % stages),
            *self._copy(left, right, symbol("filled", 0, stages - 1), ahead),
            *self._multiply(left, right),
        ]
        opening = symbol("stage", 0, stages - 2) if stages > 2 else 0
        fill = (*self._copy(left, right, opening, opening), *self._deposit(left, right, opening))
        ready: list[Statement] = [Intrinsic("copy_async_wait", (), (s.const(stages - 2, I64),)), Barrier()]
        return [
            Alias(left, memory, 0),
            Alias(right, memory, start),
            *self.multiplier.declare(),
            *(Alloc(operand.staged) for operand in self.operands if not operand.loader.asynchronous),
            *(st for operand in self.operands for st in operand.loader.begin(operand.pieces)),
            *([For("stage", stages - 1, fill)] if stages > 2 else fill),
            *ready,
            *(self.multiplier.load(left, right, 0, 0, 0) if self.multiplier.ahead else ()),
            For("tile", self.count, tuple(body)),
            Intrinsic("copy_async_wait", (), (s.const(0, I64),)),
            Barrier(),
        ]

    def _buffer(self, operand: Operand) -> Buffer:
        size = self.tile.stages * operand.pieces.shared.size
        return Buffer(f"{operand.pieces.side}_tile", operand.loader.dtype, size, "shared")

    def _multiply(self, left: Buffer, right: Buffer) -> list[Statement]:
        """All steps of the stage in `slot`; those after the last barrier read the next one."""
        multiplier, steps = self.multiplier, self.multiplier.steps
        slot, following = (symbol(name, 0, self.tile.stages - 1) for name in ("slot", "following"))
        ready: list[Statement] = [
            *self._deposit(left, right, symbol("filled", 0, self.tile.stages - 1)),
            Intrinsic("copy_async_wait", (), (s.const(self.tile.stages - 2, I64),)),
            Barrier(),
        ]
        if not multiplier.ahead:
            step = counter("step", steps)
            here = (*multiplier.load(left, right, slot, step, 0), *multiplier.multiply(0))
            return [*unrolled("step", steps, here), *ready]
        assert steps % 2 == 0, "registers of two steps, in turn"
        step = counter("step", steps - 1)
        here = (*multiplier.load(left, right, slot, step + 1, (step + 1) % 2), *multiplier.multiply(step % 2))
        return [
            *unrolled("step", steps - 1, here),
            *ready,
            *multiplier.load(left, right, following, 0, 0),
            *multiplier.multiply(1),
        ]

    def _copy(self, left: Buffer, right: Buffer, slot: Dim, tile: Dim) -> list[Statement]:
        """Starts the copies of stage number `tile` of the block to `slot`, as one group; zeros beyond the last."""
        result: list[Statement] = []
        for operand, buffer in zip(self.operands, (left, right), strict=True):
            loader, pieces = operand.loader, operand.pieces
            number, whole = pieces.number, self.first + tile
            valid = self._valid(pieces, number, tile)
            result += loader.turn(pieces, whole)
            if loader.asynchronous:
                piece = loader.piece(pieces, number, whole)
                valid = valid if piece.valid is None else s.binary("and", valid, piece.valid)
                target = Address(buffer, slot * pieces.shared.size + pieces.shared.offset(*pieces.place(number)))
                name = f"copy_async_{loader.elements * loader.dtype.bytes}"
                result += pieces.each([Intrinsic(name, (target, Address(piece.buffer, piece.offset)), (valid,))])
            else:
                result += pieces.each(loader.fetch(pieces, number, whole, valid, operand.staged))
        return [*result, Intrinsic("copy_async_commit")]

    def _deposit(self, left: Buffer, right: Buffer, slot: Dim) -> list[Statement]:
        """Computed elements to their place in shared memory."""
        result: list[Statement] = []
        for operand, buffer in zip(self.operands, (left, right), strict=True):
            pieces = operand.pieces
            if not operand.loader.asynchronous:
                target = slot * pieces.shared.size + pieces.shared.offset(*pieces.place(pieces.number))
                value = s.bitcast(s.load(operand.staged, pieces.number), operand.loader.dtype)
                result += pieces.each([Store(buffer, target, value)])
        return result

    def _valid(self, pieces: Pieces, number: Dim, tile: Dim) -> Scalar:
        """Whether a piece is inside the operand and the block's part of the depth."""
        valid = s.index(pieces.position(number)) < s.index(pieces.extent)
        multiple = isinstance(self.depth, int) and self.depth % self.tile.depth == 0
        if multiple or self.partial:
            valid = s.binary("and", valid, s.index(tile) < s.index(self.count))
        if not multiple:
            valid = s.binary("and", valid, s.index(pieces.depth(number, self.first + tile)) < s.index(self.depth))
        return valid
