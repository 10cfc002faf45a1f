"""Matrix products of operands of 16 bits that no instruction multiplies: the left one is widened once, by a kernel.

Many rows are read again for each panel of columns; a number that is converted there, before it is broadcast, takes
more time than its products.
"""

from __future__ import annotations

from dataclasses import replace

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, product, symbol
from ....ir.dtypes import BF16, F16, F32
from ....ir.loops import For, Let, Statement, Store
from ....ir.scalars import Buffer, Load
from ....ir.target import Target
from ....ir.tensors import buffer_tensor
from ....passes.regions import Call, Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import epilogue
from .gemm import _Gemm
from .product import Axis, Product, find_product, flattened

ROWS, COLUMNS = 8, 64
"""Of a product that is worth a kernel before it, more rows than one register tile, and columns."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a product of f16 or bf16 by a constant, in f32; None for small ones and all others."""
    found = find_product(region)
    if found is None or found.left.dtype not in (F16, BF16) or found.dtype != F32 or not found.depth:
        return None
    array = region.constants.get(found.right.buffer.name)
    sizes = [axis.extent for axis in (*found.batch, *found.depth, found.column)]
    rows, columns = product(axis.extent for axis in found.rows), found.column.extent
    if array is None or not all(isinstance(size, int) for size in sizes) or (isinstance(rows, int) and rows <= ROWS):
        return None
    outputs = epilogue(region, found.indices, found.shape, found.element, found.column.name, found.dtype)
    if outputs is None or (isinstance(columns, int) and columns < COLUMNS):
        return None
    wide = _contiguous(found)
    buffer = wide.left.buffer
    region = replace(region, inputs=(*region.inputs, buffer_tensor(buffer.name, F32, (buffer.size,))))
    made = _Gemm(region, target, wide, outputs, array).lowered()
    return replace(made, calls=(_widen(region, found, wide), *made.calls), workspaces=(buffer, *made.workspaces))


def _contiguous(found: Product) -> Product:
    """The product with a left operand of f32, [batch][row][depth]."""
    step: Dim = 1
    axes: list[Axis] = []
    for axis in reversed((*found.batch, *found.rows, *found.depth)):
        axes.insert(0, replace(axis, left=step))
        step = step * axis.extent
    first, second = len(found.batch), len(found.batch) + len(found.rows)
    left = s.load(Buffer("left_wide", F32, step), 0)
    assert isinstance(left, Load)
    return replace(
        found,
        left=left,
        left_start=0,
        batch=tuple(axes[:first]),
        rows=tuple(axes[first:second]),
        depth=tuple(axes[second:]),
    )


def _widen(region: Region, found: Product, wide: Product) -> Call:
    """Copies the left operand, a row in each turn."""
    outer = (*found.batch, *found.rows)
    tasks = product(axis.extent for axis in outer)
    depth = product(axis.extent for axis in found.depth)
    task = k.index_symbol("task", tasks)
    where = flattened(outer, symbol("line", 0, tasks - 1))
    start = found.left_start + sum((where[axis.name] * axis.left for axis in outer), 0)
    start = start + sum((axis.index * axis.left for axis in found.depth), 0)
    into = symbol("line", 0, tasks - 1) * depth + sum((axis.index * axis.left for axis in wide.depth), 0)
    body: tuple[Statement, ...] = (Store(wide.left.buffer, into, s.cast(s.load(found.left.buffer, start), F32)),)
    for number, axis in enumerate(reversed(found.depth)):
        body = (For(axis.name, axis.extent, body, "serial" if number else "vector"),)
    return call(region, "widen_rows", (For("task", tasks, (Let("line", task), *body), "parallel"),))
