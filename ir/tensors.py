"""Tensors by definition: a shape, an element type, and what the element at an index is.

Operators are declared over these; fusion is the composition of definitions. A tensor is a "buffer" (it exists in
memory), a "map" (its elements are expressions over other tensors' elements), a "reduce" (an element combines a range),
or "opaque" (only a schedule can make it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import TypeAlias, Union

from . import scalars
from .dims import Dim, dim_min, known_le, product, symbol
from .dtypes import BOOL, I64, DType
from .errors import ShapeError
from .rounding import rounded
from .scalars import Buffer, Const, Reduce, Scalar, free_symbols

Indices: TypeAlias = tuple[Dim, ...]
_assumptions: ContextVar[list[tuple[Dim, Dim]] | None] = ContextVar("assumptions", default=None)


@contextmanager
def collecting_assumptions() -> Iterator[list[tuple[Dim, Dim]]]:
    """Within this context, pairs of dims that a definition takes for equal are recorded; a run must check them."""
    found: list[tuple[Dim, Dim]] = []
    token = _assumptions.set(found)
    try:
        yield found
    finally:
        _assumptions.reset(token)


def assume_equal(a: Dim, b: Dim, what: str) -> Dim:
    """The dim that both must be; ShapeError where they surely differ. Prefers the number to the symbol."""
    if a == b:
        return a
    if isinstance(a, int) and isinstance(b, int):
        raise ShapeError(f"{what}: {a} and {b} differ")
    recorded = _assumptions.get()
    if recorded is not None:
        recorded.append((a, b))
    return b if isinstance(b, int) else a


def assume_shape(tensor: Tensor | None, shape: Sequence[Dim], what: str) -> None:
    """ShapeError where an operand, if there is one, has another rank or surely another shape."""
    if tensor is None:
        return
    if len(tensor.shape) != len(shape):
        raise ShapeError(f"{what}: of rank {len(tensor.shape)}, must be of shape [{', '.join(map(str, shape))}]")
    for axis, (found, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        assume_equal(found, wanted, f"axis {axis} of {what}")


@dataclass(eq=False)
class Tensor:
    """A tensor by definition.

    `element(indices)` gives the scalar at an index tuple of `len(shape)` dims; `at` is the same with a memo. `sources`
    are the tensors it is defined over, `buffer` the memory of one that exists. `lower` and `upper` bound every element
    of an integer tensor, as far as that is known.
    """

    shape: tuple[Dim, ...]
    dtype: DType
    element: Callable[[Indices], Scalar]
    kind: str = "map"
    sources: tuple[Tensor, ...] = ()
    buffer: Buffer | None = None
    lower: int | None = None
    upper: Dim | None = None
    _memo: dict[Indices, Scalar] = field(default_factory=dict, repr=False)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> Dim:
        """The number of elements."""
        return product(self.shape)

    def at(self, indices: Sequence[Dim]) -> Scalar:
        key = tuple(indices)
        assert len(key) == len(self.shape), f"{len(key)} indices for shape {self.shape}"
        found = self._memo.get(key)
        if found is None:
            # Where there is no element, indices mean nothing, and dividing them by sizes of 0 even less.
            empty = 0 in self.shape and self.buffer is None and self.dtype.kind != "string"
            found = self._memo[key] = scalars.const(0, self.dtype) if empty else rounded(self.element(key))
            assert found.dtype == self.dtype, f"element of {found.dtype} in a tensor of {self.dtype}"
        return found

    def _with(self, op: str, other: TensorLike, swap: bool = False) -> Tensor:
        pair = (other, self) if swap else (self, other)
        return elementwise(lambda a, b: scalars.binary(op, a, b), *pair)

    def __add__(self, other: TensorLike) -> Tensor:
        return self._with("add", other)

    def __radd__(self, other: TensorLike) -> Tensor:
        return self._with("add", other, True)

    def __sub__(self, other: TensorLike) -> Tensor:
        return self._with("sub", other)

    def __rsub__(self, other: TensorLike) -> Tensor:
        return self._with("sub", other, True)

    def __mul__(self, other: TensorLike) -> Tensor:
        return self._with("mul", other)

    def __rmul__(self, other: TensorLike) -> Tensor:
        return self._with("mul", other, True)

    def __truediv__(self, other: TensorLike) -> Tensor:
        return self._with("div", other)

    def __rtruediv__(self, other: TensorLike) -> Tensor:
        return self._with("div", other, True)

    def __neg__(self) -> Tensor:
        return elementwise(lambda a: -a, self)

    def __lt__(self, other: TensorLike) -> Tensor:
        return self._with("lt", other)

    def __le__(self, other: TensorLike) -> Tensor:
        return self._with("le", other)

    def equal(self, other: TensorLike) -> Tensor:
        return self._with("eq", other)


TensorLike: TypeAlias = Tensor | int | float | bool


def flat_offset(indices: Sequence[Dim], shape: Sequence[Dim]) -> Dim:
    """The row-major offset of an index tuple."""
    offset: Dim = 0
    for position, extent in zip(indices, shape, strict=True):
        if extent != 1:
            offset = offset * extent + position
    return offset


def unflatten(offset: Dim, shape: Sequence[Dim]) -> Indices:
    """The index tuple of a row-major offset."""
    indices: list[Dim] = []
    for extent in reversed(shape[1:]):
        extent = 1 if extent == 0 else extent  # No element of an empty tensor is ever asked for.
        indices.append(offset % extent)
        offset = offset // extent
    return (*([offset] if shape else []), *reversed(indices))


def buffer_tensor(name: str, dtype: DType, shape: Sequence[Dim]) -> Tensor:
    """A tensor that lies row-major in the parameter buffer `name`."""
    shape = tuple(shape)
    buffer = Buffer(name, dtype, product(shape))
    return Tensor(shape, dtype, lambda i: scalars.load(buffer, flat_offset(i, shape)), "buffer", (), buffer)


def compute(shape: Sequence[Dim], dtype: DType, element: Callable[..., Scalar], *sources: Tensor) -> Tensor:
    """The tensor whose element at (i, j, ...) is `element(i, j, ...)`."""
    return Tensor(tuple(shape), dtype, lambda indices: element(*indices), "map", sources)


def opaque_tensor(shape: Sequence[Dim], dtype: DType, *sources: Tensor) -> Tensor:
    """A tensor that only a schedule of its operator can make."""

    def refuse(indices: Indices) -> Scalar:
        raise TypeError("an opaque tensor has no element definition")

    return Tensor(tuple(shape), dtype, refuse, "opaque", sources)


def reduction(op: str, at: Sequence[Dim], extents: Sequence[Dim], body: Callable[..., Scalar]) -> Scalar:
    """body(r0, r1, ...) combined over ranges, as one element at the indices `at`.

    The names of the new indices avoid those that occur in `at`, so definitions nest. A range of one index is none.
    """
    taken = set().union(*map(free_symbols, at)) if at else set()
    level = 0
    while any(name.startswith(f"r{level}_") for name in taken):
        level += 1
    ranges = {axis: (f"r{level}_{axis}", extent) for axis, extent in enumerate(extents) if extent != 1}
    indices: list[Dim] = [symbol(ranges[a][0], 0, extent - 1) if a in ranges else 0 for a, extent in enumerate(extents)]
    result = body(*indices)
    return Reduce(result.dtype, 1, op, tuple(ranges.values()), result) if ranges else result


def reduce_tensor(
    op: str,
    shape: Sequence[Dim],
    dtype: DType,
    extents: Sequence[Dim],
    body: Callable[[Indices, Indices], Scalar],
    *sources: Tensor,
) -> Tensor:
    """The tensor whose element at i combines body(i, r) over all r within `extents`."""
    return Tensor(tuple(shape), dtype, lambda i: reduction(op, i, extents, lambda *r: body(i, r)), "reduce", sources)


def normalize_axis(axis: int, rank: int) -> int:
    """`axis` counted from the front; ShapeError where it is out of range."""
    if not -rank <= axis < max(rank, 1):
        raise ShapeError(f"axis {axis} is out of range for rank {rank}")
    return axis % rank if rank else 0


def normalize_axes(axes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Distinct axes counted from the front, in ascending order."""
    return tuple(sorted({normalize_axis(int(axis), rank) for axis in axes}))


