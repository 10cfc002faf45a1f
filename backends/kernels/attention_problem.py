"""What an attention computes, read off a region: operands in memory, scores as expressions, where the result goes."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir import scalars as s
from ...ir.dims import Dim, dim_factor, known_le, linear, symbol
from ...ir.dtypes import BF16, F16, F32, I64, DType
from ...ir.ops.attention import NAN, ZERO
from ...ir.ops.contraction import batch_index
from ...ir.scalars import Buffer, Scalar
from ...ir.tensors import Indices, Tensor, flat_offset
from ...passes.nests import Axis
from ...passes.regions import ANCHOR, Region
from .attention_scores import KEY, PRODUCT, QUERY, Score, number, score_of

WIDEST = 256
"""Channels of a head up to which a row of sums fits into registers."""
ROW, CHANNEL = "row", "channel"
"""Symbols of an operand's element."""


@dataclass(frozen=True)
class Matrix:
    """Rows of channels, for each batch index: `value` over the symbols "row" and CHANNEL, less a `zero` point.

    Where they lie in memory so that `copied` bytes may be copied at a time, `buffer` and `offset` say where; else
    `copied` is 0, and `by_rows` says whether neighbouring rows are neighbours in memory.
    """

    value: Scalar
    rows: Dim
    channels: int
    zero: Scalar | None = None
    buffer: Buffer | None = None
    offset: Dim = 0
    copied: int = 0
    by_rows: bool = False


@dataclass(frozen=True)
class Result:
    """Where the result goes: `value` is stored at `offset` of a buffer, over the batch, QUERY, CHANNEL and elements of
    the anchor, which have the type `dtype`. So many `neighbours` in channels can be stored at a time. The anchor's
    elements are those of the product with the values times `scale`, where there is one, over the batch and CHANNEL."""

    buffer: Buffer
    offset: Dim
    value: Scalar
    dtype: DType
    neighbours: int
    scale: Scalar | None = None


@dataclass(frozen=True)
class Problem:
    """An attention: `axes` are the batch's, `zero_rows` whether rows without any score give 0 and not NaN."""

    axes: tuple[Axis, ...]
    queries: Matrix
    keys: Matrix
    values: Matrix
    score: Score
    result: Result
    zero_rows: bool


def problem_of(region: Region) -> tuple[Problem, DType] | None:
    """What the region computes, and the type in which it multiplies; None where a schedule cannot make it so."""
    anchor, like = region.anchor, region.anchor_output
    if anchor is None or like is None or len(region.outputs) != 1 or any(t is None for t in region.operands):
        return None
    ((buffer, output),) = region.outputs
    query, key, value = (tensor for tensor in region.operands[:3] if tensor is not None)
    width, depth = query.shape[-1], value.shape[-1]
    if not isinstance(width, int) or not isinstance(depth, int) or not 0 < max(width, depth) <= WIDEST:
        return None
    placed = _placed(output)
    if placed is None:
        return None
    axes, at, element = placed
    batch = element.indices[:-2]
    dtypes = {tensor.dtype for tensor in (query, key, value)}
    dtype = dtypes.pop() if len(dtypes) == 1 else F32
    if dtype not in (F16, BF16, F32) or like.dtype not in (F16, BF16, F32):
        return None
    queries, keys = query.shape[-2], key.shape[-1]
    matrices = (
        _matrix(region, query, batch, (ROW, CHANNEL), queries, width, dtype),
        _matrix(region, key, batch, (CHANNEL, ROW), keys, width, dtype),
        _matrix(region, value, batch, (ROW, CHANNEL), keys, depth, dtype),
    )
    where = (*batch, _index(QUERY, queries), _index(KEY, keys))
    shape = (*like.shape[:-2], queries, keys)
    products = anchor.attributes.get("result", query.dtype)
    assert isinstance(products, DType)
    (scores,) = region.compose(
        "scores", Tensor(shape, products, lambda i: s.Element(products, 1, PRODUCT, i), "buffer")
    )
    score = score_of(scores.at(where))
    offset = flat_offset(at, output.shape)
    result = Result(buffer, offset, output.at(at), like.dtype, _neighbours(region, buffer, offset, depth))
    zero_rows = anchor.attributes.get("empty_rows", NAN) == ZERO
    return Problem(axes, *matrices, score, result, zero_rows), dtype


