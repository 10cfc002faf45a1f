"""Matrix products of bf16 operands, summed in f32: two neighbours along the depth are one element of 32 bits.

With pairs for elements the register tiles are those of f32, at half the depth, and multiply by an instruction that adds
the products of both (VDPBF16PS), or by two multiply-adds in the same order. Constant operands are packed as
[depth / 2][columns][2] when the model is compiled, the left operand is read where it lies: its pairs are neighbours in
memory, or else it is copied first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, floordiv, product, symbol
from ....ir.dtypes import BF16, F32, U16, U32
from ....ir.loops import Alias, For, Let, Statement, Store
from ....ir.scalars import Buffer, Load, Scalar
from ....ir.target import Target
from ....passes.regions import Call, Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, epilogue, through_memory
from ..dot_products import PAIRS
from .gemm import _Gemm
from .packing import matrices, packed, pairs_of, transposed
from .product import Axis, Product, find_product, flattened
from .register_tile import Tile
from .strassen import Strassen, choose_plan


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a region whose anchor sums products of bf16 in f32; None for any other."""
    found = find_product(region)
    if found is None or found.left.dtype != BF16 or found.dtype != F32 or not found.depth:
        return None
    outputs = epilogue(region, found.indices, found.shape, found.element, found.column.name, found.dtype)
    if outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    array = region.constants.get(found.right.buffer.name)
    if not all(isinstance(axis.extent, int) for axis in (*found.batch, *found.depth, found.column)):
        array = None
    if array is None and product(axis.extent for axis in found.rows) == 1:
        return None
    plan = choose_plan(found, target, target.strassen) if array is not None and target.strassen else None
    if array is not None and plan is not None:
        return Strassen(region, found, outputs, array, plan).lowered()
    return _PairGemm(region, target, found, outputs, array).lowered()


def is_even(dim: Dim) -> bool:
    """Whether a size or offset is surely even."""
    return dim % 2 == 0


