"""Scalar expressions: what one element of a tensor is, and what a statement of a kernel computes.

Expressions are immutable trees with shared subtrees; two are equal where their digests are, whatever the sharing. Every
expression has an element type and a number of lanes; lanes > 1 is a register vector.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np

from . import folding
from .atoms import NOTHING, lazy, quick
from .dims import Dim, Opaque, Sum, atoms, opaque, substitute
from .dtypes import BOOL, F32, F64, I32, I64, DType

Number: TypeAlias = int | float | bool
ScalarLike: TypeAlias = "Scalar | Number"


@dataclass(frozen=True)
class Buffer:
    """Memory that a kernel reads or writes, addressed by flat element offset.

    `space` is "parameter" (an argument of the kernel), "stack" (private, `size` elements), "register" (named vectors of
    `lanes` lanes, `size` of them, addressed by constants) or "shared" (a GPU block's).
    """

    name: str
    dtype: DType
    size: Dim = 1
    space: str = "parameter"
    lanes: int = 1

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Scalar:
    """Base of all expressions."""

    dtype: DType
    lanes: int

    @lazy
    def digest(self) -> bytes:
        """Identifies the expression by its structure; the same in every process."""
        parts = [type(self).__name__.encode()]
        for content in self._contents:
            if isinstance(content, Scalar):
                parts.append(content.digest)
            else:
                parts.append(b"%d;" % content if content.__class__ is int else _digest(content))
        return hashlib.blake2b(b"".join(parts), digest_size=16).digest()

    @lazy
    def _contents(self) -> tuple[Any, ...]:
        """The fields in order."""
        return tuple([getattr(self, name) for name in type(self).__dataclass_fields__])

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Scalar) and self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    @lazy
    def children(self) -> tuple[Scalar, ...]:
        """The expressions this one is made of, those inside index dims excluded."""
        found: list[Scalar] = []
        for content in self._contents:
            if isinstance(content, Scalar):
                found.append(content)
            elif isinstance(content, tuple):
                found += [entry for entry in content if isinstance(entry, Scalar)]
        return tuple(found)

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The index dims this expression holds itself."""
        return ()

    @lazy
    def free(self) -> frozenset[str]:
        """Names of the symbols that the value depends on."""
        names = NOTHING
        for part in (*self.dims, *self.children):
            if not isinstance(part, int) and (more := part.free):
                names = names | more if names else more
        return names

    def mentions(self, name: str) -> bool:
        return name in self.free

    def __str__(self) -> str:
        from .loops import print_scalar

        return print_scalar(self)

    def _binary(self, op: str, other: ScalarLike, swap: bool = False) -> Scalar:
        right = as_scalar(other, self.dtype)
        return binary(op, right, self) if swap else binary(op, self, right)

    def __add__(self, other: ScalarLike) -> Scalar:
        return self._binary("add", other)

    def __radd__(self, other: ScalarLike) -> Scalar:
        return self._binary("add", other, True)

    def __sub__(self, other: ScalarLike) -> Scalar:
        return self._binary("sub", other)

    def __rsub__(self, other: ScalarLike) -> Scalar:
        return self._binary("sub", other, True)

    def __mul__(self, other: ScalarLike) -> Scalar:
        return self._binary("mul", other)

    def __rmul__(self, other: ScalarLike) -> Scalar:
        return self._binary("mul", other, True)

    def __truediv__(self, other: ScalarLike) -> Scalar:
        return self._binary("div", other)

    def __rtruediv__(self, other: ScalarLike) -> Scalar:
        return self._binary("div", other, True)

    def __neg__(self) -> Scalar:
        return unary("neg", self)

    def __and__(self, other: ScalarLike) -> Scalar:
        return self._binary("and", other)

    def __or__(self, other: ScalarLike) -> Scalar:
        return self._binary("or", other)

    def __xor__(self, other: ScalarLike) -> Scalar:
        return self._binary("xor", other)

    def __invert__(self) -> Scalar:
        return unary("not", self)

    def __lt__(self, other: ScalarLike) -> Scalar:
        return self._binary("lt", other)

    def __le__(self, other: ScalarLike) -> Scalar:
        return self._binary("le", other)

    def __gt__(self, other: ScalarLike) -> Scalar:
        return self._binary("lt", other, True)

    def __ge__(self, other: ScalarLike) -> Scalar:
        return self._binary("le", other, True)

    def equal(self, other: ScalarLike) -> Scalar:
        """Elementwise ==, whose spelling in Python is taken by structural equality."""
        return self._binary("eq", other)


def _digest(content: object) -> bytes:
    if isinstance(content, Scalar):
        return content.digest
    if isinstance(content, tuple):
        if content and content[0].__class__ is int:
            return repr(content).encode()
        return b"(" + b",".join(map(_digest, content)) + b")"
    if isinstance(content, float):
        return np.float64(content).tobytes()
    return str(content).encode() + b";"


def free_symbols(dim: Dim) -> frozenset[str]:
    """Names of the symbols in `dim`, those inside run-time values included."""
    return dim.free if isinstance(dim, Sum) else frozenset()


@quick
@dataclass(frozen=True, eq=False)
class Const(Scalar):
    """A literal; integers are kept as Python ints, so 64 bits stay exact."""

    value: Number


@quick
@dataclass(frozen=True, eq=False)
class Varying(Scalar):
    """A literal that is another number in each of several kernels, `values` in their order (see `passes.literals`)."""

    values: tuple[Number, ...]


LITERALS = Const, Varying  # no operations


@quick
@dataclass(frozen=True, eq=False)
class Index(Scalar):
    """An i64 that is an index or a size."""

    dim: Dim

    @property
    def dims(self) -> tuple[Dim, ...]:
        return (self.dim,)


@quick
@dataclass(frozen=True, eq=False)
class Lanes(Scalar):
    """The i64 vector 0, 1, ..., lanes-1."""


@quick
@dataclass(frozen=True, eq=False)
class Load(Scalar):
    """`lanes` elements of a buffer from a flat element offset on, `stride` apart.

    Lanes where `predicate` (bool, as many lanes) is false read nothing and are zero. `aligned` promises that the
    address is a multiple of the bytes of all lanes, or of 16 where they are more.
    """

    buffer: Buffer
    offset: Dim
    predicate: Scalar | None = None
    stride: Dim = 1
    aligned: bool = False

    @property
    def dims(self) -> tuple[Dim, ...]:
        return self.offset, self.stride


@quick
@dataclass(frozen=True, eq=False)
class Unary(Scalar):
    """One operand: neg abs sqrt floor ceil round trunc not isnan popcount reciprocal_estimate, and MATH functions; of
    f32 also exp2_estimate, 2^x below 2^128 to some 2 ulp with subnormal results as 0."""

    op: str
    operand: Scalar


@quick
@dataclass(frozen=True, eq=False)
class Binary(Scalar):
    """Two operands of one type: ARITHMETIC give that type, COMPARISONS bool.

    "div" and "rem" of integers truncate as C does (a zero divisor gives 0, never a trap); "min" and "max" of floats
    propagate NaN; "shl"/"shr" by the width or more give 0.
    """

    op: str
    left: Scalar
    right: Scalar


@quick
@dataclass(frozen=True, eq=False)
class Select(Scalar):
    """`yes` where the condition is true, else `no`; a load that the condition guards is not made where it is false."""

    condition: Scalar
    yes: Scalar
    no: Scalar


@quick
@dataclass(frozen=True, eq=False)
class Cast(Scalar):
    """Conversion as ONNX's Cast: float to integer truncates, to bool is != 0, between floats rounds to even.

    What a float of 8 bits cannot hold becomes its greatest value where `saturate`, else infinity or NaN.
    """

    operand: Scalar
    saturate: bool = False


@quick
@dataclass(frozen=True, eq=False)
class Bitcast(Scalar):
    """The same bits as lanes of another type, perhaps wider or narrower ones."""

    operand: Scalar


@quick
@dataclass(frozen=True, eq=False)
class Fma(Scalar):
    """a*b + c, rounded once where the target can."""

    a: Scalar
    b: Scalar
    c: Scalar


@quick
@dataclass(frozen=True, eq=False)
class Broadcast(Scalar):
    """A scalar in every lane."""

    operand: Scalar


@quick
@dataclass(frozen=True, eq=False)
class Vector(Scalar):
    """A vector of the given scalars."""

    elements: tuple[Scalar, ...]


@quick
@dataclass(frozen=True, eq=False)
class Shuffle(Scalar):
    """Lanes picked from two vectors laid end to end."""

    left: Scalar
    right: Scalar
    pick: tuple[int, ...]


@quick
@dataclass(frozen=True, eq=False)
class Horizontal(Scalar):
    """All lanes of a vector combined by add, mul, min, max, and, or."""

    op: str
    operand: Scalar


@quick
@dataclass(frozen=True, eq=False)
class Call(Scalar):
    """An intrinsic that the target description names: an integer dot product; a look-up of bytes; on a GPU a value of
    another thread of the warp (shuffle_xor, shuffle_down, ...) or the lanes where a bool holds (ballot)."""

    name: str
    arguments: tuple[Scalar, ...]


@quick
@dataclass(frozen=True, eq=False)
class Reduce(Scalar):
    """The body combined over index ranges; (symbol name, extent) pairs, outermost first. Only in tensor definitions:
    a schedule turns it into loops. `op` is add, mul, min, max, and, or; an empty range gives the op's identity."""

    op: str
    ranges: tuple[tuple[str, Dim], ...]
    body: Scalar

    @property
    def dims(self) -> tuple[Dim, ...]:
        return tuple(extent for _, extent in self.ranges)

    @lazy
    def free(self) -> frozenset[str]:
        return super().free - {name for name, _ in self.ranges}


@quick
@dataclass(frozen=True, eq=False)
class Element(Scalar):
    """Element [indices] of a tensor that a schedule provides (the anchor of a fused group, a row buffer)."""

    tensor: str
    indices: tuple[Dim, ...]

    @property
    def dims(self) -> tuple[Dim, ...]:
        return self.indices


MATH: tuple[str, ...] = (
    "exp", "log", "tanh", "erf", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh",
    "sigmoid", "log1p", "expm1", "exp2", "log2",
)  # fmt: skip
COMPARISONS: tuple[str, ...] = ("lt", "le", "eq", "ne")
IDENTITY: Mapping[str, Callable[[DType], Number]] = {
    "add": lambda dtype: 0,
    "mul": lambda dtype: 1,
    "min": lambda dtype: math.inf if dtype.is_float else int(dtype.limits[1]),
    "max": lambda dtype: -math.inf if dtype.is_float else int(dtype.limits[0]),
    "and": lambda dtype: True if dtype == BOOL else -1,
    "or": lambda dtype: False if dtype == BOOL else 0,
}


def const(value: Number, dtype: DType = F32, lanes: int = 1) -> Scalar:
    """A literal of the given type."""
    if dtype.is_float:
        value = float(value)
    elif dtype == BOOL:
        value = bool(value)
    else:
        value = int(value)
    literal = Const(dtype, 1, value)
    return literal if lanes == 1 else Broadcast(dtype, lanes, literal)


def varying(values: Iterable[Number], dtype: DType = F32, lanes: int = 1) -> Scalar:
    """The literal of so many kernels; a plain one where it is the same in all."""
    numbers = tuple(float(value) if dtype.is_float else int(value) for value in values)
    if len({_digest(number) for number in numbers}) == 1:
        return const(numbers[0], dtype, lanes)
    return widen(Varying(dtype, 1, numbers), lanes)


def index(dim: Dim) -> Scalar:
    """The i64 value of an index or size; the run-time value itself where the dim is just that."""
    if isinstance(dim, int):
        return const(dim, I64)
    if len(dim.terms) == 1 and dim.terms[0][1] == 1 and len(dim.terms[0][0]) == 1:
        atom = dim.terms[0][0][0]
        if isinstance(atom, Opaque) and isinstance(atom.value, Scalar) and atom.value.dtype == I64:
            return atom.value
    return Index(I64, 1, dim)


def as_dim(value: Scalar, lower: int | None = None, upper: Dim | None = None) -> Dim:
    """An integer expression as an index; `lower` and `upper` state what is known of it."""
    if isinstance(value, Const):
        return int(value.value)
    if isinstance(value, Index):
        return value.dim
    return opaque(cast(value, I64), lower, upper)


def as_scalar(value: ScalarLike, dtype: DType) -> Scalar:
    """A Python number as a literal of `dtype`; an expression as it is."""
    return value if isinstance(value, Scalar) else const(value, dtype)


def lane_count(*values: Scalar) -> int:
    return max(value.lanes for value in values)


def widen(value: Scalar, lanes: int) -> Scalar:
    """`value` with the given number of lanes: a scalar is broadcast."""
    return value if value.lanes == lanes else Broadcast(value.dtype, lanes, value)


def unary(op: str, operand: Scalar) -> Scalar:
    dtype = BOOL if op == "isnan" else operand.dtype
    if isinstance(operand, Const) and op == "neg":
        return const(-operand.value, operand.dtype)
    if isinstance(operand, Varying) and op == "neg":
        return varying([-value for value in operand.values], operand.dtype)
    return Unary(dtype, operand.lanes, op, operand)


def binary(op: str, left: Scalar, right: Scalar) -> Scalar:
    """left op right; folds what is exact whatever the operands are (x + 0 on integers, x * 1, ...)."""
    assert left.dtype == right.dtype, f"{op} of {left.dtype} and {right.dtype}"
    lanes = lane_count(left, right)
    if lanes == 1:
        folded = folding.folded(op, left, right)
        if folded is not None:
            return folded
    dtype = BOOL if op in COMPARISONS else left.dtype
    return Binary(dtype, lanes, op, widen(left, lanes), widen(right, lanes))


def select(condition: Scalar, yes: Scalar, no: Scalar) -> Scalar:
    assert yes.dtype == no.dtype, f"select of {yes.dtype} and {no.dtype}"
    if isinstance(condition, Const):
        return yes if condition.value else no
    if yes is no:
        return yes
    lanes = lane_count(condition, yes, no)
    return Select(yes.dtype, lanes, widen(condition, lanes), widen(yes, lanes), widen(no, lanes))


def cast(operand: Scalar, dtype: DType, saturate: bool = False) -> Scalar:
    """`operand` converted as ONNX's Cast does; nothing where the type is already that."""
    if operand.dtype == dtype:
        return operand
    truncates = operand.dtype.is_float and dtype.is_integer
    if isinstance(operand, Const) and not truncates and dtype in (F32, F64, I64, BOOL):
        value = float(np.float32(operand.value)) if dtype == F32 else operand.value
        return const(value, dtype)
    if isinstance(operand, Varying) and not truncates and dtype in (F32, I32):
        return varying(np.asarray(operand.values, dtype.numpy).tolist(), dtype)
    return Cast(dtype, operand.lanes, operand, saturate)


def fma(a: Scalar, b: Scalar, c: Scalar) -> Scalar:
    lanes = lane_count(a, b, c)
    return Fma(c.dtype, lanes, widen(a, lanes), widen(b, lanes), widen(c, lanes))


def bitcast(operand: Scalar, dtype: DType) -> Scalar:
    assert operand.dtype.bits == dtype.bits
    if BOOL in (operand.dtype, dtype):  # a byte of 0 or 1 in memory, a single bit in registers
        return cast(operand, dtype)
    return operand if operand.dtype == dtype else Bitcast(dtype, operand.lanes, operand)


def load(
    buffer: Buffer,
    offset: Dim,
    lanes: int = 1,
    predicate: Scalar | None = None,
    stride: Dim = 1,
    aligned: bool = False,
) -> Scalar:
    return Load(buffer.dtype, lanes, buffer, offset, predicate, stride, aligned)


class Rewriter:
    """Rebuilds expressions bottom-up, shared subtrees once. A subclass (or `leaf`) replaces what it knows."""

    SIMPLIFY: ClassVar[bool] = True

    def __init__(self, leaf: Callable[[Scalar], Scalar | None] | None = None, dims: Mapping[str, Dim] | None = None):
        self._leaf = leaf
        self._dims = dict(dims or {})
        self._done: dict[int, tuple[Scalar, Scalar]] = {}

    def __call__(self, scalar: Scalar) -> Scalar:
        found = self._done.get(id(scalar))
        if found is None:
            replaced = self._leaf(scalar) if self._leaf is not None else None
            found = (scalar, self.rebuild(scalar) if replaced is None else replaced)
            self._done[id(scalar)] = found
        return found[1]

    def dim(self, dim: Dim) -> Dim:
        """`dim` with this rewriter's substitutions made, in run-time values too."""
        if isinstance(dim, int):
            return dim
        return substitute(dim, self._dims, self._opaque)

    def _opaque(self, atom: Opaque) -> Dim:
        assert isinstance(atom.value, Scalar)
        upper = None if atom.upper is None else self.dim(atom.upper)
        return as_dim(self(atom.value), atom.lower, upper)

    def rebuild(self, scalar: Scalar) -> Scalar:
        """`scalar` made again from rewritten parts, by the folding constructors."""
        if isinstance(scalar, Const | Varying | Lanes):
            return scalar
        if isinstance(scalar, Index):
            return index(self.dim(scalar.dim))
        if isinstance(scalar, Load):
            predicate = None if scalar.predicate is None else self(scalar.predicate)
            offset, stride = self.dim(scalar.offset), self.dim(scalar.stride)
            return load(scalar.buffer, offset, scalar.lanes, predicate, stride, scalar.aligned)
        if isinstance(scalar, Unary):
            return unary(scalar.op, self(scalar.operand))
        if isinstance(scalar, Binary):
            return binary(scalar.op, self(scalar.left), self(scalar.right))
        if isinstance(scalar, Select):
            return select(self(scalar.condition), self(scalar.yes), self(scalar.no))
        if isinstance(scalar, Cast):
            return cast(self(scalar.operand), scalar.dtype, scalar.saturate)
        if isinstance(scalar, Fma):
            return fma(self(scalar.a), self(scalar.b), self(scalar.c))
        if isinstance(scalar, Element):
            return replace(scalar, indices=tuple(self.dim(dim) for dim in scalar.indices))
        if isinstance(scalar, Reduce):
            ranges = tuple((name, self.dim(extent)) for name, extent in scalar.ranges)
            bound = [name for name, _ in ranges if name in self._dims]
            inner = self
            if bound:  # an index of the same name is another one inside
                inner = type(self)(self._leaf, {k: v for k, v in self._dims.items() if k not in bound})
            return Reduce(scalar.dtype, scalar.lanes, scalar.op, ranges, inner(scalar.body))
        changes: dict[str, object] = {}
        for item in fields(scalar):
            content = getattr(scalar, item.name)
            if isinstance(content, Scalar):
                changes[item.name] = self(content)
            elif isinstance(content, tuple) and content and isinstance(content[0], Scalar):
                changes[item.name] = tuple(self(entry) for entry in content)
        return replace(scalar, **changes)  # type: ignore[arg-type]


def walk(scalar: Scalar, seen: set[bytes] | None = None, into_dims: bool = True) -> Iterator[Scalar]:
    """Every distinct subexpression, parts before wholes; those inside index dims too."""
    seen = set() if seen is None else seen
    if scalar.digest in seen:
        return
    seen.add(scalar.digest)
    if into_dims:
        for dim in scalar.dims:
            if isinstance(dim, Sum):
                for atom in atoms(dim):
                    if isinstance(atom, Opaque) and isinstance(atom.value, Scalar):
                        yield from walk(atom.value, seen)
    for child in scalar.children:
        yield from walk(child, seen, into_dims)
    yield scalar
