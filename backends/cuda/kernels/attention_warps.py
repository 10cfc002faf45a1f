"""How the lanes of a warp share a tile of queries by keys: three ways to form the two products of attention.

Each lane holds, for `rows` queries, `keys` scores and `channels` sums of the result in registers. All that stands
between the products (masks, maxima, exponentials) is written once, by the places that these classes tell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ....ir import scalars as s
from ....ir.dims import Dim, symbol
from ....ir.dtypes import BF16, F16, F32, U32, DType
from ....ir.intrinsics import MATRIX_OPERANDS
from ....ir.loops import Address, Alloc, For, Intrinsic, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....passes.threads import THREAD
from .tiles import counter, unrolled

CHUNK = 16
"""Bytes that copies and reads of shared memory move at most."""
QUERY_REGISTERS = 32
"""Registers in which queries are kept for all keys; more are read again for each tile of keys."""


@dataclass(frozen=True)
class Tile:
    """A block works on `rows` queries and `keys` keys at a time, which lie in `stages` stages of shared memory; `warps`
    along queries and along keys (those of one place in the queries combine what they have at the end)."""

    rows: int
    keys: int
    warps: tuple[int, int]
    stages: int = 2

    @property
    def threads(self) -> int:
        return 32 * self.warps[0] * self.warps[1]

    @property
    def warp_rows(self) -> int:
        return self.rows // self.warps[0]

    @property
    def warp_keys(self) -> int:
        return self.keys // self.warps[1]

    def __str__(self) -> str:
        return f"{self.rows}x{self.keys}_w{self.warps[0]}x{self.warps[1]}_s{self.stages}"


@dataclass(frozen=True)
class Shared:
    """Rows of channels in shared memory, padded so that neither copies nor reads of eight rows meet in a bank."""

    name: str
    dtype: DType
    rows: int
    channels: int
    slots: int = 1

    @property
    def pitch(self) -> int:
        return self.channels + CHUNK // self.dtype.bytes

    @property
    def size(self) -> int:
        """Elements of one stage."""
        return self.rows * self.pitch

    @property
    def buffer(self) -> Buffer:
        return Buffer(self.name, self.dtype, self.size * self.slots, "shared")

    def at(self, slot: Dim, row: Dim, channel: Dim) -> Dim:
        return slot * self.size + row * self.pitch + channel


class Warps(ABC):
    """The common part: `width` channels of queries and keys, `depth` of values, both rounded up to `granule`."""

    granule: ClassVar[int]
    lanes: ClassVar[tuple[int, ...]]
    """Distances between lanes that have other keys of the same queries."""
    run: ClassVar[int]
    """Neighbouring channels of the result in one lane."""
    places: ClassVar[Mapping[str, tuple[Dim, int]]]
    """Parts of the lane's number, with the greatest value of each."""
    rows: int
    keys: int
    channels: int

    def __init__(self, tile: Tile, dtype: DType, width: int, depth: int) -> None:
        self.tile, self.dtype = tile, dtype
        self.width, self.depth = (-(-extent // self.granule) * self.granule for extent in (width, depth))

    @property
    def queries_tile(self) -> Shared:
        return Shared("queries", self.dtype, self.tile.rows, self.width)

    @property
    def keys_tile(self) -> Shared:
        return Shared("keys", self.dtype, self.tile.keys, self.width, self.tile.stages)

    @property
    def values_tile(self) -> Shared:
        return Shared("values", self.dtype, self.tile.keys, self.depth, self.tile.stages)

    @property
    def scores(self) -> Buffer:
        return Buffer("scores", F32, self.rows * self.keys, "register")

    @property
    def sums(self) -> Buffer:
        return Buffer("sums", F32, self.rows * self.channels, "register")

    @property
    def shared(self) -> Sequence[Shared]:
        return self.queries_tile, self.keys_tile, self.values_tile

    @property
    def shared_bytes(self) -> int:
        return sum(part.size * part.slots * part.dtype.bytes for part in self.shared)

    def declare(self) -> list[Statement]:
        """Names of the warp's and the lane's places, and registers."""
        thread = symbol(THREAD, 0, self.tile.threads - 1)
        down, across = self.tile.warps
        warp = symbol("warp", 0, down * across - 1)
        return [
            Let("warp", thread // 32),
            Let("lane", thread % 32),
            *([Let("warp_row", warp % down)] if down > 1 else []),
            *([Let("warp_key", warp // down)] if across > 1 else []),
            *(Let(name, value) for name, (value, _) in self.places.items()),
            *map(Alloc, self.registers()),
        ]

    @abstractmethod
    def registers(self) -> list[Buffer]: ...

    @property
    def names(self) -> dict[str, Dim]:
        return {name: symbol(name, 0, upper) for name, (_, upper) in self.places.items()}

    @property
    def first_row(self) -> Dim:
        """The first query of the warp, counted in the block."""
        return counter("warp_row", self.tile.warps[0]) * self.tile.warp_rows

    @property
    def first_key(self) -> Dim:
        """The first key of the warp, counted in the tile."""
        return counter("warp_key", self.tile.warps[1]) * self.tile.warp_keys

    @abstractmethod
    def row(self, number: Dim) -> Dim:
        """The query, counted in the block, of the lane's row `number`."""

    @abstractmethod
    def key(self, number: Dim) -> Dim:
        """The key, counted in the tile, of the lane's score `number` of a row."""

    @abstractmethod
    def channel(self, number: Dim) -> Dim:
        """The channel of the lane's sum `number` of a row."""

    @abstractmethod
    def score(self, row: Dim, number: Dim) -> Dim:
        """Where a score is in its registers."""

    @abstractmethod
    def sum(self, row: Dim, number: Dim) -> Dim:
        """Where a sum is in its registers."""

    def keep_queries(self) -> list[Statement]:
        """What is read of the queries once for all keys."""
        return []

    @abstractmethod
    def multiply_keys(self, slot: Dim) -> list[Statement]:
        """Adds the products of the queries with the keys of a stage to the scores."""

    @abstractmethod
    def multiply_values(self, slot: Dim) -> list[Statement]:
        """Adds the products of the weights, in place of the scores, with the values of a stage to the sums."""


_LANE = symbol("lane", 0, 31)


class TensorCores(Warps):
    """Products by `mma` of 16 x 8 fragments (PTX ISA). A lane's weights are, as they are, its part of the left operand
    of the second product (Dao 2023)."""

    lanes = (1, 2)
    run = 2
    granule = 16
    places: ClassVar[Mapping[str, tuple[Dim, int]]] = {
        "matrix_row": (_LANE % 8, 7),
        "second": (_LANE // 8 % 2, 1),
        "third": (_LANE // 16, 1),
        "group": (_LANE // 4, 7),
        "quad": (_LANE % 4, 3),
    }

    def __init__(self, tile: Tile, dtype: DType, width: int, depth: int) -> None:
        super().__init__(tile, dtype, width, depth)
        self.multiply, self.step = MATRIX_OPERANDS[dtype, dtype]
        self.chunk = CHUNK // dtype.bytes
        self.down, self.across, self.out = tile.warp_rows // 16, tile.warp_keys // 8, self.depth // 8
        self.rows, self.keys, self.channels = self.down * 2, self.across * 2, self.out * 2
        self.steps = self.width // self.step
        assert self.down * 16 == tile.warp_rows and self.across % 2 == 0
        self.keeps = self.down * self.steps * 4 <= QUERY_REGISTERS
        self.left = Buffer("left", U32, self.down * 4 * (self.steps if self.keeps else 1), "register")
        self.weights = Buffer("weights", U32, self.down * 4, "register")
        self.right = Buffer("right", U32, 4, "register")

    def registers(self) -> list[Buffer]:
        return [self.scores, self.sums, self.left, self.weights, self.right]

    def row(self, number: Dim) -> Dim:
        return self.first_row + number // 2 * 16 + number % 2 * 8 + self.names["group"]

    def key(self, number: Dim) -> Dim:
        return self.first_key + number // 2 * 8 + self.names["quad"] * 2 + number % 2

    def channel(self, number: Dim) -> Dim:
        return number // 2 * 8 + self.names["quad"] * 2 + number % 2

    def score(self, row: Dim, number: Dim) -> Dim:
        return (row // 2 * self.across + number // 2) * 4 + row % 2 * 2 + number % 2

    def sum(self, row: Dim, number: Dim) -> Dim:
        return (row // 2 * self.out + number // 2) * 4 + row % 2 * 2 + number % 2

    def _bits(self, value: Scalar) -> Scalar:
        """A register of an operand of f32."""
        return s.Call(U32, 1, "f32_to_tf32", (value,))

    def _rounded(self, target: Buffer, offset: Dim) -> list[Statement]:
        """Four registers just read, in the form that products take."""
        if self.dtype != F32:
            return []
        at = offset + symbol("register", 0, 3)
        return unrolled("register", 4, [Store(target, at, self._bits(s.bitcast(s.load(target, at), F32)))])

    def _left(self, down: Dim, step: Dim) -> list[Statement]:
        """16 queries by one step of channels."""
        place, tile = self.names, self.queries_tile
        row = self.first_row + down * 16 + place["second"] * 8 + place["matrix_row"]
        where = tile.at(0, row, step * self.step + place["third"] * self.chunk)
        to = self._left_at(down, step)
        return [
            Intrinsic("load_matrix_x4", (Address(self.left, to), Address(tile.buffer, where))),
            *self._rounded(self.left, to),
        ]

    def _left_at(self, down: Dim, step: Dim) -> Dim:
        return (down * self.steps + step if self.keeps else down) * 4

    def keep_queries(self) -> list[Statement]:
        if not self.keeps:
            return []
        body = self._left(counter("down", self.down), counter("step", self.steps))
        return unrolled("down", self.down, unrolled("step", self.steps, body))

    def multiply_keys(self, slot: Dim) -> list[Statement]:
        step, pair, down = counter("step", self.steps), counter("pair", self.across // 2), counter("down", self.down)
        place, tile = self.names, self.keys_tile
        key = self.first_key + pair * 16 + place["third"] * 8 + place["matrix_row"]
        where = tile.at(slot, key, step * self.step + place["second"] * self.chunk)
        half = symbol("half", 0, 1)
        to = (down * self.across + pair * 2 + half) * 4
        places = Address(self.scores, to), Address(self.left, self._left_at(down, step)), Address(self.right, half * 2)
        products = unrolled("down", self.down, unrolled("half", 2, [Intrinsic(self.multiply, places)]))
        read: list[Statement] = [
            Intrinsic("load_matrix_x4", (Address(self.right, 0), Address(tile.buffer, where))),
            *self._rounded(self.right, 0),
        ]
        pairs = unrolled("pair", self.across // 2, [*read, *products])
        queries = [] if self.keeps else unrolled("down", self.down, self._left(down, step))
        return unrolled("step", self.steps, [*queries, *pairs])

    def _add_sums(self, columns: int, first: Dim) -> list[Statement]:
        """The weights times what `right` holds of so many fragments, the first of them being `first`."""
        down, half = counter("down", self.down), counter("half", columns)
        to = Address(self.sums, (down * self.out + first + half) * 4)
        places = to, Address(self.weights, down * 4), Address(self.right, half * 2)
        return unrolled("down", self.down, unrolled("half", columns, [Intrinsic(self.multiply, places)]))


class Halves(TensorCores):
    """Operands of 16 bits."""

    def _weights(self, down: Dim, part: Dim, register: Dim) -> Scalar:
        """Two weights in a register: of rows 8 apart for odd registers, of keys 8 apart for the later two."""
        first = (down * self.across + part * 2 + register // 2) * 4 + register % 2 * 2
        pair = s.load(self.scores, first), s.load(self.scores, first + 1)
        return s.Call(U32, 1, {F16: "pack_f16", BF16: "pack_bf16"}[self.dtype], pair)

    def multiply_values(self, slot: Dim) -> list[Statement]:
        parts = self.across // 2
        part, pair, down = counter("part", parts), counter("pair", self.out // 2), counter("down", self.down)
        register = symbol("register", 0, 3)
        store = Store(self.weights, down * 4 + register, self._weights(down, part, register))
        weights = unrolled("down", self.down, unrolled("register", 4, [store]))
        place, tile = self.names, self.values_tile
        key = self.first_key + part * 16 + place["second"] * 8 + place["matrix_row"]
        where = Address(tile.buffer, tile.at(slot, key, pair * 16 + place["third"] * 8))
        read = Intrinsic("load_matrix_x4_transposed", (Address(self.right, 0), where))
        return unrolled(
            "part", parts, [*weights, *unrolled("pair", self.out // 2, [read, *self._add_sums(2, pair * 2)])]
        )


class Words(TensorCores):
    """Operands of f32, multiplied as tf32. Keys 2t and 2t + 1 of eight, which a lane has weights of, stand for elements
    t and t + 4 of the operand's depth: sums do not mind the order."""

    def multiply_values(self, slot: Dim) -> list[Statement]:
        part, column, down = counter("part", self.across), counter("column", self.out), counter("down", self.down)
        register = symbol("register", 0, 3)
        # Registers 0 to 3 of the operand are scores 0, 2, 1, 3 of the fragment.
        score = (down * self.across + part) * 4 + register % 2 * 2 + register // 2
        store = Store(self.weights, down * 4 + register, self._bits(s.load(self.scores, score)))
        weights = unrolled("down", self.down, unrolled("register", 4, [store]))
        place, tile, second = self.names, self.values_tile, symbol("second_key", 0, 1)
        key = self.first_key + part * 8 + place["quad"] * 2 + second
        value = s.load(tile.buffer, tile.at(slot, key, column * 8 + place["group"]))
        read = unrolled("second_key", 2, [Store(self.right, second, self._bits(value))])
        return unrolled(
            "part", self.across, [*weights, *unrolled("column", self.out, [*read, *self._add_sums(1, column)])]
        )


class Lanes(Warps):
    """True f32: each lane multiplies for itself, 4 queries by every eighth key, then by 4 of 32 channels. Weights reach
    the lanes that need them by way of shared memory."""

    lanes = (1, 2, 4)
    run = 4
    granule = 32
    places: ClassVar[Mapping[str, tuple[Dim, int]]] = {"lane_row": (_LANE // 8, 3), "lane_column": (_LANE % 8, 7)}

    def __init__(self, tile: Tile, dtype: DType, width: int, depth: int) -> None:
        super().__init__(tile, dtype, width, depth)
        self.width = -(-width // 4) * 4
        self.rows, self.keys, self.channels = tile.warp_rows // 4, tile.warp_keys // 8, self.depth // 8
        self.left = Buffer("left", F32, self.rows * 4, "register")
        self.right = Buffer("right", F32, max(self.keys, self.channels // 4) * 4, "register")

    def registers(self) -> list[Buffer]:
        return [self.scores, self.sums, self.left, self.right]

    @property
    def weights_tile(self) -> Shared:
        """Each warp's own weights, one part after the other."""
        return Shared("weights", F32, self.tile.warp_rows, self.tile.warp_keys, self.tile.threads // 32)

    @property
    def shared(self) -> Sequence[Shared]:
        return *super().shared, self.weights_tile

    def row(self, number: Dim) -> Dim:
        return self.first_row + number * 4 + self.names["lane_row"]

    def key(self, number: Dim) -> Dim:
        return self.first_key + number * 8 + self.names["lane_column"]

    def channel(self, number: Dim) -> Dim:
        return number // 4 * 32 + self.names["lane_column"] * 4 + number % 4

    def score(self, row: Dim, number: Dim) -> Dim:
        return row * self.keys + number

    def sum(self, row: Dim, number: Dim) -> Dim:
        return row * self.channels + number

    def _read(self, target: Buffer, count: int, source: Buffer, place: Dim) -> list[Statement]:
        """Four neighbours for each of so many places, which are over the index "number"."""
        number = counter("number", count)
        return unrolled("number", count, [Store(target, number * 4, s.load(source, place, 4, aligned=True))])

    def _add(self, target: Buffer, where: Dim, left: Dim, right: Dim) -> Statement:
        total = s.fma(s.load(self.left, left), s.load(self.right, right), s.load(target, where))
        return Store(target, where, total)

    def multiply_keys(self, slot: Dim) -> list[Statement]:
        steps = self.width // 4
        step, down, across = symbol("step", 0, steps - 1), counter("down", self.rows), counter("across", self.keys)
        part = symbol("part", 0, 3)
        queries, keys = self.queries_tile, self.keys_tile
        row, key = self.row(counter("number", self.rows)), self.key(counter("number", self.keys))
        add = self._add(self.scores, self.score(down, across), down * 4 + part, across * 4 + part)
        inner = unrolled("part", 4, unrolled("down", self.rows, unrolled("across", self.keys, [add])))
        body = [
            *self._read(self.left, self.rows, queries.buffer, queries.at(0, row, step * 4)),
            *self._read(self.right, self.keys, keys.buffer, keys.at(slot, key, step * 4)),
            *inner,
        ]
        return [For("step", steps, tuple(body))]

    def multiply_values(self, slot: Dim) -> list[Statement]:
        weights, values = self.weights_tile, self.values_tile
        warp = counter("warp", self.tile.threads // 32)
        down, across = counter("down", self.rows), counter("across", self.keys)
        own = weights.at(warp, self.row(down) - self.first_row, self.key(across) - self.first_key)
        store = Store(weights.buffer, own, s.load(self.scores, self.score(down, across)))
        steps = self.tile.warp_keys // 4
        step, part, channel = symbol("step", 0, steps - 1), symbol("part", 0, 3), counter("across", self.channels)
        row = self.row(counter("number", self.rows)) - self.first_row
        first = self.channel(counter("number", self.channels // 4) * 4)
        key = self.first_key + step * 4 + part
        add = self._add(self.sums, self.sum(down, channel), down * 4 + part, channel)
        inner = unrolled("down", self.rows, unrolled("across", self.channels, [add]))
        reads = self._read(self.left, self.rows, weights.buffer, weights.at(warp, row, step * 4))
        read = self._read(self.right, self.channels // 4, values.buffer, values.at(slot, key, first))
        return [
            *unrolled("down", self.rows, unrolled("across", self.keys, [store])),
            Intrinsic("warp_barrier"),
            For("step", steps, (*reads, *unrolled("part", 4, [*read, *inner]))),
            Intrinsic("warp_barrier"),
        ]


def warps_of(tile: Tile, dtype: DType, products: str, width: int, depth: int) -> Warps:
    """How warps share the tile for operands of a type; f32 is multiplied as it is, or as tf32 where `products` says."""
    if dtype in (F16, BF16):
        return Halves(tile, dtype, width, depth)
    return (Words if products == "tf32" else Lanes)(tile, dtype, width, depth)
