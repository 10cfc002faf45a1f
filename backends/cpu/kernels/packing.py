"""Operands in the form that register tiles read: panels of columns, each [depth][width], zeros behind the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, product, symbol
from ....ir.dtypes import I32, I64, DType
from ....ir.loops import Alias, Define, For, If, Kernel, Let, Statement, Store, free_sizes
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Call
from .product import Product, flattened
from .register_tile import Tile


@dataclass(frozen=True)
class Panels:
    """How columns are cut: panels as wide as the tile, and a last narrower one where their number is known.

    A panel of `v` vectors that starts at vector `first` lies at `first * lanes * depth` of its batch's memory.
    """

    tile: Tile
    columns: Dim
    depth: Dim

    @property
    def count(self) -> Dim:
        return ceildiv(self.columns, self.tile.width)

    @property
    def padded(self) -> Dim:
        """Columns with those of zeros that fill the last vector, or the last panel where their number is unknown."""
        unit = self.tile.lanes if isinstance(self.columns, int) else self.tile.width
        return ceildiv(self.columns, unit) * unit

    @property
    def size(self) -> Dim:
        """Elements of one batch."""
        return self.padded * self.depth


@dataclass(frozen=True)
class Columns:
    """Panels of one width: `count` from number `first` on, of `vectors` vectors; `valid` columns in the last vector."""

    first: Dim
    count: Dim
    vectors: int
    valid: int


def first_lanes(count: Dim, lanes: int) -> Scalar:
    """The predicate of the first `count` of a vector's lanes."""
    return s.binary("lt", s.cast(s.Lanes(I64, lanes), I32), s.cast(s.index(count), I32))


