"""Operators that shift and scale by statistics, which are formed in f32 at least."""

from __future__ import annotations

from collections.abc import Sequence

from ..dims import Dim, floordiv, product
from ..dtypes import F32, DType
from ..errors import ShapeError
from ..functions import absolute, cast, power, sqrt, where
from ..scalars import Scalar, const
from ..tensors import (
    Indices,
    Tensor,
    assume_equal,
    compute,
    inside,
    normalize_axes,
    normalize_axis,
    reduce_tensor,
)
from .contraction import per_channel
from .declare import Context, Registry
from .movement import replaced
from .reduction import divided, reduce_mean, reduce_sum, widened

declare = Registry()


@declare.op("BatchNormalization", spatial=True)
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    context: Context,
) -> tuple[Tensor, ...]:
    """scale * (x - mean) / sqrt(variance + epsilon) + bias, per channel of x [N, C, *spatial].

    In training mode the statistics are those of `x`, and running ones, mixed by `momentum`, are two more outputs.
    """
    if x.rank > 1:
        for name, vector in (("scale", scale), ("bias", bias), ("mean", mean), ("variance", variance)):
            assume_equal(vector.shape[0], x.shape[1], f"the length of {name} and the channels")
    wide = widened(x)

    def channelwise(vector: Tensor) -> Tensor:
        return cast(per_channel(vector, max(x.rank, 2)) if x.rank > 1 else vector, wide.dtype)

    if not training_mode:
        factor = channelwise(scale) / sqrt(channelwise(variance) + epsilon)
        return (cast((wide - channelwise(mean)) * factor + channelwise(bias), x.dtype),)
    axes = tuple(axis for axis in range(x.rank) if axis != 1)
    current = reduce_mean(wide, axes, keepdims=False)
    centred = wide - per_channel(current, x.rank)
    spread = reduce_mean(centred * centred, axes, keepdims=False)
    factor = channelwise(scale) / sqrt(per_channel(spread, x.rank) + epsilon)
    running = [
        cast(cast(old, wide.dtype) * momentum + new * (1 - momentum), old.dtype)
        for old, new in ((mean, current), (variance, spread))
    ]
    return cast(centred * factor + channelwise(bias), x.dtype), *running


@declare.op("LayerNormalization")
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: DType = F32,
) -> tuple[Tensor, ...]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the axes from `axis` on; also mean and 1/sqrt(...)."""
    axes = tuple(range(normalize_axis(axis, x.rank), x.rank))
    wide = cast(x, stash_type)
    mean = reduce_mean(wide, axes)
    centred = wide - mean
    inverse = 1.0 / sqrt(reduce_mean(centred * centred, axes) + epsilon)
    y = cast(centred * inverse, x.dtype) * scale
    return (y if bias is None else y + bias), mean, inverse


@declare.op("RMSNormalization")
def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: DType = F32
) -> Tensor:
    """x / sqrt(mean of x^2 + epsilon) * scale over all axes from `axis` on."""
    axes = tuple(range(normalize_axis(axis, x.rank), x.rank))
    wide = cast(x, stash_type)
    normal = wide * (1.0 / sqrt(reduce_mean(wide * wide, axes) + epsilon))
    return cast(normal, scale.dtype) * scale


@declare.op("com.microsoft.SkipLayerNormalization")
def skip_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    context: Context,
) -> tuple[Tensor, ...]:
    """Layer normalization of x + skip + bias over the last axis; that sum is the fourth output."""
    total = x + skip if bias is None else x + skip + bias
    return *layer_normalization(total, gamma, beta, epsilon=epsilon), total


def group_statistics(x: Tensor, groups: Dim, epsilon: float) -> tuple[Tensor, Tensor]:
    """(mean, 1 / sqrt(variance + epsilon)) of x [N, C, *spatial] over each run of C/groups channels: [N, groups]."""
    size = floordiv(x.shape[1], groups)
    assume_equal(x.shape[1], size * groups, f"the channels in {groups} groups")
    extents = (size, *x.shape[2:])

    def source(i: Indices, r: Indices) -> Indices:
        return (i[0], i[1] * size + r[0], *r[1:])

    shape = (x.shape[0], groups)
    mean = divided(reduce_tensor("add", shape, x.dtype, extents, lambda i, r: x.at(source(i, r)), x), product(extents))

    def squared(i: Indices, r: Indices) -> Scalar:
        difference = x.at(source(i, r)) - mean.at(i)
        return difference * difference

    variance = divided(reduce_tensor("add", shape, x.dtype, extents, squared, x, mean), product(extents))
    return mean, 1.0 / sqrt(variance + epsilon)


@declare.op("GroupNormalization", spatial=True)
def group_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: DType = F32,
) -> Tensor:
    """x [N, C, *spatial] normalised over runs of C/num_groups channels; scale and bias have one entry per channel."""
    return _normalise_groups(cast(x, stash_type), num_groups, epsilon, scale, bias, x.dtype)


@declare.op("InstanceNormalization", spatial=True)
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """x [N, C, *spatial] normalised per image and channel."""
    return _normalise_groups(widened(x), x.shape[1], epsilon, scale, bias, x.dtype)


def _normalise_groups(x: Tensor, groups: Dim, epsilon: float, scale: Tensor, bias: Tensor, dtype: DType) -> Tensor:
    mean, inverse = group_statistics(x, groups, epsilon)
    size = floordiv(x.shape[1], groups)

    def element(n: Dim, c: Dim, *rest: Dim) -> Scalar:
        group = floordiv(c, size)
        return (x.at((n, c, *rest)) - mean.at((n, group))) * inverse.at((n, group))

    normal = cast(compute(x.shape, x.dtype, element, x, mean, inverse), dtype)
    return normal * per_channel(scale, x.rank) + per_channel(bias, x.rank)


@declare.op("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """x divided by its 1- or 2-norm along an axis; zero where that is zero."""
    axes = (normalize_axis(axis, x.rank),)
    wide = widened(x)
    norm = reduce_sum(absolute(wide), axes) if p == 1 else sqrt(reduce_sum(wide * wide, axes))
    return cast(where(norm.equal(0), 0, wide / norm), x.dtype)


@declare.op("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    chosen = normalize_axes(axes, x.rank)
    wide = widened(x)
    centred = wide - reduce_mean(wide, chosen)
    return cast(centred / (sqrt(reduce_mean(centred * centred, chosen)) + 1e-9), x.dtype)


@declare.op("LRN", spatial=True)
def local_response_normalization(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """x / (bias + alpha/size * sum of x^2 over `size` channels around)^beta."""
    wide = widened(x)
    if size < 1:
        raise ShapeError(f"a window of {size} channels")
    # What lies outside for every channel adds nothing.
    most = x.shape[1] if isinstance(x.shape[1], int) else size
    before, after = min((size - 1) // 2, most), min(size // 2, most)

    def squared(i: Indices, r: Indices) -> Scalar:
        channel = i[1] + r[0] - before
        value = wide.at(replaced(i, {1: channel}))
        return where(inside(channel, x.shape[1]), value * value, const(0, wide.dtype))

    around = reduce_tensor("add", x.shape, wide.dtype, (before + after + 1,), squared, wide)
    return cast(wide / power(around * (alpha / size) + bias, beta), x.dtype)
