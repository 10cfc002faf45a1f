"""Operators whose operands say where to read: gathers, one-hot vectors, sequences turned round."""

from __future__ import annotations

from ..dims import Dim, modulo
from ..dtypes import I64
from ..errors import ShapeError
from ..functions import cast, maximum, minimum, where
from ..guards import assume_at_most, guard
from ..scalars import Scalar, as_dim, index
from ..tensors import Tensor, assume_equal, assume_shape, compute, inside, normalize_axis, position_of
from .declare import Registry, Static
from .movement import replaced

declare = Registry()


@declare.op("Gather", movement=True)
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Slices of `x` along an axis, one for each element of `indices`."""
    axis = normalize_axis(axis, x.rank)
    guard(indices, x.shape[axis])
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])

    def element(*i: Dim) -> Scalar:
        chosen = position_of(indices, i[axis : axis + indices.rank], x.shape[axis])
        return x.at((*i[:axis], chosen, *i[axis + indices.rank :]))

    result = compute(shape, x.dtype, element, x, indices)
    result.lower, result.upper = x.lower, x.upper
    return result


@declare.op("GatherElements", movement=True)
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Element i is `x` at i with its position along the axis replaced by indices[i]."""
    axis = normalize_axis(axis, x.rank)
    if indices.rank != x.rank:
        raise ShapeError(f"indices of rank {indices.rank} for an operand of rank {x.rank}")
    for position in range(x.rank):
        if position != axis:
            assume_at_most(indices.shape[position], x.shape[position], f"axis {position} of the indices")
    guard(indices, x.shape[axis])

    def element(*i: Dim) -> Scalar:
        return x.at(replaced(i, {axis: position_of(indices, i, x.shape[axis])}))

    return compute(indices.shape, x.dtype, element, x, indices)


@declare.op("GatherND", movement=True)
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Slices of `x` at the index tuples that the last axis of `indices` holds; leading axes run in step."""
    depth = indices.shape[-1]
    if not isinstance(depth, int):
        raise ShapeError(f"index tuples of unknown length {depth}")
    if depth + batch_dims > x.rank:
        raise ShapeError(f"index tuples of {depth} into the last {x.rank - batch_dims} axes")
    for axis in range(batch_dims):
        assume_equal(x.shape[axis], indices.shape[axis], f"batch axis {axis} of operand and indices")
    outer = indices.rank - 1
    for k in range(depth):
        guard(indices, x.shape[batch_dims + k], column=k)

    def element(*i: Dim) -> Scalar:
        chosen = [position_of(indices, (*i[:outer], k), x.shape[batch_dims + k]) for k in range(depth)]
        return x.at((*i[:batch_dims], *chosen, *i[outer:]))

    shape = (*indices.shape[:-1], *x.shape[batch_dims + depth :])
    return compute(shape, x.dtype, element, x, indices)


@declare.op("OneHot", static=("depth",))
def one_hot(indices: Tensor, depth: Static, values: Tensor, *, axis: int = -1) -> Tensor:
    """values[1] where the position along a new axis is the index (negative: from the end), else values[0]."""
    axis = normalize_axis(axis, indices.rank + 1)
    extent = int(depth[0]) if isinstance(depth[0], float) else depth[0]

    def element(*i: Dim) -> Scalar:
        wanted = cast(indices.at((*i[:axis], *i[axis + 1 :])), I64)
        if indices.lower is None or indices.lower < 0:
            wanted = where(wanted < 0, wanted + index(extent), wanted)
        return where(wanted.equal(index(i[axis])), values.at((1,)), values.at((0,)))

    shape = (*indices.shape[:axis], extent, *indices.shape[axis:])
    return compute(shape, values.dtype, element, indices, values)


@declare.op("ReverseSequence", movement=True)
def reverse_sequence(x: Tensor, sequence_lens: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first sequence_lens[b] elements along the time axis in reverse order, for each batch entry b."""
    if {batch_axis, time_axis} != {0, 1}:
        raise ShapeError(f"batch_axis {batch_axis} and time_axis {time_axis} must be 0 and 1")
    assume_shape(sequence_lens, (x.shape[batch_axis],), "the lengths of sequences")
    last = x.shape[time_axis] - 1
    guard(sequence_lens, last + 2, 0, "sequences")

    def element(*i: Dim) -> Scalar:
        time = index(i[time_axis])
        length = cast(sequence_lens.at((i[batch_axis],)), I64)
        source = where(time < length, minimum(length - 1 - time, index(last)), time)
        return x.at(replaced(i, {time_axis: as_dim(source, 0, last)}))

    return compute(x.shape, x.dtype, element, x, sequence_lens)


@declare.op("TensorScatter")
def tensor_scatter(
    past_cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """The cache with `update` written along the axis from write_indices[batch] on, round its end where "circular"."""
    along = normalize_axis(axis, past_cache.rank)
    extent, length = past_cache.shape[along], update.shape[along]
    assume_shape(update, replaced(past_cache.shape, {along: length}), "the update")
    assume_shape(write_indices, past_cache.shape[:1], "the write indices")
    if write_indices is not None:
        guard(write_indices, 1 << 30 if mode == "circular" else extent - length + 1, 0, "a cache")

    def element(*i: Dim) -> Scalar:
        start: Dim = 0 if write_indices is None else as_dim(maximum(cast(write_indices.at((i[0],)), I64), 0), 0)
        place = i[along] - start
        place = modulo(place, extent) if mode == "circular" else place
        return where(inside(place, length), update.at(replaced(i, {along: place})), past_cache.at(i))

    sources = (past_cache, update) if write_indices is None else (past_cache, update, write_indices)
    return compute(past_cache.shape, past_cache.dtype, element, *sources)