def reduce_axes(
    op: str,
    x: Tensor,
    axes: Sequence[int],
    keepdims: bool = True,
    transform: Callable[[Scalar], Scalar] = lambda value: value,
    dtype: DType | None = None,
) -> Tensor:
    """transform(x) combined over the given axes (counted from the front)."""
    reduced = tuple(axes)
    shape = tuple(1 if a in reduced else d for a, d in enumerate(x.shape) if keepdims or a not in reduced)
    extents = tuple(x.shape[axis] for axis in reduced)

    def body(i: Indices, r: Indices) -> Scalar:
        kept = iter(d for a, d in enumerate(i) if not (keepdims and a in reduced))
        inner = iter(r)
        return transform(x.at(tuple(next(inner) if a in reduced else next(kept) for a in range(x.rank))))

    return reduce_tensor(op, shape, dtype or x.dtype, extents, body, x)


def broadcast_dim(a: Dim, b: Dim, what: str = "broadcast") -> Dim:
    """The common dim of two, one of which may be 1."""
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    # The last element of an axis, min(1, extent), is stretched along it; both may be empty.
    for small, large in ((a, b), (b, a)):
        if known_le(small, 1) and not known_le(large, 1):
            assume_equal(small, dim_min(1, large), what)
            return large
    return assume_equal(a, b, what)


