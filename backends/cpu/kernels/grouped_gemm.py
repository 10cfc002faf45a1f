"""Matrix products over groups of neighbours along the depth, each one element of 32 bits that a dot instruction takes.

With groups for elements the register tiles are those of f32, at a half or a quarter of the depth. Constant operands are
packed as [depth / group][columns][group] when the model is compiled, others by a kernel; the left operand is read where
it lies: its groups are neighbours in memory, or else it is copied first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, floordiv, product, symbol
from ....ir.dtypes import U8, U16, U32, DType
from ....ir.loops import Alias, For, Let, Statement, Store
from ....ir.scalars import Buffer, Load, Scalar
from ....ir.target import Target
from ....passes.regions import Call, Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue
from ..dot_products import Dot
from .gemm import _Gemm
from .packing import groups_of, matrices, packed, transposed
from .product import Axis, Product, flattened
from .register_tile import Tile


def divisible(group: int, dims: Iterable[Dim]) -> bool:
    """Whether sizes or offsets are surely multiples of a group."""
    return all(dim % group == 0 for dim in dims)


def sign_bits(dot: Dot) -> int:
    """The sign bits of a group, which turn signed elements into unsigned ones that are larger by a constant."""
    bits = 32 // dot.group
    return sum(1 << (bits * part + bits - 1) for part in range(dot.group))


class GroupedGemm(_Gemm):
    """The product over groups, `whole` being the one over elements and `dot` what multiplies a group.

    `flips` says of the left and the right operand whether the sign bits of what lies in memory are to be inverted.
    `widened` elements are larger than those in memory: operands are copied for it.
    """

    def __init__(
        self,
        region: Region,
        target: Target,
        whole: Product,
        outputs: Epilogue,
        array: np.ndarray | None,
        dot: Dot,
        flips: tuple[bool, bool] = (False, False),
        widened: bool = False,
    ) -> None:
        self.whole, self.dot, self.flips, self.widened = whole, dot, flips, widened
        self.element_depth: Dim = product(axis.extent for axis in whole.depth)
        self.view = Buffer("groups", U32)
        self.reads_groups = not widened and lies_in_groups(whole, dot.group)
        self.right_in_groups = not widened and _right_in_groups(whole, dot.group)
        found = _in_place(whole, dot, self.view) if self.reads_groups else _copied(whole, dot)
        if self.right_in_groups:
            found = replace(found, column=replace(found.column, right=floordiv(found.column.right, dot.group)))
        super().__init__(region, target, found, outputs, array)

    @property
    def kind(self) -> str:
        """What stands in the names of kernels for the type."""
        return self.dot.left.name if self.dot.left == self.dot.right else f"{self.dot.left}_{self.dot.right}"

    def scratch(self) -> list[Buffer]:
        """What the product's kernel reads beside the region's buffers, the packed right operand first."""
        return [self.packed] if self.reads_groups else [self.packed, self.found.left.buffer]

    def lowered(self) -> Lowered:
        scratch = self.scratch()
        calls = [call(self.region, f"{self.kind}_gemm_{self.tile}", self._body(), scratch, shared=True)]
        workspaces = [] if self.reads_groups else [self.found.left.buffer]
        if not self.reads_groups:
            calls.insert(0, self._pack_left())
        if self.array is not None:
            return Lowered(tuple(calls), tuple(workspaces), {self.packed.name: self._packer(self.array)})
        return Lowered((self._pack_right(), *calls), (self.packed, *workspaces))

    def _left(self, tile: Tile, row: Dim) -> tuple[list[Statement], Callable[[int], Scalar]]:
        aliases, read = super()._left(tile, row)
        if not self.reads_groups:
            return aliases, read
        aliases = [Alias(self.view, self.whole.left.buffer, 0), *aliases]
        return aliases, (lambda i: self._flipped(read(i), 0)) if self.flips[0] else read

    def _packer(self, array: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: self._panels(matrices(self.whole, array))

    def _panels(self, elements: np.ndarray) -> np.ndarray:
        """Elements [batches, depth, columns] as panels of groups."""
        return packed(groups_of(elements, self.dot.group), self.panels, U32)

    def _flipped(self, groups: Scalar, operand: int) -> Scalar:
        return groups ^ s.const(sign_bits(self.dot), U32, groups.lanes) if self.flips[operand] else groups

    # What is only known at run time

    def _pack_left(self) -> Call:
        """Copies the left operand to [batch][row][group], with zeros for the elements that are missing of a group."""
        into = (self.found.left.buffer,)
        return call(self.region, f"{self.kind}_copy_rows", self._packing_left(), into, shared=True)

    def _packing_left(self) -> Iterator[Statement]:
        whole, groups, into = self.whole, self.depth, self.found.left.buffer
        tasks, depth = self.batches * self.rows, self.element_depth
        start = whole.left_start
        for axes, position in (
            (whole.batch, symbol("batch", 0, self.batches - 1)),
            (whole.rows, symbol("row", 0, self.rows - 1)),
        ):
            where = flattened(axes, position)
            start = start + sum((where[axis.name] * axis.left for axis in axes), 0)
        source, copy = Buffer("left_elements", self._memory(0)), Buffer("left_copy", self._unsigned)
        loops, offset, at = list[tuple[str, Dim]](), cast(Dim, 0), cast(Dim, 0)
        for place, (extent, step) in enumerate(_runs(whole.depth)):  # an index for each: no element is divided for
            loops.append((f"element{place}", extent))
            index = k.index_symbol(loops[-1][0], extent)
            offset, at = offset + index * step, at * extent + index
        element = s.load(source, offset)
        statements: list[Statement] = [Store(copy, at, self._bits(element, 0))]
        for place, (name, extent) in reversed(list(enumerate(loops))):
            kind = "vector" if place == len(loops) - 1 else "serial"
            statements = [For(name, extent, tuple(statements), kind)]
        if not divisible(self.dot.group, [depth]):
            missing = groups * self.dot.group - depth
            beyond = depth + k.index_symbol("missing", missing)
            statements.append(For("missing", missing, (Store(copy, beyond, s.const(0, copy.dtype)),)))
        task = k.index_symbol("task", tasks)
        body: tuple[Statement, ...] = (
            Let("batch", task // self.rows),
            Let("row", task % self.rows),
            Alias(source, whole.left.buffer, start),
            Alias(copy, into, task * groups),
            *statements,
        )
        yield For("task", tasks, body, "parallel")

    @property
    def _unsigned(self) -> DType:
        """The type of an element's bits."""
        return {2: U16, 4: U8}[self.dot.group]

    def _memory(self, operand: int) -> DType:
        """As what elements of an operand are read to be put into groups."""
        return self._unsigned

    def _bits(self, element: Scalar, operand: int) -> Scalar:
        """The unsigned bits that stand in a group for an element of an operand."""
        return element ^ s.const(1 << (element.dtype.bits - 1), element.dtype) if self.flips[operand] else element

    def _group(self, bits: Buffer, at: Callable[[Dim], Dim], group: Dim, operand: int) -> Scalar:
        """The elements of a group of an operand, zeros for those that there are not."""
        size, width = self.dot.group, 32 // self.dot.group
        total: Scalar | None = None
        for part in range(size):
            position = size * group + part
            wide = s.cast(self._bits(s.load(bits, at(position)), operand), U32)
            wide = s.binary("shl", wide, s.const(width * part, U32)) if part else wide
            if part and not divisible(size, [self.element_depth]):
                wide = s.select(s.index(position) < s.index(self.element_depth), wide, s.const(0, U32))
            total = wide if total is None else total | wide
        assert total is not None
        return total

    def _pack_right(self) -> Call:
        """Packs the right operand into panels: one task for each."""
        scratch, name = (self.packed, *self._made_beside()), f"{self.kind}_pack_x{self.tile.width}"
        return call(self.region, name, self._packing_right(), scratch, shared=True)

    def _packing_right(self) -> Iterator[Statement]:
        whole, panels, groups, width = self.whole, self.panels, self.depth, self.tile.width
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
            Alias(into, self.packed, symbol("batch") * panels.size + panel * width * groups),
        ]
        padded: Dim = width if not isinstance(panels.columns, int) else symbol("padded", 0, width)
        if not isinstance(padded, int):
            body.append(Let("padded", dim_min(width, panels.padded - panel * width)))
        if self.right_in_groups:
            source = Buffer("source", U32)
            body.append(Alias(source, whole.right.buffer, start))
            body += transposed(
                self.found, panels, source, into, padded, left, self.target, lambda x: self._flipped(x, 1)
            )
        else:
            bits = Buffer("right_bits", self._memory(1))
            body.append(Alias(bits, whole.right.buffer, start))
            group, column = k.index_symbol("group", groups), k.index_symbol("column", padded)

            def at(position: Dim) -> Dim:
                where = flattened(whole.depth, position)
                there = sum((where[axis.name] * axis.right for axis in whole.depth), 0)
                return there + column * whole.column.right

            inside = s.index(column) < s.index(left)
            value = s.select(inside, self._group(bits, at, group, 1), s.const(0, U32))
            copy = For("column", padded, (Store(into, group * padded + column, value),), "vector")
            body.append(For("group", groups, (copy,)))
        body += self._beside_panel(into, padded, panel)
        yield For("task", tasks, tuple(body), "parallel")

    def _beside_panel(self, panel: Buffer, padded: Dim, number: Dim) -> Sequence[Statement]:
        """What else is to be made of a panel that was just packed."""
        return ()

    def _made_beside(self) -> Sequence[Buffer]:
        return ()


