"""Complex numbers: in kernels each is two real ones, beside each other in memory and two expressions in registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

from ..ir import loops as k
from ..ir import scalars as s
from ..ir.dtypes import BOOL, C64, C128, F32, U32, U64, DType
from ..ir.errors import UnsupportedError
from ..ir.loops import Block, Kernel, Statement
from ..ir.scalars import Buffer, Rewriter, Scalar, binary, bitcast, select, unary

Parts: TypeAlias = tuple[Scalar, Scalar]
"""The real and the imaginary part."""


def _is_complex(dtype: DType) -> bool:
    return dtype.kind == "complex"


def _doubled(buffer: Buffer) -> Buffer:
    """Memory of complex numbers as memory of their parts."""
    return replace(buffer, dtype=buffer.dtype.part, size=buffer.size * 2) if _is_complex(buffer.dtype) else buffer


def _variables(buffer: Buffer) -> tuple[Buffer, Buffer]:
    """The register variables of the parts."""
    real, imaginary = (replace(buffer, name=f"{buffer.name}.{p}", dtype=buffer.dtype.part) for p in ("re", "im"))
    return real, imaginary


def _is_zero(scalar: Scalar) -> bool:
    scalar = scalar.operand if isinstance(scalar, s.Broadcast) else scalar
    return isinstance(scalar, s.Const) and scalar.value == 0


def _product(a: Parts, b: Parts) -> Parts:
    if _is_zero(a[1]):
        a, b = b, a
    if _is_zero(b[1]):
        return a[0] * b[0], a[1] * b[0]
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _quotient(a: Parts, b: Parts) -> Parts:
    size = b[0] * b[0] + b[1] * b[1]
    real, imaginary = _product(a, (b[0], -b[1]))
    return real / size, imaginary / size


def _sum(a: Parts, b: Parts) -> Parts:
    return a[0] + b[0], a[1] + b[1]


def _precedes(op: str, a: Parts, b: Parts) -> Scalar:
    """a op b ("lt" or "le") as numpy orders complex numbers: by the real part, then by the imaginary one."""
    return (a[0] < b[0]) | (a[0].equal(b[0]) & binary(op, a[1], b[1]))


def _either(condition: Scalar, a: Parts, b: Parts) -> Parts:
    return select(condition, a[0], b[0]), select(condition, a[1], b[1])


_ARITHMETIC: dict[str, Callable[[Parts, Parts], Parts]] = {
    "add": _sum, "sub": lambda a, b: (a[0] - b[0], a[1] - b[1]), "mul": _product, "div": _quotient,
    "min": lambda a, b: _either(_precedes("lt", b, a), b, a), "max": lambda a, b: _either(_precedes("lt", a, b), b, a),
}  # fmt: skip


class _Real(Rewriter):
    """Rebuilds real expressions, with the parts of the complex ones in them."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[int, tuple[Scalar, Parts]] = {}

    def rebuild(self, scalar: Scalar) -> Scalar:
        if not any(_is_complex(child.dtype) for child in scalar.children):
            return super().rebuild(scalar)
        operands = [self.parts(child) for child in scalar.children]
        (real, imaginary), last = operands[0], operands[-1]
        if isinstance(scalar, s.Binary) and scalar.op in s.COMPARISONS:
            if scalar.op in ("eq", "ne"):
                both = binary("eq", real, last[0]) & binary("eq", imaginary, last[1])
                return ~both if scalar.op == "ne" else both
            return _precedes(scalar.op, operands[0], last)
        if isinstance(scalar, s.Unary) and scalar.op == "isnan":
            return unary("isnan", real) | unary("isnan", imaginary)
        if isinstance(scalar, s.Cast):
            return s.cast(real, BOOL) | s.cast(imaginary, BOOL) if scalar.dtype == BOOL else s.cast(real, scalar.dtype)
        if isinstance(scalar, s.Bitcast) and scalar.operand.dtype == C64:
            low, high = (s.cast(bitcast(part, U32), U64) for part in (real, imaginary))
            return bitcast(low | binary("shl", high, s.const(32, U64)), scalar.dtype)
        raise UnsupportedError(f"{getattr(scalar, 'op', type(scalar).__name__)} of complex numbers is not compiled")

    def parts(self, scalar: Scalar) -> Parts:
        """The parts of a complex expression."""
        found = self._parts.get(id(scalar))
        if found is None:
            found = self._parts[id(scalar)] = scalar, self._split(scalar)
        return found[1]

    def _split(self, scalar: Scalar) -> Parts:
        kind = scalar.dtype.part
        if isinstance(scalar, s.Const):
            value = complex(scalar.value)
            return s.const(value.real, kind), s.const(value.imag, kind)
        if isinstance(scalar, s.Load):
            return self._load(scalar)
        if isinstance(scalar, s.Cast) and not _is_complex(scalar.operand.dtype):
            return s.cast(self(scalar.operand), kind), s.const(0, kind, scalar.lanes)
        if isinstance(scalar, s.Bitcast):
            bits = bitcast(self(scalar.operand), U64)
            low, high = (s.cast(part, U32) for part in (bits, binary("shr", bits, s.const(32, U64))))
            return bitcast(low, F32), bitcast(high, F32)
        operands = [self.parts(child) for child in scalar.children if _is_complex(child.dtype)]
        if isinstance(scalar, s.Binary) and scalar.op in _ARITHMETIC:
            return _ARITHMETIC[scalar.op](operands[0], operands[1])
        if isinstance(scalar, s.Fma):
            return _sum(_product(operands[0], operands[1]), operands[2])
        if isinstance(scalar, s.Select):
            return _either(self(scalar.condition), operands[0], operands[1])
        if isinstance(scalar, s.Cast):
            return s.cast(operands[0][0], kind), s.cast(operands[0][1], kind)
        linear = isinstance(scalar, s.Broadcast | s.Vector | s.Shuffle)
        linear |= isinstance(scalar, s.Unary) and scalar.op == "neg"
        linear |= isinstance(scalar, s.Horizontal) and scalar.op == "add"
        if not linear:
            raise UnsupportedError(f"{getattr(scalar, 'op', type(scalar).__name__)} of complex numbers is not compiled")
        real, imaginary = (_with_children(scalar, [pair[part] for pair in operands], kind) for part in (0, 1))
        return real, imaginary

    def _load(self, load: s.Load) -> Parts:
        offset, stride = self.dim(load.offset), self.dim(load.stride)
        predicate = None if load.predicate is None else self(load.predicate)
        if load.buffer.space == "register":
            real, imaginary = (s.load(part, offset, load.lanes, predicate) for part in _variables(load.buffer))
            return real, imaginary
        buffer = _doubled(load.buffer)
        real, imaginary = (s.load(buffer, offset * 2 + part, load.lanes, predicate, stride * 2) for part in (0, 1))
        return real, imaginary


