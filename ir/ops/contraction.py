"""Matrix products, convolutions and their relatives: sums of products over some axes."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

from ..dims import Dim, ceildiv, dim_max, floordiv, known_le, modulo
from ..dtypes import DType
from ..errors import ShapeError
from ..functions import cast, where
from ..scalars import Scalar, binary, const, index
from ..scalars import cast as cast_scalar
from ..tensors import (
    Indices,
    Tensor,
    all_of,
    assume_equal,
    broadcast_shapes,
    inside,
    reduce_tensor,
    view,
)
from .declare import Registry
from .reduction import accumulator
from .windows import Windows, per_axis, sliding

declare = Registry()


def matrix_product(a: Tensor, b: Tensor, read: Callable[[Scalar, Scalar], Scalar] | None = None) -> Tensor:
    """a @ b by numpy's rules (vectors, broadcast batch axes), summed in the accumulator's type.

    `read` makes a product of two elements; by default they are widened and multiplied.
    """
    if a.rank == 0 or b.rank == 0:
        raise ShapeError("a matrix product needs operands of rank 1 at least")
    left = a if a.rank > 1 else view(a, (1, *a.shape), lambda _, k: (k,))
    right = b if b.rank > 1 else view(b, (*b.shape, 1), lambda k, _: (k,))
    depth = assume_equal(left.shape[-1], right.shape[-2], "the inner dimensions of the product")
    batch = broadcast_shapes(left.shape[:-2], right.shape[:-2])
    rows = left.shape[-2:-1] if a.rank > 1 else ()
    columns = right.shape[-1:] if b.rank > 1 else ()
    multiply = read or widened_product(accumulator(a.dtype))

    def body(i: Indices, r: Indices) -> Scalar:
        outer = i[: len(batch)]
        row = i[len(batch)] if rows else 0
        column = i[-1] if columns else 0
        return multiply(
            left.at((*batch_index(outer, left), row, *r)), right.at((*batch_index(outer, right), *r, column))
        )

    dtype = multiply(left.at((0,) * left.rank), right.at((0,) * right.rank)).dtype
    return reduce_tensor("add", (*batch, *rows, *columns), dtype, (depth,), body, a, b)


def batch_index(outer: Indices, x: Tensor) -> Indices:
    """The batch index of `x`, its last two axes left out, for a batch index of the result."""
    own = x.shape[:-2]
    return tuple(0 if known_le(extent, 1) else i for i, extent in zip(outer[len(outer) - len(own) :], own, strict=True))


def widened_product(dtype: DType) -> Callable[[Scalar, Scalar], Scalar]:
    """The product of two elements in the type that sums have."""
    return lambda a, b: binary("mul", cast_scalar(a, dtype), cast_scalar(b, dtype))


@declare.op("MatMul", heavy=True, products=("a", "b"))
def matmul(a: Tensor, b: Tensor, *, result: DType | None = None) -> Tensor:
    return cast(matrix_product(a, b), result or a.dtype)


def transposed(x: Tensor) -> Tensor:
    """The last two axes exchanged."""
    return view(x, (*x.shape[:-2], x.shape[-1], x.shape[-2]), lambda *i: (*i[:-2], i[-1], i[-2]))


@declare.op("Gemm", heavy=True, products=("a", "b"))
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    result: DType | None = None,
) -> Tensor:
    """alpha * a @ b + beta * c."""
    if a.rank != 2 or b.rank != 2:
        raise ShapeError(f"operands of rank {a.rank} and {b.rank} where matrices are wanted")
    total = matrix_product(transposed(a) if transA else a, transposed(b) if transB else b) * alpha
    if c is not None:
        text = f"the addend {c.shape} does not broadcast to the product's {total.shape}"
        if c.rank > total.rank:
            raise ShapeError(text)
        for own, wanted in zip(c.shape[::-1], total.shape[::-1], strict=False):
            if own != 1:
                assume_equal(own, wanted, text)
        total = total + cast(c, total.dtype) * beta
    return cast(total, result or a.dtype)


@declare.op("com.microsoft.FusedMatMul", heavy=True, products=("a", "b"))
def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
    result: DType | None = None,
) -> Tensor:
    """alpha * a @ b with transposed operands; a transposed batch has its first axis right before the last one."""

    def arranged(x: Tensor, trans: int, batch: int) -> Tensor:
        if batch:
            x = view(x, (*x.shape[1:-1], x.shape[0], x.shape[-1]), lambda *i: (i[-2], *i[:-2], i[-1]))
        return transposed(x) if trans and x.rank > 1 else x

    total = matrix_product(arranged(a, transA, transBatchA), arranged(b, transB, transBatchB))
    return cast(total * alpha, result or a.dtype)


def convolution(
    x: Tensor, w: Tensor, windows: Windows, group: int, multiply: Callable[[Scalar, Scalar], Scalar], fill: int = 0
) -> Tensor:
    """Sums over the channels of a group and the kernel: x [N, C, *spatial], w [M, C/group, *kernel].

    Positions in the padding give no product, as if `x` were zero there.
    """
    channels = w.shape[1]
    assume_equal(x.shape[1], channels * group, f"channels of the input and of {group} groups of the kernel")
    filters = floordiv(w.shape[0], group)
    assume_equal(w.shape[0], filters * group, f"the filters in {group} groups")

    def body(i: Indices, r: Indices) -> Scalar:
        image, m, *o = i
        c, *k = r
        positions = windows.positions(o, k)
        first = 0 if group == 1 else floordiv(m, filters) * channels
        value = multiply(x.at((image, first + c, *positions)), w.at((m, c, *k)))
        return where(windows.within(positions), value, const(0, value.dtype))

    probe = multiply(x.at((0,) * x.rank), w.at((0,) * w.rank))
    shape = (x.shape[0], w.shape[0], *windows.output)
    return reduce_tensor("add", shape, probe.dtype, (channels, *windows.kernel), body, x, w)


def kernel_extents(x: Tensor, w: Tensor, kernel_shape: Sequence[int] | None) -> tuple[Dim, ...]:
    """The kernel's extents; ShapeError where operands and attribute disagree."""
    if x.rank != w.rank or x.rank < 3:
        raise ShapeError(f"an input of rank {x.rank} with a kernel of rank {w.rank}")
    kernel = w.shape[2:]
    for stated, actual in zip(kernel_shape or kernel, kernel, strict=True):
        assume_equal(stated, actual, "kernel_shape and the weights")
    return kernel


