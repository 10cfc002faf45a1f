"""Operators without a definition by elements: here stand their type rules, a schedule of a backend makes them."""

from __future__ import annotations

from collections.abc import Sequence

from ..dims import Dim, dim_min, product
from ..dtypes import I64, DType
from ..errors import ShapeError
from ..guards import assume_at_most, guard
from ..tensors import Tensor, assume_equal, assume_shape, normalize_axis, opaque_tensor
from .declare import Context, Registry, Static
from .movement import replaced

declare = Registry()


def indices_tensor(shape: Sequence[Dim], extent: Dim, *sources: Tensor) -> Tensor:
    """Indices into an axis of the given extent."""
    result = opaque_tensor(shape, I64, *sources)
    result.lower, result.upper = 0, extent - 1
    return result


@declare.op("TopK", static=("k",))
def top_k(x: Tensor, k: Static, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """The k greatest (or least) elements along an axis in order, the earlier one first among equals; their indices."""
    axis = normalize_axis(axis, x.rank)
    count, extent = k[0], x.shape[axis]
    if isinstance(count, int) and isinstance(extent, int) and not 0 <= count <= extent:
        raise ShapeError(f"{count} elements wanted of axis {axis} of extent {extent}")
    assume_at_most(count, extent, f"elements wanted of axis {axis}")
    shape = replaced(x.shape, {axis: count})
    return opaque_tensor(shape, x.dtype, x), indices_tensor(shape, extent, x)


@declare.op("NonZero")
def non_zero(x: Tensor, *, context: Context) -> Tensor:
    """The indices of all elements that are not zero, in row-major order: [rank, count]."""
    result = opaque_tensor((x.rank, context.fresh("count", x.size)), I64, x)
    result.lower = 0
    return result


@declare.op("Compress")
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None, context: Context) -> Tensor:
    """The slices along an axis, or the elements of the flattened tensor, where the condition holds."""
    if condition.rank != 1:
        raise ShapeError(f"a condition of rank {condition.rank} where a vector is wanted")
    along = None if axis is None else normalize_axis(axis, x.rank)
    extent = x.size if along is None else x.shape[along]
    assume_at_most(condition.shape[0], extent, "conditions and what they are of")
    limit = dim_min(condition.shape[0], extent)
    count = context.fresh("count", limit)
    return opaque_tensor((count,) if along is None else replaced(x.shape, {along: count}), x.dtype, x, condition)


@declare.op("Unique")
def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1, context: Context) -> tuple[Tensor, ...]:
    """The distinct elements (slices), where each occurs first, which one each element is, and how often it occurs."""
    along = None if axis is None else normalize_axis(axis, x.rank)
    extent = x.size if along is None else x.shape[along]
    count = context.fresh("count", extent)
    values = opaque_tensor((count,) if along is None else replaced(x.shape, {along: count}), x.dtype, x)
    first, inverse = indices_tensor((count,), extent, x), indices_tensor((extent,), count, x)
    return values, first, inverse, opaque_tensor((count,), I64, x)


@declare.op("NonMaxSuppression")
def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    max_output_boxes_per_class: Tensor | None = None,
    iou_threshold: Tensor | None = None,
    score_threshold: Tensor | None = None,
    *,
    center_point_box: int = 0,
    context: Context,
) -> Tensor:
    """[count, 3]: batch, class and box of the boxes kept, from boxes [batch, n, 4] and scores [batch, classes, n]."""
    assume_equal(boxes.shape[0], scores.shape[0], "batches of boxes and of scores")
    assume_equal(boxes.shape[1], scores.shape[2], "numbers of boxes and of their scores")
    present = [t for t in (max_output_boxes_per_class, iou_threshold, score_threshold) if t is not None]
    result = opaque_tensor((context.fresh("count", scores.size), 3), I64, boxes, scores, *present)
    result.lower = 0
    return result


@declare.op("ScatterElements")
def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """`x` with updates[i] put (or combined by `reduction`) where i has its position on the axis be indices[i]."""
    axis = normalize_axis(axis, x.rank)
    if indices.rank != x.rank or updates.rank != x.rank:
        raise ShapeError(f"indices of rank {indices.rank} and updates of rank {updates.rank} for rank {x.rank}")
    for position, (a, b) in enumerate(zip(indices.shape, updates.shape, strict=True)):
        assume_equal(a, b, f"axis {position} of indices and updates")
        if position != axis:
            assume_at_most(a, x.shape[position], f"axis {position} of the indices")
    guard(indices, x.shape[axis])
    return opaque_tensor(x.shape, x.dtype, x, indices, updates)


@declare.op("ScatterND")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """`x` with slices of `updates` put (or combined) at the index tuples in the last axis of `indices`."""
    depth = indices.shape[-1]
    if not isinstance(depth, int) or depth > x.rank:
        raise ShapeError(f"index tuples of {depth} into {x.rank} axes")
    wanted = (*indices.shape[:-1], *x.shape[depth:])
    if len(wanted) != updates.rank:
        raise ShapeError(f"updates of rank {updates.rank} where {len(wanted)} is wanted")
    for position, (a, b) in enumerate(zip(wanted, updates.shape, strict=True)):
        assume_equal(a, b, f"axis {position} of the updates")
    for column in range(depth):
        guard(indices, x.shape[column], column=column)
    return opaque_tensor(x.shape, x.dtype, x, indices, updates)