def column_runs(panels: Panels) -> Iterator[Columns]:
    """The panels by width. Where the number of columns is unknown, all are as wide as the tile."""
    extent, tile = panels.columns, panels.tile
    if not isinstance(extent, int):
        yield Columns(0, panels.count, tile.vectors, tile.lanes)
        return
    vectors = -(-extent // tile.lanes)
    valid = extent - (vectors - 1) * tile.lanes
    full, rest = divmod(vectors, tile.vectors)
    whole = full if rest or valid == tile.lanes else full - 1
    if whole:
        yield Columns(0, whole, tile.vectors, tile.lanes)
    if rest or valid != tile.lanes:
        yield Columns(whole, 1, rest or tile.vectors, valid)


def by_columns(panels: Panels, panel: Dim, make: Callable[[Columns], Iterable[Statement]]) -> tuple[Statement, ...]:
    """What `make` gives for each width of panels, of which the number of the panel decides."""
    result: tuple[Statement, ...] = ()
    for columns in reversed(list(column_runs(panels))):
        here = tuple(make(columns))
        result = (If(s.index(panel) < s.index(columns.first + columns.count), here, result),) if result else here
    return result


def matrices(product_: Product, array: np.ndarray) -> np.ndarray:
    """The constant right operand as matrices [batches, depth, columns]."""
    axes = (*product_.batch, *product_.depth, product_.column)
    extents = [known(axis.extent) for axis in axes]
    strides = [known(axis.right) for axis in axes]
    batches = int(np.prod([known(axis.extent) for axis in product_.batch], dtype=np.int64))
    flat = np.ascontiguousarray(array).reshape(-1)[known(product_.right_start) :]
    view = np.lib.stride_tricks.as_strided(
        flat, extents, [stride * flat.itemsize for stride in strides], writeable=False
    )
    return view.reshape(batches, -1, extents[-1])


def packed(matrices: np.ndarray, panels: Panels, dtype: DType) -> np.ndarray:
    """The panels of matrices [batches, depth, columns] in one row."""
    batches, depth, columns = matrices.shape
    size, width, all_columns = known(panels.size), panels.tile.width, known(panels.padded)
    result = np.zeros(batches * size, dtype.numpy)
    for batch in range(batches):
        at = batch * size
        for first in range(0, columns, width):
            padded, here = min(width, all_columns - first), min(width, columns - first)
            panel = result[at : at + depth * padded].reshape(depth, padded)
            panel[:, :here] = matrices[batch, :, first : first + here]
            at += depth * padded
    return result


def groups_of(array: np.ndarray, group: int) -> np.ndarray:
    """[..., depth, columns] as [..., ceil(depth / group), columns] of u32, the first row of a group in the low bits."""
    *batch, depth, columns = array.shape
    bits = {2: np.uint16, 4: np.uint8}[group]
    found = np.zeros((*batch, -(-depth // group), columns, group), bits)
    rows = np.ascontiguousarray(array).view(bits)
    for part in range(group):
        found[..., : -(-(depth - part) // group), :, part] = rows[..., part::group, :]
    return found.view(np.uint32)[..., 0]


def pairs_of(array: np.ndarray) -> np.ndarray:
    """[..., depth, columns] of bf16 as [..., ceil(depth / 2), columns] of u32, row 2i in the low bits."""
    return groups_of(array, 2)


def known(dim: Dim) -> int:
    """A size that schedules need as a number; they look before."""
    assert isinstance(dim, int), f"{dim} is not a constant"
    return dim


def pack_call(
    name: str, product_: Product, panels: Panels, into: Buffer, target: Target, origin: tuple[str, ...]
) -> Call:
    """The kernel that packs the right operand at run time: one task per panel."""
    width, depth = panels.tile.width, panels.depth
    tasks = product([*(axis.extent for axis in product_.batch), panels.count])
    task = k.index_symbol("task", tasks)
    panel = symbol("panel", 0, panels.count - 1)
    batch = flattened(product_.batch, symbol("batch", 0, product(a.extent for a in product_.batch) - 1))
    start = product_.right_start + panel * width * product_.column.right
    for axis in product_.batch:
        start = start + batch[axis.name] * axis.right
    source, panel_out = Buffer("source", product_.right.dtype), Buffer("panel_out", product_.dtype)
    left = symbol("left", 0, width)
    body: list[Statement] = [
        Let("panel", task % panels.count),
        Let("batch", task // panels.count),
        Let("left", dim_min(width, panels.columns - panel * width)),
        Alias(source, product_.right.buffer, start),
        Alias(panel_out, into, symbol("batch") * panels.size + panel * width * depth),
    ]
    padded: Dim = width if not isinstance(panels.columns, int) else symbol("padded", 0, width)
    if not isinstance(padded, int):
        body.append(Let("padded", dim_min(width, panels.padded - panel * width)))
    flat = k.index_symbol("at", depth)
    where = flattened(product_.depth, flat)
    offset: Dim = sum((where[axis.name] * axis.right for axis in product_.depth), 0)
    unit_depth = len(product_.depth) == 1 and product_.depth[0].right == 1
    if unit_depth and product_.column.right != 1 and product_.right.dtype == product_.dtype:
        body += transposed(product_, panels, source, panel_out, padded, left, target)
    else:
        column = k.index_symbol("column", padded)
        read = s.cast(s.load(source, offset + column * product_.column.right), product_.dtype)
        value = s.select(s.index(column) < s.index(left), read, s.const(0, product_.dtype))
        copy = For("column", padded, (Store(panel_out, flat * padded + column, value),), "vector")
        body.append(For("at", depth, (copy,)))
    loop = For("task", tasks, tuple(body), "parallel")
    kernel_body = (loop,)
    parameters = (product_.right.buffer, into)
    kernel = Kernel(name, parameters, (into.name,), free_sizes(kernel_body, parameters), kernel_body, origin)
    return Call(kernel, tuple(b.name for b in parameters), tuple(symbol(n, None) for n in kernel.sizes))


def transposed(
    product_: Product,
    panels: Panels,
    source: Buffer,
    into: Buffer,
    padded: Dim,
    left: Dim,
    target: Target,
    convert: Callable[[Scalar], Scalar] = lambda x: x,
) -> list[Statement]:
    """Columns that lie contiguous along the depth: squares of lanes x lanes are transposed in registers. What is stored
    are the elements as `convert` makes them."""
    lanes, depth, stride = panels.tile.lanes, panels.depth, product_.column.right
    group = k.index_symbol("group", padded // lanes) * lanes
    square = k.index_symbol("square", depth // lanes) * lanes
    statements: list[Statement] = []
    rows: list[Scalar] = []
    for lane in range(lanes):
        inside = s.widen(s.index(group + lane) < s.index(left), lanes)
        register = Buffer(f"r{lane}", product_.dtype, 1, "register", lanes)
        statements.append(Define(register, s.load(source, (group + lane) * stride + square, lanes, inside)))
        rows.append(s.load(register, 0, lanes))
    for step in range(lanes.bit_length() - 1):
        half = 1 << step
        mixed: list[Scalar] = [rows[0]] * lanes
        for lane in range(lanes):
            if lane & half:
                continue
            low = tuple(i if not i & half else lanes + i - half for i in range(lanes))
            high = tuple(i + half if not i & half else lanes + i for i in range(lanes))
            for target_lane, pick in ((lane, low), (lane + half, high)):
                shuffled = s.Shuffle(product_.dtype, lanes, rows[lane], rows[lane + half], pick)
                register = Buffer(f"t{step}_{target_lane}", product_.dtype, 1, "register", lanes)
                statements.append(Define(register, shuffled))
                mixed[target_lane] = s.load(register, 0, lanes)
        rows = mixed
    statements += [Store(into, (square + lane) * padded + group, convert(row)) for lane, row in enumerate(rows)]
    whole = For("square", depth // lanes, tuple(statements))
    rest, first = depth % lanes, depth // lanes * lanes
    at = k.index_symbol("rest", rest)
    lane_index = k.index_symbol("lane", lanes)
    inside = s.index(group + lane_index) < s.index(left)
    read = convert(s.load(source, (group + lane_index) * stride + first + at))
    value = s.select(inside, read, s.const(0, product_.dtype))
    store = Store(into, (first + at) * padded + group + lane_index, value)
    tail = For("rest", rest, (For("lane", lanes, (store,), "vector"),))
    return [For("group", padded // lanes, (whole, tail) if rest != 0 else (whole,))]
