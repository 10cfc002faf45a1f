"""What attention of the domain com.microsoft needs beyond ONNX's operators: a cache of keys or values."""

from __future__ import annotations

from ..dims import Dim, dim_max
from ..dtypes import BOOL, I64
from ..functions import cast, maximum, where
from ..guards import guard
from ..scalars import Scalar, as_dim, binary, const, index
from ..tensors import Tensor, compute, inside
from .declare import Registry, Static

declare = Registry()


@declare.op("onnxc.AppendToCache", static=("total",))
def append_to_cache(past: Tensor, new: Tensor, starts: Tensor, total: Static) -> Tensor:
    """The cache [B, N, P, H] with new rows [B, N, S, H] from row starts[b] on.

    The result has `total` rows where those are more than P; rows that nothing defines are zero.
    """
    batch, heads, rows, width = past.shape
    length = new.shape[2]
    extent = dim_max(rows, total[0])
    guard(starts, extent - length + 1, 0, "a cache")

    def element(b: Dim, head: Dim, row: Dim, channel: Dim) -> Scalar:
        place = row - as_dim(maximum(starts.at((b,)), 0), 0)
        kept = where(inside(row, rows), past.at((b, head, row, channel)), const(0, past.dtype))
        return where(inside(place, length), new.at((b, head, place, channel)), kept)

    return compute((batch, heads, extent, width), past.dtype, element, past, new, starts)


@declare.op("onnxc.VisibleKeys")
def visible_keys(query: Tensor, key: Tensor, starts: Tensor, ends: Tensor | None = None, *, window: int = 0) -> Tensor:
    """Which keys [B, N, T, H] queries [B, N, S, H] may see: [B, 1, S, T].

    Query s of batch entry b sees the keys up to starts[b] + s, with a window only that many; with `ends` all before
    ends[b].
    """

    def element(b: Dim, _: Dim, row: Dim, column: Dim) -> Scalar:
        if ends is not None:
            return binary("lt", index(column), cast(ends.at((b,)), I64))
        last = cast(starts.at((b,)), I64) + index(row)
        seen = binary("le", index(column), last)
        return binary("and", seen, binary("lt", last - window, index(column))) if window > 0 else seen

    sources = (query, key, starts) if ends is None else (query, key, starts, ends)
    return compute((query.shape[0], 1, query.shape[2], key.shape[2]), BOOL, element, *sources)
