"""Operators that combine all elements along some axes, scans along one, and the softmax family."""

from __future__ import annotations

from collections.abc import Callable

from ..dims import Dim, product
from ..dtypes import BOOL, F32, F64, I64, DType
from ..errors import UnsupportedError
from ..functions import absolute, cast, exp, isnan, log, sqrt, where
from ..scalars import Scalar, binary, const, index
from ..tensors import (
    Indices,
    Tensor,
    compute,
    normalize_axes,
    normalize_axis,
    reduce_axes,
    reduce_tensor,
    view,
)
from .declare import Registry, Static
from .movement import replaced

declare = Registry()


def accumulator(dtype: DType) -> DType:
    """The type in which sums of `dtype` are formed: f32 for narrower floats, else the type itself."""
    return F32 if dtype.is_float and dtype.bits < 32 else dtype


def blending_type(dtype: DType) -> DType:
    """The type in which elements are weighed and summed: integers as floats, f64 where f32 does not hold them."""
    return accumulator(dtype) if not (dtype.is_integer or dtype == BOOL) else F64 if dtype.bits > 16 else F32


def widened(x: Tensor) -> Tensor:
    """`x` in the type in which sums of its elements are formed."""
    return x if accumulator(x.dtype) == x.dtype else cast(x, accumulator(x.dtype))


def reduce_sum(x: Tensor, axes: tuple[int, ...], keepdims: bool = True) -> Tensor:
    return reduce_axes("add", x, axes, keepdims)


def reduce_max(x: Tensor, axes: tuple[int, ...], keepdims: bool = True) -> Tensor:
    return reduce_axes("or" if x.dtype == BOOL else "max", x, axes, keepdims)


def reduce_min(x: Tensor, axes: tuple[int, ...], keepdims: bool = True) -> Tensor:
    return reduce_axes("and" if x.dtype == BOOL else "min", x, axes, keepdims)


def reduce_mean(x: Tensor, axes: tuple[int, ...], keepdims: bool = True) -> Tensor:
    """The arithmetic mean; 0/0 over an empty range."""
    return divided(reduce_sum(x, axes, keepdims), product(x.shape[axis] for axis in axes))


def divided(x: Tensor, count: Dim) -> Tensor:
    """x / count, the count being a size."""
    divisor = const(count, x.dtype) if isinstance(count, int) else cast(index(count), x.dtype)
    return compute(x.shape, x.dtype, lambda *i: x.at(i) / divisor, x)


def log_sum_exp(x: Tensor, axes: tuple[int, ...], keepdims: bool = True) -> Tensor:
    """log(sum(exp(x))), without overflow."""
    top = reduce_max(x, axes)
    top = where(absolute(top) < float("inf"), top, 0)  # of infinities the sum alone tells
    total = log(reduce_sum(exp(x - top), axes)) + top
    return total if keepdims else dropped(total, axes)