def broadcast_shapes(*shapes: Sequence[Dim]) -> tuple[Dim, ...]:
    """The common shape by ONNX's multidirectional broadcasting; ShapeError names the two shapes that clash."""
    result: tuple[Dim, ...] = ()
    for shape in shapes:
        rank = max(len(result), len(shape))
        left = (1,) * (rank - len(result)) + tuple(result)
        right = (1,) * (rank - len(shape)) + tuple(shape)
        text = f"shapes {list(map(str, result))} and {list(map(str, shape))} do not broadcast"
        result = tuple(broadcast_dim(a, b, text) for a, b in zip(left, right, strict=True))
    return result


def broadcast_index(indices: Indices, shape: Sequence[Dim], x: Tensor) -> Indices:
    """Where in `x` the element lies that broadcasting to `shape` puts at `indices`."""
    skip = len(shape) - x.rank
    return tuple(0 if known_le(own, 1) else i for i, own in zip(indices[skip:], x.shape, strict=True))


def elementwise(function: Callable[..., Scalar], *operands: TensorLike) -> Tensor:
    """function(a, b, ...) of the elements of broadcast operands; numbers become literals of the first tensor's type."""
    first = next(operand for operand in operands if isinstance(operand, Tensor))
    tensors = tuple(operand for operand in operands if isinstance(operand, Tensor))
    shape = broadcast_shapes(*(t.shape for t in tensors))

    def element(i: Indices) -> Scalar:
        return function(
            *(
                o.at(broadcast_index(i, shape, o)) if isinstance(o, Tensor) else scalars.const(o, first.dtype)
                for o in operands
            )
        )

    # The result type follows from the operands' types alone: ask for it with stand-ins.
    probes = [
        scalars.load(Buffer("?", o.dtype), 0) if isinstance(o, Tensor) else scalars.const(o, first.dtype)
        for o in operands
    ]
    return Tensor(shape, function(*probes).dtype, element, "map", tensors)


def reshaped(x: Tensor, shape: Sequence[Dim]) -> Tensor:
    """The elements of `x` in row-major order under another shape; another view where `x` lies in memory."""
    shape = tuple(shape)
    if shape == x.shape:
        return x
    if x.buffer is not None:
        buffer = x.buffer
        return Tensor(
            shape,
            x.dtype,
            lambda i: scalars.load(buffer, flat_offset(i, shape)),
            "buffer",
            x.sources,
            buffer,
            x.lower,
            x.upper,
        )
    groups = matching_groups(x.shape, shape)

    def element(i: Indices) -> Scalar:
        where: list[Dim] = []
        for (a, b), (c, d) in groups:
            where += unflatten(flat_offset(i[c:d], shape[c:d]), x.shape[a:b]) if b > a else ()
        return x.at(where)

    return Tensor(shape, x.dtype, element, "map", (x,), lower=x.lower, upper=x.upper)


