"""Products by packed weights as they are defined: for rows with an infinity or a NaN, which the kernels cannot take.

Those subtract zero points by sums of the left operand, or round it by its greatest magnitude, and either makes a NaN of
what is an infinity. Such rows come through here, slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim
from ....ir.dtypes import F32, I32, U32
from ....ir.loops import Alloc, Define, For, If, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ...kernels.epilogue import Epilogue
from .epilogue import finish_tile
from .packing import Columns
from .product import flattened
from .register_tile import Tile, accumulators
from .weight_only_panels import PackedProduct, WeightPanels

INFINITE = 0x7F800000
"""The bits of an infinity; those of a NaN without its sign are more."""


def magnitude_bits(value: Scalar) -> Scalar:
    """The bits of an f32's magnitude, which are in the order of magnitudes."""
    return s.bitcast(value, I32) & s.const(INFINITE | 0x7FFFFF, I32, value.lanes)


def finite(bits: Scalar) -> Scalar:
    """Whether a magnitude is that of a number."""
    return bits < s.const(INFINITE, I32)


class Definition:
    """Makes the statements for rows of a panel, one after the other, by the definition."""

    def __init__(self, found: PackedProduct, panels: WeightPanels, outputs: Epilogue, masked: bool) -> None:
        self.found, self.panels, self.outputs, self.masked = found, panels, outputs, masked

    def unless_finite(
        self, tops: Buffer, first: Dim, rows: Dim, columns: Columns, column: Dim, usual: Sequence[Statement]
    ) -> Iterator[Statement]:
        """`usual` where the greatest magnitudes `tops` of all rows from the first on are finite, else the definition
        for all of them; the panel that begins at the column is named before."""
        highest, line = Buffer("highest", I32, 1, "register"), k.index_symbol("line", rows)
        yield Define(highest, s.const(0, I32))
        higher = s.binary("max", s.load(highest, 0), s.load(tops, first + line))
        yield For("line", rows, (Store(highest, 0, higher),))
        row = first + k.index_symbol("odd_row", rows)
        odd = For("odd_row", rows, tuple(self._row(columns, column, row)))
        yield If(finite(s.load(highest, 0)), tuple(usual), (odd,))

    def _row(self, columns: Columns, column: Dim, row: Dim) -> Iterator[Statement]:
        found, lanes = self.found, self.panels.lanes
        tile, place = Tile(1, columns.vectors, lanes), k.index_symbol("place", found.depth)
        sums, value = accumulators(tile, F32), Buffer("value", F32, 1, "register")
        yield Alloc(sums)
        yield from (Store(sums, v, s.const(0, F32, lanes)) for v in range(tile.vectors))
        where = flattened(found.rows, row)
        start = found.left.start + sum((where[axis.name] * axis.left for axis in found.rows), 0)
        step: list[Statement] = [
            Define(value, s.cast(s.load(found.left.buffer, start + place * found.left.strides[-1]), F32))
        ]
        for v in range(tile.vectors):
            product = s.widen(s.load(value, 0), lanes) * self._weight(columns, place, v)
            step.append(Store(sums, v, s.load(sums, v, lanes) + product))
        yield For("place", found.depth, tuple(step))
        yield from finish_tile(
            self.outputs, tile, F32, lambda i: where, column, last_lanes(columns, lanes), self.masked
        )  # fmt: skip

    def _weight(self, columns: Columns, place: Dim, v: int) -> Scalar:
        """A vector of weights, in one place along the depth."""
        found, lanes, bits = self.found, self.panels.lanes, self.found.bits
        shift = s.widen(s.cast(s.index(place % found.group * bits), U32), lanes)
        word = s.binary("shr", self.panels.word(columns, place // found.group, v), shift)
        code = s.cast(s.cast(word & s.const((1 << bits) - 1, U32, lanes), I32), F32)
        block = place // found.block
        return (code - self.panels.full_zero(columns, block, v)) * self.panels.scale(columns, block, v)


def last_lanes(columns: Columns, lanes: int) -> Callable[[int], int | None]:
    """How many lanes of a panel's vector are columns; None where all are."""
    return lambda v: columns.valid if v == columns.vectors - 1 and columns.valid != lanes else None