def dropped(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """`x` without some axes of extent 1."""
    kept = [axis for axis in range(x.rank) if axis not in axes]
    zeros: Indices = (0,) * x.rank
    return view(x, [x.shape[a] for a in kept], lambda *i: replaced(zeros, dict(zip(kept, i, strict=True))))


def _reducer(name: str, function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> None:
    @declare.op(name, static=("axes",), precise=("result",))
    def define(x: Tensor, axes: Static | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        """Over the given axes; over all where none are given, unless `noop_with_empty_axes`."""
        chosen = normalize_axes(axes, x.rank) if axes or (noop_with_empty_axes and axes is not None) else None
        if chosen is None:
            chosen = () if noop_with_empty_axes else tuple(range(x.rank))
        return cast(function(widened(x), chosen, bool(keepdims)), x.dtype)


_reducer("ReduceSum", reduce_sum)
_reducer("ReduceMean", reduce_mean)
_reducer("ReduceMax", reduce_max)
_reducer("ReduceMin", reduce_min)
_reducer("ReduceProd", lambda x, axes, keepdims: reduce_axes("mul", x, axes, keepdims))
_reducer("ReduceSumSquare", lambda x, axes, keepdims: reduce_sum(x * x, axes, keepdims))
_reducer("ReduceL1", lambda x, axes, keepdims: reduce_sum(absolute(x), axes, keepdims))
_reducer("ReduceLogSum", lambda x, axes, keepdims: log(reduce_sum(x, axes, keepdims)))


def _root(x: Tensor) -> Tensor:
    return sqrt(x) if x.dtype.is_float else cast(sqrt(cast(x, F64 if x.dtype.bits > 16 else F32)), x.dtype)


_reducer("ReduceL2", lambda x, axes, keepdims: _root(reduce_sum(x * x, axes, keepdims)))


_reducer("ReduceLogSumExp", log_sum_exp)


def best_position(x: Tensor, best: Tensor, axis: int, last: bool = False) -> Tensor:
    """Where along `axis` `x` attains `best` (its extremum there, axis kept): the first place, or the last."""
    extent = x.shape[axis]

    def body(i: Indices, r: Indices) -> Scalar:
        value = x.at(replaced(i, {axis: r[0]}))
        here = value.equal(best.at(i))
        if x.dtype.is_float:
            here = here | isnan(value)  # an extremum that is no number is attained where there is none
        return where(here, index(r[0]), index(0 if last else extent))

    result = reduce_tensor("max" if last else "min", replaced(x.shape, {axis: 1}), I64, (extent,), body, x, best)
    result.lower, result.upper = 0, extent - 1
    return result


def _arg(name: str, extremum: Callable[[Tensor, tuple[int, ...]], Tensor]) -> None:
    @declare.op(name)
    def define(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        axis = normalize_axis(axis, x.rank)
        found = best_position(x, extremum(x, (axis,)), axis, bool(select_last_index))
        return found if keepdims else dropped(found, (axis,))


_arg("ArgMax", reduce_max)
_arg("ArgMin", reduce_min)


def _scan(name: str, combiner: str, identity: int) -> None:
    @declare.op(name, static=("axis",), alone=True)
    def define(x: Tensor, axis: Static, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
        """Element i combines the elements up to i (from i on where `reverse`), itself excluded where `exclusive`."""
        if not isinstance(axis[0], int):
            raise UnsupportedError(f"the axis {axis[0]} is known only at run time")
        along = normalize_axis(axis[0], x.rank)
        wide = widened(x)

        def body(i: Indices, r: Indices) -> Scalar:
            low, high = (i[along], r[0]) if reverse else (r[0], i[along])
            counts = binary("lt" if exclusive else "le", index(low), index(high))
            return where(counts, wide.at(replaced(i, {along: r[0]})), const(identity, wide.dtype))

        return cast(reduce_tensor(combiner, x.shape, wide.dtype, (x.shape[along],), body, wide), x.dtype)


_scan("CumSum", "add", 0)
_scan("CumProd", "mul", 1)


@declare.op("Softmax", precise=("x",))
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    axes = (normalize_axis(axis, x.rank),)
    e = exp(x - reduce_max(x, axes))
    return e / cast(reduce_sum(widened(e), axes), x.dtype)


@declare.op("LogSoftmax", precise=("x",))
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    axes = (normalize_axis(axis, x.rank),)
    shifted = x - reduce_max(x, axes)
    return shifted - cast(log(reduce_sum(widened(exp(shifted)), axes)), x.dtype)


@declare.op("Hardmax")
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """1 at the first greatest element along the axis, 0 elsewhere."""
    axis = normalize_axis(axis, x.rank)
    found = best_position(x, reduce_max(x, (axis,)), axis)

    def element(*i: Dim) -> Scalar:
        return cast(found.at(replaced(i, {axis: 0})).equal(index(i[axis])), x.dtype)

    return compute(x.shape, x.dtype, element, x, found)