class _PairGemm(_Gemm):
    """The product over pairs; `whole` is the one over elements."""

    def __init__(
        self, region: Region, target: Target, whole: Product, outputs: Epilogue, array: np.ndarray | None
    ) -> None:
        self.whole = whole
        self.view = Buffer("pairs", U32)
        self.reads_pairs = _lies_in_pairs(whole)
        found = _in_place(whole, self.view) if self.reads_pairs else _copied(whole)
        super().__init__(region, target, found, outputs, array)

    def lowered(self) -> Lowered:
        scratch = [self.packed] if self.reads_pairs else [self.packed, self.found.left.buffer]
        calls = [call(self.region, f"bf16_gemm_{self.tile}", self._body(), scratch, shared=True)]
        workspaces = scratch[1:]
        if not self.reads_pairs:
            calls.insert(0, self._pack_left())
        if self.array is not None:
            return Lowered(tuple(calls), tuple(workspaces), {self.packed.name: self._packer(self.array)})
        return Lowered((self._pack_right(), *calls), (self.packed, *workspaces))

    def _left(self, tile: Tile, row: Dim) -> tuple[list[Statement], Callable[[int], Scalar]]:
        aliases, left = super()._left(tile, row)
        if self.reads_pairs:
            aliases = [Alias(self.view, self.whole.left.buffer, 0), *aliases]
        return aliases, left

    def _packer(self, array: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: packed(pairs_of(matrices(self.whole, array)), self.panels, U32)

    # What is only known at run time

    def _pack_left(self) -> Call:
        """Copies the left operand to [batch][row][pair]."""
        whole, pairs = self.whole, self.depth
        tasks = self.batches * self.rows
        bits = Buffer("left_bits", U16)
        start = whole.left_start
        for axes, position in (
            (whole.batch, symbol("batch", 0, self.batches - 1)),
            (whole.rows, symbol("row", 0, self.rows - 1)),
        ):
            where = flattened(axes, position)
            start = start + sum((where[axis.name] * axis.left for axis in axes), 0)

        def at(position: Dim) -> Dim:
            where = flattened(whole.depth, position)
            return sum((where[axis.name] * axis.left for axis in whole.depth), 0)

        pair = k.index_symbol("pair", pairs)
        into = k.index_symbol("task", tasks) * pairs + pair
        copy = For("pair", pairs, (Store(self.found.left.buffer, into, self._pair(bits, at, pair)),), "vector")
        task = k.index_symbol("task", tasks)
        body: tuple[Statement, ...] = (
            Let("batch", task // self.rows),
            Let("row", task % self.rows),
            Alias(bits, whole.left.buffer, start),
            copy,
        )
        return call(self.region, "bf16_pack_rows", (For("task", tasks, body, "parallel"),), (self.found.left.buffer,))

    def _pair(self, bits: Buffer, at: Callable[[Dim], Dim], pair: Dim) -> Scalar:
        """Elements 2 * pair and the next one, which there may not be."""
        depth = product(axis.extent for axis in self.whole.depth)
        low = s.cast(s.load(bits, at(2 * pair)), U32)
        high = s.binary("shl", s.cast(s.load(bits, at(2 * pair + 1)), U32), s.const(16, U32))
        if not is_even(depth):
            high = s.select(s.index(2 * pair + 1) < s.index(depth), high, s.const(0, U32))
        return low | high

    def _pack_right(self) -> Call:
        """Packs the right operand into panels: one task for each."""
        whole, panels, pairs, width = self.whole, self.panels, self.depth, self.tile.width
        tasks = self.batches * panels.count
        task, panel = k.index_symbol("task", tasks), symbol("panel", 0, panels.count - 1)
        batch = flattened(whole.batch, symbol("batch", 0, self.batches - 1))
        start = whole.right_start + panel * width * whole.column.right
        start = start + sum((batch[axis.name] * axis.right for axis in whole.batch), 0)
        into, left = Buffer("panel_out", U32), symbol("left", 0, width)
        body: list[Statement] = [
            Let("panel", task % panels.count),
            Let("batch", task // panels.count),
            Let("left", dim_min(width, panels.columns - panel * width)),
            Alias(into, self.packed, symbol("batch") * panels.size + panel * width * pairs),
        ]
        padded: Dim = width if not isinstance(panels.columns, int) else symbol("padded", 0, width)
        if not isinstance(padded, int):
            body.append(Let("padded", dim_min(width, panels.padded - panel * width)))
        if _right_in_pairs(whole):
            source = Buffer("source", U32)
            body.append(Alias(source, whole.right.buffer, start))
            body += transposed(self.found, panels, source, into, padded, left, self.target)
        else:
            bits = Buffer("right_bits", U16)
            body.append(Alias(bits, whole.right.buffer, start))
            pair, column = k.index_symbol("pair", pairs), k.index_symbol("column", padded)

            def at(position: Dim) -> Dim:
                where = flattened(whole.depth, position)
                there = sum((where[axis.name] * axis.right for axis in whole.depth), 0)
                return there + column * whole.column.right

            inside = s.index(column) < s.index(left)
            value = s.select(inside, self._pair(bits, at, pair), s.const(0, U32))
            copy = For("column", padded, (Store(into, pair * padded + column, value),), "vector")
            body.append(For("pair", pairs, (copy,)))
        return call(self.region, f"bf16_pack_x{width}", (For("task", tasks, tuple(body), "parallel"),), (self.packed,))


def _lies_in_pairs(whole: Product) -> bool:
    """Whether the pairs of the left operand are neighbours in memory, and all begin at even offsets."""
    last = whole.depth[-1]
    others = [axis.left for axis in (*whole.batch, *whole.rows, *whole.depth[:-1])]
    return last.left == 1 and all(map(is_even, (last.extent, whole.left_start, *others)))


def _right_in_pairs(whole: Product) -> bool:
    """Whether the pairs of the right operand are neighbours in memory too, its columns further apart."""
    strides = [whole.column.right, *(axis.right for axis in whole.batch)]
    alone = len(whole.depth) == 1 and whole.depth[0].right == 1
    return alone and all(map(is_even, (whole.depth[0].extent, whole.right_start, *strides)))


def _in_place(whole: Product, view: Buffer) -> Product:
    """The product over pairs, the left operand's where they lie."""
    half = [replace(axis, left=floordiv(axis.left, 2)) for axis in (*whole.batch, *whole.rows)]
    batch, rows = tuple(half[: len(whole.batch)]), tuple(half[len(whole.batch) :])
    *outer, last = whole.depth
    depth = [replace(axis, left=floordiv(axis.left, 2)) for axis in outer]
    depth.append(replace(last, extent=floordiv(last.extent, 2), left=1))
    left = s.load(view, floordiv(whole.left_start, 2))
    return _pairwise(whole, left, floordiv(whole.left_start, 2), batch, rows, tuple(depth))


def _copied(whole: Product) -> Product:
    """The product over pairs of a copy of the left operand, [batch][row][pair]."""
    pairs = ceildiv(product(axis.extent for axis in whole.depth), 2)
    step: Dim = pairs
    found: list[Axis] = []
    for axis in reversed((*whole.batch, *whole.rows)):
        found.insert(0, replace(axis, left=step))
        step = step * axis.extent
    batch, rows = tuple(found[: len(whole.batch)]), tuple(found[len(whole.batch) :])
    depth = (Axis(whole.depth[-1].name, pairs, 1, whole.depth[-1].right),)
    return _pairwise(whole, s.load(Buffer("left_pairs", U32, step), 0), 0, batch, rows, depth)


def _pairwise(
    whole: Product, left: Scalar, start: Dim, batch: tuple[Axis, ...], rows: tuple[Axis, ...], depth: tuple[Axis, ...]
) -> Product:
    """The product over pairs of its axes."""
    column = whole.column
    if _right_in_pairs(whole):
        column = replace(column, right=floordiv(column.right, 2))
    assert isinstance(left, Load)
    return replace(
        whole, dtype=U32, left=left, left_start=start, batch=batch, rows=rows, depth=depth, column=column, dot=PAIRS
    )
