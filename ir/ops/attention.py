"""Attention as one operator of the compiler's own, so that a schedule can make it without storing the scores."""

from __future__ import annotations

from ..dims import Dim
from ..dtypes import DType
from ..functions import cast, isnan, where
from ..scalars import Scalar, index, select
from ..tensors import Tensor, compute
from .contraction import matrix_product
from .declare import Context, Registry, Static
from .reduction import softmax

declare = Registry()

NAN, ZERO = "nan", "zero"
"""What rows give in which every score is -inf: NaN, as Softmax has it, or 0."""


@declare.op("onnxc.Attention", heavy=True, products=("query", "key", "value"))
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *others: Tensor,
    empty_rows: str = NAN,
    result: DType | None = None,
    context: Context,
) -> Tensor:
    """Softmax(scores(query @ key)) @ value, the softmax over the keys.

    query [*batch, queries, width], key [*batch, width, keys], value [*batch, keys, channels]; batch axes broadcast. The
    region `scores` maps the products [*batch, queries, keys] to scores of the same shape, each element by itself and by
    its place: it scales, adds biases, masks. What it reads from outside are the `others`. The weights are converted to
    the type of the result.
    """
    (scores,) = context.compose("scores", cast(matrix_product(query, key), result or query.dtype))
    weights = cast(softmax(scores), result or value.dtype)
    if empty_rows == ZERO:
        weights = where(isnan(weights), 0, weights)
    return cast(matrix_product(weights, value), result or value.dtype)


@declare.op("onnxc.Append", static=("start",), alone=True)
def append(past: Tensor, new: Tensor, start: Static, *, axis: int) -> Tensor:
    """`past` with `new` in the place of its elements from `start` on along an axis.

    Where the result is a model's output whose memory is that of `past` (`passes.append`), only `new` is written.
    """

    def at(*indices: Dim) -> Scalar:
        place = indices[axis] - start[0]
        inside = (index(0) <= index(place)) & (index(place) < index(new.shape[axis]))
        moved = (*indices[:axis], place, *indices[axis + 1 :])
        return select(inside, new.at(moved), past.at(indices))

    return compute(past.shape, past.dtype, at, past, new)
