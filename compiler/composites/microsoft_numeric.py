"""Numeric operators of the domain com.microsoft (distances, windows, inverses), and what ONNX Runtime keeps of ONNX's
first, experimental operators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ir.dims import floordiv
from ...ir.dtypes import F32, I32
from ...ir.errors import UnsupportedError
from ...ir.graph import Value
from ..expand import Expansions, Nodes

declare = Expansions()
LARGEST_INVERSE = 32
"""Matrices up to this size are inverted, by one group of nodes a row."""


@declare("com.microsoft.CDist")
def distances(n: Nodes, a: Value, b: Value, *, metric: str = "sqeuclidean") -> Value:
    """Distances [M, K] between the rows of a [M, N] and of b [K, N]."""
    if metric not in ("euclidean", "sqeuclidean"):
        raise UnsupportedError(f"the metric {metric!r}; there are euclidean and sqeuclidean")
    (rows, width), columns = a.shape, b.shape[0]
    difference = n("Sub", n.reshape(a, rows, 1, width), n.reshape(b, 1, columns, width))
    squared = n("ReduceSumSquare", difference, n.dims(2), keepdims=0)
    return n("Sqrt", squared) if metric == "euclidean" else squared


@declare("com.microsoft.UnfoldTensor")
def unfold(n: Nodes, x: Value, *, size: int, dim: int = -1, step: int = 1) -> Value:
    """All windows of `size` elements along an axis, `step` apart; their elements are a new last axis."""
    rank = x.tensor.rank
    axis = dim % rank
    count = floordiv(x.shape[axis] - size, step) + 1
    starts = n("Mul", n.positions(count, count, 1), n.constant(np.int64(step)))
    windows = n("Gather", x, n("Add", starts, n.positions(size, 1, size)), axis=axis)
    rest = range(axis + 2, rank + 1)
    return n.transpose(windows, *range(axis + 1), *rest, axis + 1)


@declare("com.microsoft.MatMulInteger16")
def matmul_integer16(n: Nodes, a: Value, b: Value) -> Value:
    """a @ b in i32."""
    return n("MatMul", n.cast(a, I32), n.cast(b, I32))


@declare("com.microsoft.ReduceSumInteger")
def reduce_sum_integer(n: Nodes, data: Value, *, axes: Sequence[int], keepdims: int = 1) -> Value:
    """Sums of bytes in i32."""
    return n("ReduceSum", n.cast(data, I32), n.dims(*axes), keepdims=keepdims)


@declare("com.microsoft.BranchwiseRMSNorm")
def branchwise_rms_norm(
    n: Nodes, x: Value, scale: Value | None = None, *, num_branches: int = 0, epsilon: float = 1e-6
) -> Value:
    """RMSNormalization of each branch of [..., C, H] or of [..., C*H], in f32."""
    branches = num_branches or x.shape[-2]
    width = floordiv(x.shape[-1], num_branches) if num_branches else x.shape[-1]
    outer = x.shape[:-1] if num_branches else x.shape[:-2]
    groups = n.reshape(n.cast(x, F32), *outer, branches, width)
    mean = n("ReduceMean", n("Mul", groups, groups), n.dims(-1), keepdims=1)
    normal = n("Div", groups, n("Sqrt", n("Add", mean, epsilon)))
    if scale is not None:
        wide = n.cast(scale, F32)
        if scale.tensor.rank == 1 and scale.shape != (width,):
            wide = n.reshape(wide, branches, width)
        normal = n("Mul", normal, wide)
    return n.cast(n.reshape(normal, *x.shape), x.dtype)


@declare("com.microsoft.Inverse")
def inverse(n: Nodes, x: Value) -> Value:
    """The inverses of square matrices, by Gauss and Jordan's elimination with partial pivoting, in f32 at least."""
    size = x.shape[-1]
    if not isinstance(size, int) or size > LARGEST_INVERSE:
        raise UnsupportedError(f"matrices {x.type}: their size must be known, and {LARGEST_INVERSE} at most")
    wide = n.cast(x, F32) if x.dtype.bits < 32 else x
    unit = n.expand(n.constant(np.eye(size).astype(wide.dtype.numpy)), *x.shape)
    rank = x.tensor.rank
    matrix = n.concat([wide, unit], rank - 1)
    rows = np.arange(size).reshape(size, 1)
    for step in range(size):
        column = n.slice(matrix, rank - 1, step, step + 1)
        left = n("Where", n.constant(rows >= step), n("Abs", column), n.like(-1, wide))
        pivot = n("Equal", n.constant(rows.astype(np.int64)), n("ArgMax", left, axis=rank - 2, keepdims=1))
        zero = n.like(0, wide)
        chosen = n("ReduceSum", n("Where", pivot, matrix, zero), n.dims(rank - 2), keepdims=1)
        current = n.slice(matrix, rank - 2, step, step + 1)
        exchanged = n("Where", pivot, current, matrix)
        scaled = n("Div", chosen, n.slice(chosen, rank - 1, step, step + 1))
        here = n.constant(rows == step)
        factors = n("Where", here, zero, n.slice(exchanged, rank - 1, step, step + 1))
        matrix = n("Where", here, scaled, n("Sub", exchanged, n("Mul", factors, scaled)))
    return n.cast(n.slice(matrix, rank - 1, size, 2 * size), x.dtype)


# In ONNX's own domain, from before ONNX had versions; tiny YOLO and models of Core ML hold them.


@declare("Affine")
def affine(n: Nodes, x: Value, *, alpha: float = 1.0, beta: float = 0.0) -> Value:
    return n("Add", n("Mul", x, alpha), beta)


@declare("Scale")
def scaled(n: Nodes, x: Value, *, scale: float = 1.0) -> Value:
    return n("Mul", x, scale)


@declare("ScaledTanh")
def scaled_tanh(n: Nodes, x: Value, *, alpha: float = 0.0, beta: float = 0.0) -> Value:
    return n("Mul", n("Tanh", n("Mul", x, beta)), alpha)


@declare("ParametricSoftplus")
def parametric_softplus(n: Nodes, x: Value, *, alpha: float = 0.0, beta: float = 0.0) -> Value:
    return n("Mul", n("Softplus", n("Mul", x, beta)), alpha)


@declare("ImageScaler")
def image_scaler(n: Nodes, x: Value, *, scale: float = 1.0, bias: Sequence[float] = ()) -> Value:
    """scale * x + bias of an image [N, C, H, W], a bias for each channel."""
    channels = n.constant(np.array(bias).reshape(-1, 1, 1).astype(x.dtype.numpy))
    return n("Add", n("Mul", x, scale), channels)


@declare("MemcpyFromHost", "MemcpyToHost")
def copied(n: Nodes, x: Value) -> Value:
    """The same value in another memory: models that were optimized for GPUs hold such nodes."""
    return x