def lies_in_groups(whole: Product, group: int) -> bool:
    """Whether the groups of the left operand are neighbours in memory, and all begin at multiples of their size."""
    last = whole.depth[-1]
    others = [axis.left for axis in (*whole.batch, *whole.rows, *whole.depth[:-1])]
    return last.left == 1 and divisible(group, (last.extent, whole.left_start, *others))


def _runs(axes: Sequence[Axis]) -> list[tuple[Dim, Dim]]:
    """The extents of axes and the left operand's strides along them, those that follow one another in memory as one."""
    found: list[tuple[Dim, Dim]] = []
    for axis in axes:
        if found and found[-1][1] == axis.left * axis.extent:
            found[-1] = found[-1][0] * axis.extent, axis.left
        else:
            found.append((axis.extent, axis.left))
    return found


def _right_in_groups(whole: Product, group: int) -> bool:
    """Whether the groups of the right operand are neighbours in memory too, its columns further apart."""
    strides = [whole.column.right, *(axis.right for axis in whole.batch)]
    alone = len(whole.depth) == 1 and whole.depth[0].right == 1
    return alone and divisible(group, (whole.depth[0].extent, whole.right_start, *strides))


def _in_place(whole: Product, dot: Dot, view: Buffer) -> Product:
    """The product over groups, the left operand's where they lie."""
    size = dot.group
    less = [replace(axis, left=floordiv(axis.left, size)) for axis in (*whole.batch, *whole.rows)]
    batch, rows = tuple(less[: len(whole.batch)]), tuple(less[len(whole.batch) :])
    *outer, last = whole.depth
    depth = [replace(axis, left=floordiv(axis.left, size)) for axis in outer]
    depth.append(replace(last, extent=floordiv(last.extent, size), left=1))
    left = s.load(view, floordiv(whole.left_start, size))
    return _groupwise(whole, dot, left, floordiv(whole.left_start, size), batch, rows, tuple(depth))


def _copied(whole: Product, dot: Dot) -> Product:
    """The product over groups of a copy of the left operand, [batch][row][group]."""
    groups = ceildiv(product(axis.extent for axis in whole.depth), dot.group)
    step: Dim = groups
    found: list[Axis] = []
    for axis in reversed((*whole.batch, *whole.rows)):
        found.insert(0, replace(axis, left=step))
        step = step * axis.extent
    batch, rows = tuple(found[: len(whole.batch)]), tuple(found[len(whole.batch) :])
    depth = (Axis(whole.depth[-1].name, groups, 1, whole.depth[-1].right),)
    return _groupwise(whole, dot, s.load(Buffer("left_groups", U32, step), 0), 0, batch, rows, depth)


def _groupwise(
    whole: Product,
    dot: Dot,
    left: Scalar,
    start: Dim,
    batch: tuple[Axis, ...],
    rows: tuple[Axis, ...],
    depth: tuple[Axis, ...],
) -> Product:
    """The product over groups of its axes."""
    assert isinstance(left, Load)
    return replace(whole, dtype=U32, left=left, left_start=start, batch=batch, rows=rows, depth=depth, dot=dot)
