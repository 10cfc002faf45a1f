"""What attention of the domain com.microsoft needs beyond ONNX's operators: a cache of keys or values."""

from __future__ import annotations

from ..dims import Dim, dim_max
from ..functions import where
from ..scalars import Scalar, as_dim, const
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

    def element(b: Dim, head: Dim, row: Dim, channel: Dim) -> Scalar:
        place = row - as_dim(starts.at((b,)), 0, extent)
        kept = where(inside(row, rows), past.at((b, head, row, channel)), const(0, past.dtype))
        return where(inside(place, length), new.at((b, head, place, channel)), kept)

    return compute((batch, heads, extent, width), past.dtype, element, past, new, starts)
