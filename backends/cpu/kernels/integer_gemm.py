"""Matrix products of 8-bit integers with sums in i32: MatMulInteger, and ConvInteger where it is a matrix product.

Of operands x and w with zero points x0 and w0 and a depth of n elements, the sum of (x - x0) * (w - w0) is

    sum of x * w  -  x0 * (sum of w)  -  w0 * (sum of x)  +  n * x0 * w0,

where x and w may be moved by 128, with their zero points, to have the signs that the dot instruction takes. All but the
first term are what sums start with: numbers for each column, known when the model is compiled where w and x0 are, else
made when w is packed; and where w0 is not 0, numbers for each row, which a kernel sums up before. Constants w that are
still 8 bits wide less their zero point are packed so, and need none. Sums wrap: every order and target gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, product, symbol
from ....ir.dtypes import I8, I32, U8, U32, DType
from ....ir.loops import Alias, Alloc, For, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Call, Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, epilogue, through_memory
from ..dot_products import DOTS, Dot
from . import widened_pairs
from .gemm import with_copies
from .grouped_gemm import GroupedGemm, lies_in_groups
from .integer_bias import without_bias
from .integers import Integers, find_integers, is_zero
from .packing import Columns, first_lanes, known, matrices
from .product import Product, flattened
from .register_tile import Starts

ONES = 0x01010101
"""Four bytes of 1."""
GROUP = 4
"""Bytes that an instruction takes at once."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a region whose anchor sums products of bytes less their zero points in i32; None for others."""
    found = find_integers(region)
    if found is None:
        return with_copies(region, lambda changed: schedule(changed, target))
    whole = found.whole
    outputs = epilogue(region, whole.indices, whole.shape, whole.element, whole.column.name, I32)
    if outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    if found.array is None and product(axis.extent for axis in whole.rows) == 1:
        return None  # A loop nest reads such a matrix once, in order.
    if widened_pairs.applies(found, target):
        return widened_pairs.WidenedPairs(region, target, found, outputs).lowered()
    return IntegerGemm(region, target, found, outputs).lowered()


def in_place(region: Region, target: Target) -> Lowered | None:
    """As `schedule`, None also for convolutions of which it would copy every pixel once for each tap that reads it."""
    found = find_integers(region)
    if found is None or (len(found.whole.depth) > 1 and not lies_in_groups(found.whole, GROUP)):
        return None
    return schedule(region, target)


def choose_dot(left: DType, target: Target) -> tuple[Dot, bool]:
    """The dot product of bytes to use for left operands of a type, and whether these must have the other sign: the
    right one is i8."""
    own, other = (DOTS[f"dot4_{dtype}_i8"] for dtype in ((left, I8) if left == U8 else (left, U8)))
    flipped = own.name not in target.dot_products and other.name in target.dot_products
    return (other, True) if flipped else (own, False)


