"""Kernels that check indices and sizes which only the run tells: see `passes.checks`."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir import scalars as s
from ...ir.dims import Dim, ceildiv, dim_min, symbol
from ...ir.dtypes import I64
from ...ir.loops import Define, For, If, Let, Statement, Store
from ...ir.scalars import Buffer, Scalar
from ...ir.target import Target
from ...passes.checks import COUNT, END, LEAST, LIMIT, VALUE
from ...passes.regions import Lowered, Region
from .calls import call

CHUNK = {"cpu": 1 << 14, "cuda": 1 << 12}
"""Indices that a thread, or a block of them, looks at in one turn."""


def _record(region: Region, found: Scalar) -> Sequence[Statement]:
    (record, _), (flag, _) = region.outputs
    one = s.const(1, I64)
    words = (one, found, s.index(LIMIT))
    return [*(Store(record, position, word) for position, word in enumerate(words)), Store(flag, 0, one)]


def check_size(region: Region, target: Target) -> Lowered:
    """A record where a size is out of range."""
    value = s.index(VALUE)
    outside = s.binary("or", value < s.index(LEAST), s.binary("le", s.index(END), value))
    return Lowered((call(region, region.name, [If(outside, tuple(_record(region, value)))]),))


def check_index(region: Region, target: Target) -> Lowered:
    """A record where the least or the greatest index of a chunk is out of range; it tells that index."""
    assert region.anchor is not None
    depth, column, small = (region.anchor.attributes[name] for name in ("depth", "column", "small"))
    assert isinstance(depth, int) and isinstance(column, int)
    (source,) = region.inputs
    dtype, size = source.dtype, CHUNK[target.kind]
    bounds = [(op, Buffer(f"{op}imum", dtype, 1, "register")) for op in ("min", "max")]

    def chunk(first: Dim, length: Dim) -> list[Statement]:
        element = symbol("element", 0, length - 1)
        value = source.at(((first + element) * depth + column,))
        start = [Define(register, s.const(s.IDENTITY[op](dtype), dtype)) for op, register in bounds]
        step = [Store(register, 0, s.binary(op, s.load(register, 0), value)) for op, register in bounds]
        least, greatest = (s.cast(s.load(register, 0), I64) for _, register in bounds)
        below = least < s.index(LEAST)
        outside = s.binary("or", below, s.binary("le", s.index(END), greatest))
        found = If(outside, tuple(_record(region, s.select(below, least, greatest))))
        return [*start, For("element", length, tuple(step), "vector"), found]

    if small and target.kind == "cpu":
        return Lowered((call(region, region.name, chunk(0, COUNT)),))
    part, length = symbol("chunk", 0), symbol("length", 0, size)
    body = [Let("length", dim_min(size, COUNT - part * size)), *chunk(part * size, length)]
    return Lowered((call(region, region.name, [For("chunk", ceildiv(COUNT, size), tuple(body), "parallel")]),))