def _with_children(scalar: Scalar, children: list[Scalar], dtype: DType) -> Scalar:
    """The expression over other ones, in the order of its fields."""
    given = iter(children)
    changes: dict[str, object] = {"dtype": dtype}
    for name in type(scalar).__dataclass_fields__:
        content = getattr(scalar, name)
        if isinstance(content, Scalar):
            changes[name] = next(given)
        elif isinstance(content, tuple) and content and isinstance(content[0], Scalar):
            changes[name] = tuple(next(given) for _ in content)
    return replace(scalar, **changes)  # type: ignore[arg-type]


def _split_block(block: Block, real: _Real) -> Block:
    return tuple(item for statement in block for item in _split_statement(statement, real))


def _split_statement(st: Statement, real: _Real) -> Iterator[Statement]:
    if isinstance(st, k.For):
        yield replace(st, extent=real.dim(st.extent), body=_split_block(st.body, real))
    elif isinstance(st, k.While):
        yield k.While(real(st.condition), _split_block(st.body, real))
    elif isinstance(st, k.If):
        yield k.If(real(st.condition), _split_block(st.then, real), _split_block(st.otherwise, real))
    elif isinstance(st, k.Store) and _is_complex(st.buffer.dtype):
        yield from _stores(st, real)
    elif isinstance(st, k.Define) and _is_complex(st.buffer.dtype):
        for variable, value in zip(_variables(st.buffer), real.parts(st.value), strict=True):
            yield k.Define(variable, value)
    elif isinstance(st, k.Alloc) and _is_complex(st.buffer.dtype):
        if st.buffer.space == "register":
            yield from map(k.Alloc, _variables(st.buffer))
        else:
            yield k.Alloc(_doubled(st.buffer))
    elif isinstance(st, k.Alias) and _is_complex(st.buffer.dtype):
        condition = None if st.condition is None else real(st.condition)
        otherwise = None if st.otherwise is None else _doubled(st.otherwise)
        yield k.Alias(_doubled(st.buffer), _doubled(st.source), real.dim(st.offset) * 2, condition, otherwise)
    elif isinstance(st, k.Intrinsic) and any(_is_complex(place.buffer.dtype) for place in st.places):
        raise UnsupportedError(f"{st.name} of complex numbers is not compiled")
    else:
        yield from k.rebuild((st,), real)