def per_channel(values: Tensor, rank: int) -> Tensor:
    """A vector over the channels as a tensor [C, 1, ...] that broadcasts over [N, C, *spatial] of the given rank."""
    return view(values, (*values.shape, *(1,) * (rank - 2)), lambda c, *_: (c,))


@declare.op("Conv", heavy=True, spatial=True, products=("x", "w"))
def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    result: DType | None = None,
) -> Tensor:
    """x [N, C, *spatial] with w [M, C/group, *kernel] plus b [M]."""
    kernel = kernel_extents(x, w, kernel_shape)
    windows = sliding(x.shape[2:], kernel, strides, dilations, pads, auto_pad)
    total = convolution(x, w, windows, group, widened_product(accumulator(x.dtype)))
    if b is not None:
        assume_equal(b.shape[0], w.shape[0], "lengths of the bias and of the filters")
        total = total + per_channel(cast(b, total.dtype), x.rank)
    return cast(total, result or x.dtype)


@declare.op("ConvTranspose", heavy=True, spatial=True, products=("x", "w"))
def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    result: DType | None = None,
) -> Tensor:
    """The transpose of a convolution: x [N, C, *spatial] with w [C, M/group, *kernel] plus b [M].

    Output o gathers from every kernel position k the input (o + before - k*dilation) / stride where that is whole.
    """
    kernel, rank = kernel_extents(x, w, kernel_shape), x.rank - 2
    steps, spread = per_axis(strides, rank, "strides"), per_axis(dilations, rank, "dilations")
    extra = tuple(output_padding or (0,) * rank)
    before, output = transposed_sizes(
        x.shape[2:], kernel, steps, spread, extra, pads, auto_pad, tuple(output_shape or ())
    )
    assume_equal(x.shape[1], w.shape[0], "channels of the input and of the kernel")
    channels, filters = floordiv(x.shape[1], group), w.shape[1]
    dtype = accumulator(x.dtype)
    multiply = widened_product(dtype)

    def body(i: Indices, r: Indices) -> Scalar:
        image, m, *o = i
        c, *k = r
        part, own = (0, m) if group == 1 else (floordiv(m, filters), modulo(m, filters))
        conditions: list[Scalar] = []
        positions: list[Dim] = []
        for axis in range(rank):
            reached = o[axis] + before[axis] - k[axis] * spread[axis]
            position = floordiv(reached, steps[axis])
            conditions += [index(reached).equal(index(position * steps[axis])), inside(position, x.shape[2 + axis])]
            positions.append(position)
        channel = part * channels + c
        return where(all_of(conditions), multiply(x.at((image, channel, *positions)), w.at((channel, own, *k))), 0)

    total = reduce_tensor("add", (x.shape[0], filters * group, *output), dtype, (channels, *kernel), body, x, w)
    if b is not None:
        total = total + per_channel(cast(b, dtype), x.rank)
    return cast(total, result or x.dtype)


