"""Warps that multiply stages in shared memory: by tensor cores, or lane by lane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ....ir import scalars as s
from ....ir.dims import Dim, symbol
from ....ir.dtypes import F32, I32, U32, DType
from ....ir.intrinsics import MATRIX_OPERANDS
from ....ir.loops import Address, Alloc, Intrinsic, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from .tiles import CHUNK, Multiplier, SharedTile, Tile, counter, unrolled

_FRAGMENT_ROWS, _FRAGMENT_COLUMNS = 16, 8
_LANE_ROWS, _LANE_COLUMNS = 4, 8
"""How the lanes of a warp share a tile without tensor cores."""


_LANE = symbol("lane", 0, 31)


class _Warps(Multiplier):
    """What both kinds share: the place of a warp in the tile, its sums. `places` names parts of the lane's number, with
    the greatest value of each."""

    places: ClassVar[Mapping[str, tuple[Dim, int]]]

    def __init__(self, tile: Tile, left: SharedTile, right: SharedTile, along_depth: tuple[bool, bool]) -> None:
        self.tile, self.left, self.right = tile, left, right
        self.left_deep, self.right_deep = along_depth

    @property
    def sums(self) -> Buffer:
        return Buffer("sums", self.dtype, self.tile.warp_rows * self.tile.warp_columns // 32, "register")

    def place(self) -> list[Statement]:
        """The warp's and the lane's places, and the sums, zero."""
        rows, columns, depths = self.tile.warps
        thread = symbol("thread", 0, self.tile.threads - 1)
        warp = symbol("warp", 0, rows * columns * depths - 1)
        places = {
            "warp_row": warp % rows,
            "warp_column": warp // rows % columns,
            "warp_depth": warp // (rows * columns),
        }
        shape = dict(zip(places, (rows, columns, depths), strict=True))
        count = self.sums.size
        assert isinstance(count, int)
        number = counter("sum", count)
        return [
            Let("warp", thread // 32),
            Let("lane", thread % 32),
            *(Let(name, value) for name, value in places.items() if shape[name] > 1),
            *(Let(name, value) for name, (value, _) in self.places.items()),
            Alloc(self.sums),
            *unrolled("sum", count, [Store(self.sums, number, s.const(0, self.dtype))]),
        ]

    @property
    def names(self) -> dict[str, Dim]:
        return {name: symbol(name, 0, upper) for name, (_, upper) in self.places.items()}

    def warp(self, axis: int) -> Dim:
        """The warp's place along rows (0), columns (1) or depth (2)."""
        return counter(("warp_row", "warp_column", "warp_depth")[axis], self.tile.warps[axis])