def matching_groups(old: Sequence[Dim], new: Sequence[Dim]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Cuts two shapes of equal size into the shortest runs of axes with equal products."""
    groups: list[tuple[tuple[int, int], tuple[int, int]]] = []
    a = c = 0
    while a < len(old) or c < len(new):
        b, d = min(a + 1, len(old)), min(c + 1, len(new))
        while product(old[a:b]) != product(new[c:d]):
            left, right = product(old[a:b]), product(new[c:d])
            behind = d < len(new) and (b == len(old) or _grows(left, right))
            if behind:
                d += 1
            elif b < len(old):
                b += 1
            else:
                break
        if product(old[a:b]) != product(new[c:d]):
            b, d = len(old), len(new)
        groups.append(((a, b), (c, d)))
        a, c = b, d
    return groups


def _grows(left: Dim, right: Dim) -> bool:
    """Whether the right product should take in another axis to reach the left one."""
    if isinstance(left, int) and isinstance(right, int):
        return right < left
    from .dims import divide_exactly

    return divide_exactly(left, right) is not None if not isinstance(right, int) or right != 0 else False


def lifted(function: Callable[..., Scalar]) -> Callable[..., Union[Tensor, Scalar]]:  # noqa: UP007
    """`function` of scalars, also taking tensors (then broadcast elementwise)."""

    @wraps(function)
    def call(*operands: object) -> Tensor | Scalar:
        if any(isinstance(operand, Tensor) for operand in operands):
            return elementwise(function, *operands)  # type: ignore[arg-type]
        return function(*operands)

    return call


def select_axis(i: Dim, choices: Sequence[Scalar]) -> Scalar:
    """choices[i], by comparing where the index is no number."""
    if isinstance(i, int):
        return choices[i]
    result = choices[-1]
    for position in range(len(choices) - 2, -1, -1):
        result = scalars.select(
            scalars.binary("eq", scalars.index(i), scalars.index(position)), choices[position], result
        )
    return result


def position_of(source: Tensor, indices: Sequence[Dim], extent: Dim) -> Dim:
    """An element of the integer tensor `source` as an index into an axis: negative counts from the end.

    What is known of the elements spares the adjustment; what lies outside the axis is taken to its border, so that no
    content of a tensor makes a kernel read outside its memory.
    """
    value = scalars.cast(source.at(indices), I64)
    if isinstance(value, Const) and isinstance(extent, int):
        position = int(value.value)
        return max(0, min(position + extent if position < 0 else position, extent - 1))
    zero, last = scalars.const(0, I64), scalars.index(extent - 1)
    negative = source.lower is None or source.lower < 0
    if negative:
        value = scalars.select(
            scalars.binary("lt", value, zero), scalars.binary("add", value, scalars.index(extent)), value
        )
    if source.lower is None or not known_le(0, source.lower + extent if negative else source.lower):
        value = scalars.binary("max", value, zero)
    if source.upper is None or not known_le(source.upper + 1, extent):
        value = scalars.binary("min", value, last)
    return scalars.as_dim(value, 0, extent - 1)


def dims_tensor(dims: Sequence[Dim], shape: Sequence[Dim] | None = None) -> Tensor:
    """An i64 tensor of the given sizes: a vector unless `shape` says otherwise."""
    values = [scalars.index(dim) for dim in dims] or [scalars.const(0, I64)]  # of no elements, whose code is never run
    form = (len(dims),) if shape is None else tuple(shape)
    return Tensor(form, I64, lambda i: select_axis(flat_offset(i, form), values))


def view(x: Tensor, shape: Sequence[Dim], where: Callable[..., Sequence[Dim]]) -> Tensor:
    """The tensor whose element at (i, j, ...) is the element of `x` at where(i, j, ...)."""
    return Tensor(tuple(shape), x.dtype, lambda i: x.at(where(*i)), "map", (x,), lower=x.lower, upper=x.upper)


def inside(value: Dim, extent: Dim) -> Scalar:
    """The condition 0 <= value < extent, without the halves that are known to hold."""
    i = scalars.index(value)
    return scalars.binary(
        "and",
        scalars.binary("le", scalars.const(0, I64), i),
        scalars.binary("lt", i, scalars.index(extent)),
    )


def all_of(conditions: Sequence[Scalar]) -> Scalar:
    """Whether every condition holds."""
    result: Scalar = scalars.const(True, BOOL)
    for condition in conditions:
        result = scalars.binary("and", result, condition)
    return result