class IntegerGemm(GroupedGemm):
    """The product over groups of four bytes, its right operand i8."""

    def __init__(self, region: Region, target: Target, found: Integers, outputs: Epilogue) -> None:
        whole, array = found.whole, found.array
        dot, flipped = choose_dot(whole.left.dtype, target)
        move = 0 if not flipped else 128 if whole.left.dtype == I8 else -128
        self.left_zero = _plus(found.left_zero, move)
        self.right_zero: Scalar | np.ndarray = found.right_zero
        self.shift: np.ndarray | int = 128 if whole.right.dtype == U8 else 0
        if array is not None:
            self._shift_constants(array, whole)
        elif isinstance(self.right_zero, Scalar):
            self.right_zero = _plus(self.right_zero, -128 if whole.right.dtype == U8 else 0)
        self.bias: np.ndarray | None = None
        if array is not None and isinstance(self.left_zero, s.LITERALS) and not whole.batch:
            outputs, self.bias = without_bias(region, outputs)
        super().__init__(region, target, whole, outputs, array, dot, (flipped, whole.right.dtype == U8))
        self.starts = Buffer("starts", I32, self.batches * self.panels.padded)
        self.right_zeros = Buffer("right_zeros", I32, self.batches * self.panels.padded)
        self.row_sums = Buffer("row_sums", I32, self.batches * self.rows)

    def _shift_constants(self, array: np.ndarray, whole: Product) -> None:
        """What is taken off constant elements before they are packed: their zero points where what remains is i8."""
        zero = self.right_zero
        if isinstance(zero, Scalar):
            zero = np.full((1, 1), _number(zero), np.int32)
        fits = bool((zero == self.shift).all())
        if not fits:
            elements = matrices(whole, array)
            low, high = elements.min(axis=1).astype(np.int32), elements.max(axis=1).astype(np.int32)
            fits = bool((low - zero).min() >= -128 and (high - zero).max() <= 127)
        if fits:
            self.shift, self.right_zero = zero, s.const(0, I32)
        else:
            rest, alone = zero - self.shift, isinstance(self.right_zero, Scalar)
            self.right_zero = s.const(int(rest[0, 0]), I32) if alone else rest

    @property
    def by_rows_too(self) -> bool:
        """Whether sums of rows are needed."""
        return not is_zero(self.right_zero)

    @property
    def begins(self) -> bool:
        """Whether sums start with a number of their column."""
        return self.bias is not None or not is_zero(self.left_zero)

    @property
    def factored(self) -> bool:
        """Whether the numbers of columns are still to be multiplied by the left operand's zero point."""
        return self.array is None or not isinstance(self.left_zero, s.LITERALS)

    def scratch(self) -> list[Buffer]:
        several = isinstance(self.right_zero, np.ndarray)
        wanted = (self.begins, self.starts), (several, self.right_zeros), (self.by_rows_too, self.row_sums)
        return [*super().scratch(), *(buffer for needed, buffer in wanted if needed)]

    def lowered(self) -> Lowered:
        found = super().lowered()
        calls, workspaces, packed = list(found.calls), list(found.workspaces), dict(found.packed)
        if self.by_rows_too:
            calls.insert(-1, self._sum_rows())
            workspaces.append(self.row_sums)
        if self.begins and self.array is None:
            workspaces.append(self.starts)
        elif self.begins:
            packed[self.starts.name] = self._column_starts
        if isinstance(self.right_zero, np.ndarray):
            zeros = self.right_zero
            packed[self.right_zeros.name] = lambda: self._padded(zeros)
        return replace(found, calls=tuple(calls), workspaces=tuple(workspaces), packed=packed)

    # Constants

    def _elements(self) -> np.ndarray:
        """The constant right operand as it is packed, [batches, depth, columns] of i8."""
        assert self.array is not None
        elements = matrices(self.whole, self.array)
        shift = self.shift if isinstance(self.shift, int) else self.shift[:, None, :]
        if np.all(shift == 0):
            return elements
        return (elements.astype(np.int16) - np.asarray(shift, np.int16)).astype(np.int8)

    def _packer(self, array: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: self._panels(self._elements())

    def _column_starts(self) -> np.ndarray:
        """For each column -x0 * (sum of w) + n * x0 * w0, or that without the factor x0."""
        elements = self._elements()
        zero = self.right_zero
        right = _number(zero) if isinstance(zero, Scalar) else zero.astype(np.int64)
        starts = elements.shape[1] * right - elements.sum(axis=1, dtype=np.int64)
        left = self.region.number(self.left_zero)
        if left is not None:
            starts = starts * int(left)
        return self._padded(starts if self.bias is None else starts + self.bias)

    def _padded(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers of [batches, columns] with zeros for the columns that fill the last vector."""
        result = np.zeros((known(self.batches), known(self.panels.padded)), np.int32)
        result[:, : known(self.panels.columns)] = numbers.astype(np.int64).astype(np.int32)
        return result.reshape(-1)

    # What sums start with

    def _start(self, columns: Columns, column: Dim, row: Dim) -> Starts | None:
        if not self.begins and not self.by_rows_too:
            return None
        lanes, batch = self.tile.lanes, symbol("batch", 0, self.batches - 1) if self.batches != 1 else 0
        at = batch * self.panels.padded + column

        def start(i: int, v: int) -> Scalar:
            here = s.Rewriter(dims={**self._batch(), **flattened(self.found.rows, row + i)})
            total: Scalar | None = None
            if self.begins:
                total = s.load(self.starts, at + v * lanes, lanes)
                if self.factored:
                    total = total * s.widen(here(self.left_zero), lanes)
            if self.by_rows_too:
                sums = s.widen(s.load(self.row_sums, batch * self.rows + row + i), lanes)
                if isinstance(self.right_zero, np.ndarray):
                    product_ = s.load(self.right_zeros, at + v * lanes, lanes) * sums
                else:
                    product_ = s.widen(here(self.right_zero), lanes) * sums
                total = s.const(0, I32, lanes) - product_ if total is None else total - product_
            assert total is not None
            return total

        return start

    def _beside_panel(self, panel: Buffer, padded: Dim, number: Dim) -> Sequence[Statement]:
        """The sums of a panel's columns, as `starts` without the left operand's zero point."""
        if not self.begins:
            return ()
        assert isinstance(self.right_zero, Scalar)
        lanes = self.tile.lanes
        total = Buffer("column_sums", I32, 1, "register", lanes)
        vector, group = k.index_symbol("vector", padded // lanes), k.index_symbol("group", self.depth)
        batch = symbol("batch", 0, self.batches - 1)
        here = s.Rewriter(dims=self._batch())
        own = s.cast(s.index(self.element_depth), I32) * here(self.right_zero)
        weights = s.load(panel, group * padded + vector * lanes, lanes)
        added = self.dot(s.load(total, 0, lanes), s.const(ONES, U32, lanes), weights)
        into = batch * self.panels.padded + number * self.tile.width + vector * lanes
        statements = (
            Alloc(total),
            Store(total, 0, s.const(0, I32, lanes)),
            For("group", self.depth, (Store(total, 0, added),)),
            Store(self.starts, into, s.widen(own, lanes) - s.load(total, 0, lanes)),
        )
        return (For("vector", padded // lanes, statements),)

    def _made_beside(self) -> Sequence[Buffer]:
        return (self.starts,) if self.begins else ()

    def _sum_rows(self) -> Call:
        """The sums of the left operand's rows."""
        scratch = [self.row_sums] if self.reads_groups else [self.row_sums, self.found.left.buffer]
        return call(self.region, f"{self.kind}_row_sums", self._summing_rows(), scratch, shared=True)

    def _summing_rows(self) -> Iterator[Statement]:
        found, lanes, tasks = self.found, self.target.lanes(32), self.batches * self.rows
        where = {**self._batch(), **flattened(found.rows, symbol("row", 0, self.rows - 1))}
        start = found.left_start + sum((where[a.name] * a.left for a in (*found.batch, *found.rows)), 0)
        source, total = Buffer("row_groups", U32), Buffer("row_sum", I32, 1, "register", lanes)
        *outer, last = found.depth
        base = sum((axis.index * axis.left for axis in outer), 0)

        def add(at: Dim, predicate: Scalar | None = None) -> Statement:
            groups = s.load(source, base + at, lanes, predicate)
            groups = self._flipped(groups, 0) if self.reads_groups else groups
            if predicate is not None and self.flips[0] and self.reads_groups:
                groups = s.select(predicate, groups, s.const(0, U32, lanes))
            return Store(total, 0, self.dot(s.load(total, 0, lanes), groups, s.const(ONES, U32, lanes)))

        whole = last.extent // lanes
        sums: list[Statement] = [For("c", whole, (add(k.index_symbol("c", whole) * lanes),))]
        rest = last.extent - whole * lanes
        if rest != 0:
            sums.append(add(whole * lanes, first_lanes(rest, lanes)))
        body: list[Statement] = sums
        for axis in reversed(outer):
            body = [For(axis.name, axis.extent, tuple(body))]
        task = k.index_symbol("task", tasks)
        view = [Alias(self.view, self.whole.left.buffer, 0)] if self.reads_groups else []
        statements = (
            Let("batch", task // self.rows),
            Let("row", task % self.rows),
            *view,
            Alias(source, found.left.buffer, start),
            Alloc(total),
            Store(total, 0, s.const(0, I32, lanes)),
            *body,
            Store(self.row_sums, task, s.Horizontal(I32, 1, "add", s.load(total, 0, lanes))),
        )
        yield For("task", tasks, statements, "parallel")


def _plus(zero: Scalar, move: int) -> Scalar:
    return s.const(int(zero.value) + move, I32) if isinstance(zero, s.Const) else zero + s.const(move, I32)


def _number(zero: Scalar) -> int:
    return int(zero.value) if isinstance(zero, s.Const) else 0