def _stores(st: k.Store, real: _Real) -> Iterator[Statement]:
    """Two stores; where the number replaces one that it is made of, both parts are computed before."""
    offset, stride = real.dim(st.offset), real.dim(st.stride)
    predicate = None if st.predicate is None else real(st.predicate)
    values = real.parts(st.value)
    if any(isinstance(part, s.Load) and part.buffer.name == st.buffer.name for part in s.walk(st.value)):
        kept = _variables(Buffer(f"{st.buffer.name}.next", st.buffer.dtype, 1, "register", st.value.lanes))
        for variable, value in zip(kept, values, strict=True):
            yield k.Define(variable, value)
        values = s.load(kept[0], 0, st.value.lanes), s.load(kept[1], 0, st.value.lanes)
    if st.buffer.space == "register":
        for variable, value in zip(_variables(st.buffer), values, strict=True):
            yield k.Store(variable, offset, value, predicate)
        return
    for part, value in enumerate(values):
        yield k.Store(_doubled(st.buffer), offset * 2 + part, value, predicate, stride * 2)


def _only_moves(block: Block) -> bool:
    """Whether statements do no more with complex numbers than to move them, each of 64 bits."""
    for st in k.walk(block):
        values = [getattr(st, name, None) for name in ("value", "condition", "predicate")]
        for root in filter(None, (value if isinstance(value, Scalar) else None for value in values)):
            for scalar in s.walk(root):
                moves = isinstance(scalar, s.Load | s.Select | s.Const | s.Broadcast | s.Vector | s.Shuffle)
                kinds = [scalar.dtype, *(child.dtype for child in scalar.children)]
                if any(_is_complex(dtype) for dtype in kinds) and (not moves or C128 in kinds):
                    return False
        if isinstance(st, k.Intrinsic) and any(_is_complex(place.buffer.dtype) for place in st.places):
            return False
    return True


def without_complex_types(kernel: Kernel) -> Kernel:
    """`kernel` with the parts in place of complex numbers; in memory nothing changes. A kernel that only moves numbers
    of 64 bits is left to `without_narrow_types`, which moves them whole."""
    if _only_moves(kernel.body):
        return kernel
    complex_names = {buffer.name for buffer in kernel.parameters if _is_complex(buffer.dtype)}
    # One part is stored while the other is still to be read: no operand may be the result's memory.
    aliases = tuple(pair for pair in kernel.aliases if not complex_names & set(pair))
    body = _split_block(kernel.body, _Real())
    return replace(kernel, parameters=tuple(map(_doubled, kernel.parameters)), body=body, aliases=aliases)