def transposed_sizes(
    input: Sequence[Dim],
    kernel: Sequence[Dim],
    strides: Sequence[int],
    dilations: Sequence[int],
    extra: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
    output_shape: Sequence[int],
) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """(padding before, output extents) of a transposed convolution, per spatial axis."""
    rank = len(input)
    before: list[Dim] = list(pads[:rank]) if pads else [0] * rank
    after: list[Dim] = list(pads[rank:]) if pads else [0] * rank
    output: list[Dim] = []
    for axis in range(rank):
        whole = (input[axis] - 1) * strides[axis] + extra[axis] + (kernel[axis] - 1) * dilations[axis] + 1
        if output_shape or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            wanted = output_shape[len(output_shape) - rank + axis] if output_shape else input[axis] * strides[axis]
            total = dim_max(0, whole - wanted)
            before[axis] = floordiv(total, 2) if auto_pad == "SAME_UPPER" else ceildiv(total, 2)
            output.append(wanted)
        else:
            output.append(whole - before[axis] - after[axis])
    return tuple(before), tuple(output)


@declare.op("Einsum", heavy=True, products=("operands",))
def einsum(*operands: Tensor, equation: str, result: DType | None = None) -> Tensor:
    """Products of elements summed over the letters that the result lacks; "..." stands for broadcast axes."""
    terms, kept = einsum_terms(equation, [x.rank for x in operands])
    extents: dict[str, Dim] = {}
    for term, x in zip(terms, operands, strict=True):
        for letter, extent in zip(term, x.shape, strict=True):
            known = extents.get(letter, 1)
            extents[letter] = extent if known == 1 else known if extent == 1 else assume_equal(known, extent, letter)
    summed = [letter for letter in extents if letter not in kept]
    dtype = accumulator(operands[0].dtype)

    def body(i: Indices, r: Indices) -> Scalar:
        where_is = dict(zip(kept, i, strict=True)) | dict(zip(summed, r, strict=True))
        value: Scalar | None = None
        for term, x in zip(terms, operands, strict=True):
            indices = [0 if d == 1 else where_is[letter] for letter, d in zip(term, x.shape, strict=True)]
            factor = cast_scalar(x.at(indices), dtype)
            value = factor if value is None else binary("mul", value, factor)
        assert value is not None
        return value

    shape = tuple(extents[letter] for letter in kept)
    total = reduce_tensor("add", shape, dtype, tuple(extents[letter] for letter in summed), body, *operands)
    return cast(total, result or operands[0].dtype)


def einsum_terms(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result; the axes of "..." are called 0, 1, ... from the last one on."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(ranks):
        raise ShapeError(f"the equation {equation!r} has {len(terms)} operands, found {len(ranks)}")
    widest = ""
    for position, (term, rank) in enumerate(zip(terms, ranks, strict=True)):
        if "..." in term:
            count = rank - len(term) + 3
            dots = string.digits[:count][::-1]
            widest = max(widest, dots, key=len)
            terms[position] = term.replace("...", dots)
        if len(terms[position]) != rank:
            raise ShapeError(f"the term {term!r} of {equation!r} for an operand of rank {rank}")
    letters = "".join(terms)
    if arrow:
        return terms, output.replace("...", widest)
    return terms, widest + "".join(sorted(c for c in set(letters) if c.isalpha() and letters.count(c) == 1))
