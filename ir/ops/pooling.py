"""Pooling: windows, or whole images, combined to one element."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..dims import Dim, product
from ..dtypes import I64
from ..functions import absolute, cast, isnan, power, where
from ..scalars import IDENTITY, Scalar, as_dim, const, index
from ..tensors import Indices, Tensor, compute, flat_offset, reduce_tensor, unflatten
from .declare import Context, Registry
from .reduction import reduce_max, reduce_mean, reduce_sum, widened
from .windows import Windows, sliding

declare = Registry()


def pooled(op: str, x: Tensor, windows: Windows, transform: Callable[[Scalar], Scalar] = lambda value: value) -> Tensor:
    """transform(x) combined over each window; positions outside the input do not count."""
    identity = const(IDENTITY[op](x.dtype), x.dtype)

    def body(i: Indices, r: Indices) -> Scalar:
        positions = windows.positions(i[2:], r)
        return where(windows.within(positions), transform(x.at((*i[:2], *positions))), identity)

    return reduce_tensor(op, (*x.shape[:2], *windows.output), x.dtype, windows.reach, body, x)


@declare.op("MaxPool", spatial=True)
def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    context: Context,
) -> tuple[Tensor, ...]:
    """The maximum of each window of x [N, C, *spatial], and where in `x` it lies as a flat index."""
    windows = sliding(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, bool(ceil_mode))
    best = pooled("max", x, windows)
    if not context.wanted(1):
        return (best,)
    spatial = x.shape[2:]

    def body(i: Indices, r: Indices) -> Scalar:
        positions = windows.positions(i[2:], r)
        value = x.at((*i[:2], *positions))
        here = value.equal(best.at(i)) | isnan(value) if x.dtype.is_float else value.equal(best.at(i))
        nowhere = index(product(spatial))
        return where(windows.within(positions), where(here, index(flat_offset(positions, spatial)), nowhere), nowhere)

    first = reduce_tensor("min", best.shape, I64, windows.reach, body, x, best)

    def element(*i: Dim) -> Scalar:
        within = as_dim(first.at(i), 0, product(spatial))
        if storage_order:
            within = flat_offset(tuple(reversed(unflatten(within, spatial))), tuple(reversed(spatial)))
        return index(flat_offset(i[:2], x.shape[:2]) * product(spatial) + within)

    return best, compute(best.shape, I64, element, first)


@declare.op("AveragePool", spatial=True)
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The mean of each window; elements of the padding count as zeros where `count_include_pad`."""
    windows = sliding(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, bool(ceil_mode))
    total = pooled("add", widened(x), windows)

    def element(*i: Dim) -> Scalar:
        counts = windows.counts(i[2:], bool(count_include_pad))
        divisor = const(math.prod(count for count in counts if isinstance(count, int)), total.dtype)
        for count in counts:
            divisor = divisor if isinstance(count, int) else divisor * cast(index(count), total.dtype)
        return total.at(i) / divisor

    return cast(compute(total.shape, total.dtype, element, total), x.dtype)


def _root(total: Tensor, p: int) -> Tensor:
    return total if p == 1 else power(total, 1 / p)


def _raised(value: Scalar, p: int) -> Scalar:
    size = absolute(value)
    return size if p == 1 else size * size if p == 2 else power(size, p)


@declare.op("LpPool", spatial=True)
def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The p-norm of each window."""
    windows = sliding(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, bool(ceil_mode))
    return cast(_root(pooled("add", widened(x), windows, lambda value: _raised(value, p)), p), x.dtype)


@declare.op("GlobalAveragePool", spatial=True)
def global_average_pool(x: Tensor) -> Tensor:
    return cast(reduce_mean(widened(x), tuple(range(2, x.rank))), x.dtype)


@declare.op("GlobalMaxPool", spatial=True)
def global_max_pool(x: Tensor) -> Tensor:
    return reduce_max(x, tuple(range(2, x.rank)))


@declare.op("GlobalLpPool", spatial=True)
def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    wide = widened(x)
    raised = compute(x.shape, wide.dtype, lambda *i: _raised(wide.at(i), p), wide)
    return cast(_root(reduce_sum(raised, tuple(range(2, x.rank))), p), x.dtype)