@declare.op("MaxUnpool", static=("output_shape",))
def max_unpool(
    x: Tensor,
    indices: Tensor,
    output_shape: Static | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Zeros but for the elements of `x`, put at the flat indices that MaxPool gave."""
    rank = len(kernel_shape)
    steps, padding = strides or (1,) * rank, pads or (0,) * (2 * rank)
    spatial = tuple(
        (x.shape[2 + a] - 1) * steps[a] - padding[a] - padding[rank + a] + kernel_shape[a] for a in range(rank)
    )
    for axis, (a, b) in enumerate(zip(x.shape, indices.shape, strict=True)):
        assume_equal(a, b, f"axis {axis} of the maxima and of their indices")
    guard(indices, product((*x.shape[:2], *spatial)), 0, "an image")
    if output_shape and len(output_shape) != x.rank:
        raise ShapeError(f"output_shape has {len(output_shape)} sizes for an input of rank {x.rank}")
    return opaque_tensor(output_shape or (*x.shape[:2], *spatial), x.dtype, x, indices)


@declare.op("Det")
def det(x: Tensor) -> Tensor:
    """The determinants of the matrices in the last two axes."""
    assume_equal(x.shape[-2], x.shape[-1], "rows and columns of the matrices")
    return opaque_tensor(x.shape[:-2], x.dtype, x)


def _recurrent(name: str, outputs: int) -> None:
    """Declares a recurrent layer: Y [steps, directions, batch, hidden] and the last states [directions, batch, hidden].

    x is [steps, batch, input], w [directions, gates*hidden, input], r [directions, gates*hidden, hidden]; with
    `layout` 1 the batch comes first. `result` is the type of the last states, where they may be wider than x.
    """

    @declare.op(name, products=("x", "w", "r"))
    def define(
        x: Tensor,
        w: Tensor,
        r: Tensor,
        b: Tensor | None = None,
        sequence_lens: Tensor | None = None,
        initial_h: Tensor | None = None,
        initial_c: Tensor | None = None,
        p: Tensor | None = None,
        *,
        activation_alpha: Sequence[float] | None = None,
        activation_beta: Sequence[float] | None = None,
        activations: Sequence[str] | None = None,
        clip: float | None = None,
        direction: str = "forward",
        hidden_size: int | None = None,
        input_forget: int = 0,
        layout: int = 0,
        linear_before_reset: int = 0,
        result: DType | None = None,
    ) -> tuple[Tensor, ...]:
        directions = 2 if direction == "bidirectional" else 1
        assume_equal(w.shape[0], directions, f"directions of the weights, where {direction!r} is wanted,")
        assume_equal(w.shape[2], x.shape[2], "columns of the weights and of the input")
        hidden = r.shape[2] if hidden_size is None else assume_equal(hidden_size, r.shape[2], "hidden sizes")
        (batch, steps) = x.shape[:2] if layout else (x.shape[1], x.shape[0])
        gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[name]
        first = (batch, directions, hidden) if layout else (directions, batch, hidden)
        assume_shape(w, (directions, gates * hidden, x.shape[2]), "the weights")
        assume_shape(r, (directions, gates * hidden, hidden), "the recurrent weights")
        assume_shape(b, (directions, 2 * gates * hidden), "the biases")
        assume_shape(sequence_lens, (batch,), "the lengths of sequences")
        assume_shape(initial_h, first, "the initial state")
        assume_shape(initial_c, first, "the initial cell state")
        assume_shape(p, (directions, 3 * hidden), "the peepholes")
        every = (batch, steps, directions, hidden) if layout else (steps, directions, batch, hidden)
        last = (batch, directions, hidden) if layout else (directions, batch, hidden)
        sources = [t for t in (x, w, r, b, sequence_lens, initial_h, initial_c, p) if t is not None]
        states = [opaque_tensor(last, result or x.dtype, *sources) for _ in range(outputs - 1)]
        return opaque_tensor(every, x.dtype, *sources), *states


@declare.op("com.microsoft.DynamicQuantizeLSTM")
def dynamic_quantize_lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    w_scale: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    r_scale: Tensor | None = None,
    r_zero_point: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
) -> tuple[Tensor, ...]:
    """An LSTM with integer weights, transposed: w [directions, input, 4*hidden]; a scale and a zero point for each
    direction or column. Inputs and states stay floats here; ONNX Runtime rounds them to 8 bits."""
    directions = 2 if direction == "bidirectional" else 1
    assume_equal(w.shape[1], x.shape[2], "rows of the weights and columns of the input")
    hidden = r.shape[1] if hidden_size is None else assume_equal(hidden_size, r.shape[1], "hidden sizes")
    steps, batch = x.shape[:2]
    assume_shape(w, (directions, x.shape[2], 4 * hidden), "the weights")
    assume_shape(r, (directions, hidden, 4 * hidden), "the recurrent weights")
    assume_shape(b, (directions, 8 * hidden), "the biases")
    assume_shape(sequence_lens, (batch,), "the lengths of sequences")
    assume_shape(initial_h, (directions, batch, hidden), "the initial state")
    assume_shape(initial_c, (directions, batch, hidden), "the initial cell state")
    assume_shape(p, (directions, 3 * hidden), "the peepholes")
    given = (x, w, r, b, sequence_lens, initial_h, initial_c, p, w_scale, w_zero_point, r_scale, r_zero_point)
    sources = [t for t in given if t is not None]
    every, last = (steps, directions, batch, hidden), (directions, batch, hidden)
    return tuple(opaque_tensor(shape, x.dtype, *sources) for shape in (every, last, last))


_recurrent("RNN", 2)
_recurrent("GRU", 2)
_recurrent("LSTM", 3)