class TensorCores(_Warps):
    """Multiplication by `mma` of 16 x 8 fragments; the layouts are those of the PTX ISA.

    Operands of 16 bits may lie along depth or along positions, those of 8 bits along depth. f32 is multiplied as tf32,
    rounded when it is read unless it is `rounded` (left, right) already.
    """

    places: ClassVar[Mapping[str, tuple[Dim, int]]] = {
        "matrix_row": (_LANE % 8, 7),
        "second": (_LANE // 8 % 2, 1),
        "third": (_LANE // 16, 1),
        "group": (_LANE // 4, 7),
        "quad": (_LANE % 4, 3),
    }

    def __init__(
        self,
        tile: Tile,
        left: SharedTile,
        right: SharedTile,
        along_depth: tuple[bool, bool],
        rounded: tuple[bool, bool] = (False, False),
    ) -> None:
        super().__init__(tile, left, right, along_depth)
        self.operand = left.dtype
        self.dtype = F32 if self.operand.is_float else I32
        self.name, self.step = MATRIX_OPERANDS[left.dtype, right.dtype]
        self.chunk = CHUNK // self.operand.bytes
        self.rounded = rounded
        self.steps = tile.depth // self.step // tile.warps[2]
        self.ahead = self.steps > 1
        self.down = tile.warp_rows // _FRAGMENT_ROWS
        self.across = tile.warp_columns // _FRAGMENT_COLUMNS
        self.slabs = self.down
        assert self.steps * self.step * tile.warps[2] == tile.depth and self.across % 2 == 0 and self.down
        buffers = 2 if self.ahead else 1
        self.left_part = Buffer("left_part", U32, buffers * self.down * 4, "register")
        self.right_part = Buffer("right_part", U32, buffers * self.across * 2, "register")

    def declare(self) -> list[Statement]:
        return [*self.place(), Alloc(self.left_part), Alloc(self.right_part)]

    def load(self, left: Buffer, right: Buffer, slot: Dim, step: Dim, buffer: Dim) -> list[Statement]:
        step = self.warp(2) * self.steps + step
        down, pairs = counter("down", self.down), counter("pair", self.across // 2)
        row = self.warp(0) * self.tile.warp_rows + down * _FRAGMENT_ROWS
        column = self.warp(1) * self.tile.warp_columns + pairs * (2 * _FRAGMENT_COLUMNS)
        to_left, to_right = (buffer * self.down + down) * 4, (buffer * self.across + pairs * 2) * 2
        # The four matrices of 8 x 8 in the order of the registers: for a fragment of the left operand the second one is
        # 8 rows further and the third in the second half of the depth, for two of the right one it is the other way.
        here = self._read(
            self.left, left, slot, self.left_deep, row, step, ("second", "third"), self.left_part, to_left, 0
        )
        there = self._read(
            self.right, right, slot, self.right_deep, column, step, ("third", "second"), self.right_part, to_right, 1
        )
        return [*unrolled("down", self.down, here), *unrolled("pair", self.across // 2, there)]

    def _read(
        self,
        shared: SharedTile,
        source: Buffer,
        slot: Dim,
        along_depth: bool,
        position: Dim,
        step: Dim,
        order: tuple[str, str],
        target: Buffer,
        offset: Dim,
        side: int,
    ) -> list[Statement]:
        """Four registers: 16 positions by one step of depth."""
        names = self.names
        further, deeper, row = names[order[0]] * 8, names[order[1]], names["matrix_row"]
        base = slot * shared.size
        if along_depth:
            where = shared.offset(position + further + row, (step * 2 + deeper) * self.chunk)
            address = Address(target, offset), Address(source, base + where)
            return [Intrinsic("load_matrix_x4", address), *self._rounding(target, offset, side)]
        if self.operand.bytes == 2:
            where = shared.offset(step * self.step + deeper * 8 + row, position + further)
            return [Intrinsic("load_matrix_x4_transposed", (Address(target, offset), Address(source, base + where)))]
        assert self.operand == F32, f"{self.operand} along positions"
        result: list[Statement] = []
        for number in range(4):
            eight, half = (number % 2, number // 2) if side == 0 else (number // 2, number % 2)
            at = shared.offset(step * self.step + half * 4 + names["quad"], position + eight * 8 + names["group"])
            result.append(Store(target, offset + number, self._bits(s.load(source, base + at), side)))
        return result

    def _bits(self, value: Scalar, side: int) -> Scalar:
        """A register of tf32."""
        return s.bitcast(value, U32) if self.rounded[side] else s.Call(U32, 1, "f32_to_tf32", (value,))

    def _rounding(self, target: Buffer, offset: Dim, side: int) -> list[Statement]:
        if self.operand != F32 or self.rounded[side]:
            return []
        number = symbol("register", 0, 3)
        value = self._bits(s.bitcast(s.load(target, offset + number), F32), side)
        return unrolled("register", 4, [Store(target, offset + number, value)])

    def multiply(self, buffer: Dim) -> list[Statement]:
        down, across = counter("down", self.down), counter("across", self.across)
        sums = Address(self.sums, (down * self.across + across) * 4)
        left = Address(self.left_part, (buffer * self.down + down) * 4)
        right = Address(self.right_part, (buffer * self.across + across) * 2)
        inner = unrolled("across", self.across, [Intrinsic(self.name, (sums, left, right))])
        return unrolled("down", self.down, inner)

    def store_slab(self, number: Dim, slab: Buffer, pitch: int) -> list[Statement]:
        across = counter("across", self.across)
        first = (number * self.across + across) * 4
        at = self.names["group"] * pitch + across * _FRAGMENT_COLUMNS + self.names["quad"] * 2
        pairs: list[Statement] = [
            Store(slab, at + half * 8 * pitch, s.load(self.sums, first + half * 2, 2), aligned=True) for half in (0, 1)
        ]
        return unrolled("across", self.across, pairs)


class Lanes(_Warps):
    """Multiplication by each lane of its own rows and columns: true f32, f64, integers.

    The lanes of a warp are 4 x 8; each has `down` x `across` sums. Chunks of 16 bytes are read along the axis on which
    the operand lies in shared memory.
    """

    ahead = False
    places: ClassVar[Mapping[str, tuple[Dim, int]]] = {
        "lane_row": (_LANE // _LANE_COLUMNS, _LANE_ROWS - 1),
        "lane_column": (_LANE % _LANE_COLUMNS, _LANE_COLUMNS - 1),
    }

    def __init__(
        self, tile: Tile, left: SharedTile, right: SharedTile, along_depth: tuple[bool, bool], dtype: DType
    ) -> None:
        super().__init__(tile, left, right, along_depth)
        self.dtype = dtype
        self.chunk = left.chunk
        self.steps = tile.depth // self.chunk // tile.warps[2]
        self.down = tile.warp_rows // _LANE_ROWS
        self.across = tile.warp_columns // _LANE_COLUMNS
        self.slabs = self.down // 4
        assert self.steps * self.chunk * tile.warps[2] == tile.depth and self.slabs * 4 == self.down
        assert all(along_depth) or self.chunk <= 4, "slabs of 16 rows"
        self.left_part = Buffer("left_part", dtype, self.down * self.chunk, "register")
        self.right_part = Buffer("right_part", dtype, self.across * self.chunk, "register")

    def declare(self) -> list[Statement]:
        return [*self.place(), Alloc(self.left_part), Alloc(self.right_part)]

    def _position(self, along_depth: bool, number: Dim, lane: Dim, lanes: int) -> Dim:
        """Which row or column of the warp's part a lane's row or column `number` is."""
        if along_depth:
            return number * lanes + lane
        return number // self.chunk * (lanes * self.chunk) + lane * self.chunk + number % self.chunk

    def load(self, left: Buffer, right: Buffer, slot: Dim, step: Dim, buffer: Dim) -> list[Statement]:
        step = self.warp(2) * self.steps + step
        row, column = self.warp(0) * self.tile.warp_rows, self.warp(1) * self.tile.warp_columns
        lane_row, lane_column = self.names["lane_row"], self.names["lane_column"]
        return [
            *self._read(
                self.left, left, slot, self.left_deep, row, lane_row, _LANE_ROWS, step, self.left_part, self.down
            ),
            *self._read(
                self.right,
                right,
                slot,
                self.right_deep,
                column,
                lane_column,
                _LANE_COLUMNS,
                step,
                self.right_part,
                self.across,
            ),
        ]

    def _read(
        self,
        shared: SharedTile,
        source: Buffer,
        slot: Dim,
        along_depth: bool,
        start: Dim,
        lane: Dim,
        lanes: int,
        step: Dim,
        target: Buffer,
        count: int,
    ) -> list[Statement]:
        """A step of depth at the lane's positions, to target[position][depth]."""
        base, chunk = slot * shared.size, self.chunk
        if along_depth:
            number = counter("number", count)
            at = shared.offset(start + number * lanes + lane, step * chunk)
            value = s.cast(s.load(source, base + at, chunk, aligned=True), self.dtype)
            return unrolled("number", count, [Store(target, number * chunk, value)])
        number, depth = counter("number", count // chunk), counter("depth", chunk)
        at = shared.offset(step * chunk + depth, start + number * (lanes * chunk) + lane * chunk)
        value = s.cast(s.load(source, base + at, chunk, aligned=True), self.dtype)
        inner = [Store(target, number * (chunk * chunk) + depth, value, stride=chunk)]
        return unrolled("number", count // chunk, unrolled("depth", chunk, inner))

    def multiply(self, buffer: Dim) -> list[Statement]:
        depth = counter("depth", self.chunk)
        down, across = counter("down", self.down), counter("across", self.across)
        at = down * self.across + across
        product = s.fma(
            s.load(self.left_part, down * self.chunk + depth),
            s.load(self.right_part, across * self.chunk + depth),
            s.load(self.sums, at),
        )
        rows = unrolled("down", self.down, unrolled("across", self.across, [Store(self.sums, at, product)]))
        return unrolled("depth", self.chunk, rows)

    def store_slab(self, number: Dim, slab: Buffer, pitch: int) -> list[Statement]:
        down, across = counter("down", 4), counter("across", self.across)
        row = self._position(self.left_deep, down, self.names["lane_row"], _LANE_ROWS)
        first = (number * 4 + down) * self.across
        lane = self.names["lane_column"]
        if self.right_deep:
            at = row * pitch + across * _LANE_COLUMNS + lane
            return unrolled(
                "down", 4, unrolled("across", self.across, [Store(slab, at, s.load(self.sums, first + across))])
            )
        chunk = self.chunk
        across = counter("across", self.across // chunk)
        at = row * pitch + (across * _LANE_COLUMNS + lane) * chunk
        store = Store(slab, at, s.load(self.sums, first + across * chunk, chunk), aligned=True)
        return unrolled("down", 4, unrolled("across", self.across // chunk, [store]))