def _index(name: str, extent: Dim) -> Dim:
    return 0 if extent == 1 else symbol(name, 0, extent - 1)


def _placed(output: Tensor) -> tuple[tuple[Axis, ...], Indices, s.Element] | None:
    """The batch's axes, an index of the output over them, QUERY and CHANNEL, and the one element of the anchor that it
    is made of. None where queries or channels are no axes of the output, or another element is needed."""
    plain = [_index(f"axis{a}", extent) for a, extent in enumerate(output.shape)]
    found = _element(output, plain)
    if found is None:
        return None
    names: dict[Dim, str] = {}
    for index, name in zip(found.indices[-2:], (QUERY, CHANNEL), strict=True):
        if index == 0:
            continue
        if index not in plain or index in names:
            return None
        names[index] = name
    others = [index for index in plain if index != 0 and index not in names]
    titles = {1: ["batch"], 2: ["batch", "head"]}.get(len(others), [f"batch{i}" for i in range(len(others))])
    names.update(zip(others, titles, strict=True))
    at = tuple(
        0 if index == 0 else symbol(names[index], 0, extent - 1)
        for index, extent in zip(plain, output.shape, strict=True)
    )
    element = _element(output, at)
    if element is None or any({QUERY, CHANNEL} & s.free_symbols(index) for index in element.indices[:-2]):
        return None
    extents = {names[index]: extent for index, extent in zip(plain, output.shape, strict=True) if index != 0}
    return tuple(Axis(title, extents[title]) for title in titles), at, element


def _element(output: Tensor, at: Indices | list[Dim]) -> s.Element | None:
    parts = [p for p in s.walk(output.at(tuple(at))) if isinstance(p, s.Element) and p.tensor == ANCHOR]
    return parts[0] if len(parts) == 1 else None


def _matrix(
    region: Region, tensor: Tensor, batch: Indices, names: tuple[str, str], rows: Dim, channels: int, dtype: DType
) -> Matrix:
    """An operand with its last two axes called `names`, for an index of the batch."""
    extents = {ROW: rows, CHANNEL: channels}
    last = tuple(_index(name, extents[name]) for name in names)
    value = tensor.at((*batch_index(batch, tensor), *last))
    if not isinstance(value, s.Load) or value.predicate is not None:
        return Matrix(value, rows, channels)
    along_row, along_channel = (_stride(value.offset, name, extents[name]) for name in (ROW, CHANNEL))
    if along_channel != 1 or along_row is None or value.dtype != dtype:
        return Matrix(value, rows, channels, by_rows=along_row == 1)
    start = s.Rewriter(dims={CHANNEL: 0}).dim(value.offset)
    for copied in (16, 8, 4):
        elements = copied // dtype.bytes
        fits = channels % elements == 0 and dim_factor(start) % elements == 0
        if elements and fits and region.alignment(value.buffer.name) % copied == 0:
            return Matrix(value, rows, channels, None, value.buffer, value.offset, copied)
    return Matrix(value, rows, channels)


def _stride(offset: Dim, name: str, extent: Dim) -> Dim | None:
    """How far apart neighbours along an axis are; None where that differs."""
    if extent == 1:
        return 1 if name == CHANNEL else 0
    found = linear(offset, name)
    return found[0] if found is not None else None


def _neighbours(region: Region, buffer: Buffer, offset: Dim, channels: int) -> int:
    """How many channels of the result can be stored at a time."""
    found = linear(offset, CHANNEL)
    if found is None or found[0] != 1:
        return 1
    for count in (4, 2):
        aligned = region.alignment(buffer.name) % (count * buffer.dtype.bytes) == 0
        if channels % count == 0 and dim_factor(found[1]) % count == 0 and aligned:
            return count
    return 1


def inverse(problem: Problem, total: Scalar) -> Scalar:
    """What the sums of a row are multiplied with."""
    found = s.binary("div", number(1), total)
    if problem.zero_rows:
        return s.select(total.equal(0), number(0), found)
    if known_le(1, problem.keys.rows):
        return found
    return s.select(s.index(problem.keys.rows).equal(s.const(0, I64)), number(0), found)
