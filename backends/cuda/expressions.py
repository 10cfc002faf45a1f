"""Scalar and vector expressions as CUDA C.

A vector is as many C expressions as it has lanes; memory moves it in pieces of 16 bytes where it is aligned. f16 and
bf16 are float in registers, rounded where a Cast or a Store makes them narrow, as in every backend. Loads and values
that are used more than once are named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ...ir import scalars as s
from ...ir.dims import Dim, Extremum, Opaque, Quotient, Sum, Symbol, atoms, bounds, remainder_in
from ...ir.dtypes import BOOL, F32, F64, I32, I64, U32, DType
from ...ir.intrinsics import CONVERSIONS, WARP_VALUES
from ...ir.scalars import Buffer, Scalar
from ...passes.guards import guard_loads
from .names import FLOAT32_SUFFIX, HALF, bare, joined, literal, memory_type, plain_name, register_type

PIECE = 16
"""Bytes that one instruction moves at most."""
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_BITWISE = {"and": "&", "or": "|", "xor": "^"}
_BOOL = {
    "and": "&&",
    "or": "||",
    "xor": "!=",
    "mul": "&&",
    "min": "&&",
    "add": "||",
    "max": "||",
    "eq": "==",
    "ne": "!=",
}
_INTEGER_CALLS = {
    "div": "div_or_zero", "rem": "rem_or_zero", "shl": "shift_left", "shr": "shift_right", "min": "minimum",
    "max": "maximum",
}  # fmt: skip
_FLOAT_CALLS = {
    "sqrt": "sqrt", "floor": "floor", "ceil": "ceil", "trunc": "trunc", "round": "rint", "abs": "fabs",
    "reciprocal_estimate": "reciprocal_estimate", "exp2_estimate": "exp2_estimate", "sigmoid": "sigmoid",
}  # fmt: skip
_OWN = ("sigmoid", "reciprocal_estimate", "exp2_estimate")
_NARROW = ("add", "sub", "mul", "min", "max", "and", "or", "xor")  # of indices, an index again
_LONG = 96


@dataclass(frozen=True)
class Variable:
    """A buffer in scope: the C name of its pointer, array or (size 1, in registers) variable."""

    name: str
    is_scalar: bool = False


@dataclass
class Frame:
    """The names that a block of statements has defined."""

    symbols: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, Variable] = field(default_factory=dict)


class ExpressionRenderer:
    """Appends the lines of a function; knows what its names mean by the frames of its blocks."""

    def __init__(self, index_type: str, rounds_products: bool = False):
        self.index_type, self.rounds_products = index_type, rounds_products
        self.lines: list[str] = []
        self.indent = "    "
        self.frames = [Frame()]
        self._taken: set[str] = set()
        self._count = 0
        self._values: dict[bytes, tuple[str, ...]] = {}
        self._uses: dict[bytes, int] = {}
        self._guarded: dict[int, tuple[Scalar, Scalar]] = {}

    # Names

    def write(self, line: str) -> None:
        self.lines.append(f"{self.indent}{line}")

    def unique(self, name: str) -> str:
        """A C name that nothing in the function has yet."""
        name, number = plain_name(name), 1
        wanted = name
        while wanted in self._taken:
            number += 1
            wanted = f"{name}_{number}"
        self._taken.add(wanted)
        return wanted

    def release(self, name: str) -> None:
        """Makes the name of a loop's index free again: the loop has ended."""
        self._taken.discard(name)

    def define(self, kind: str, text: str, stem: str = "v") -> str:
        """A new constant of the function with this value."""
        self._count += 1
        name = f"{stem}{self._count}"
        self._taken.add(name)
        self.write(f"const {kind} {name} = {bare(text)};")
        return name

    def find_symbol(self, name: str) -> str:
        for frame in reversed(self.frames):
            if name in frame.symbols:
                return frame.symbols[name]
        raise AssertionError(f"no symbol {name} in scope")

    def find_buffer(self, name: str) -> Variable:
        for frame in reversed(self.frames):
            if name in frame.buffers:
                return frame.buffers[name]
        raise AssertionError(f"no buffer {name} in scope")

    # Statements' expressions

    def begin(self, *roots: Scalar | Dim | None) -> list[Any]:
        """The expressions of the next statement, with guarded loads; values of the last one are forgotten."""
        self._values.clear()
        self._uses.clear()
        ready: list[Any] = []
        for root in roots:
            if isinstance(root, Scalar):
                found = self._guarded.get(id(root))
                if found is None:
                    found = self._guarded[id(root)] = (root, guard_loads(root))
                root = found[1]
            ready.append(root)
        seen: set[bytes] = set()
        for root in ready:
            self._count_uses(root, seen)
        return ready

    def _count_uses(self, item: Any, seen: set[bytes]) -> None:
        """How often each part is asked for; parts of a part that is named once count once."""
        waiting = [item]
        while waiting:
            item = waiting.pop()
            if isinstance(item, Sum):
                waiting += [atom.value for atom in atoms(item) if isinstance(atom, Opaque)]
            elif isinstance(item, Scalar):
                self._uses[item.digest] = self._uses.get(item.digest, 0) + 1
                if item.digest not in seen:
                    seen.add(item.digest)
                    waiting += [*item.children, *item.dims]

    def value(self, scalar: Scalar) -> str:
        """The C expression of a value of one lane."""
        (text,) = self.lanes(scalar)
        return text

    def lanes(self, scalar: Scalar) -> tuple[str, ...]:
        """The C expressions of all lanes."""
        found = self._values.get(scalar.digest)
        if found is None:
            found = _RENDER[type(scalar)](self, scalar)
            assert len(found) == scalar.lanes, f"{type(scalar).__name__} of {scalar.lanes} lanes gave {len(found)}"
            if self._uses.get(scalar.digest, 0) > 1 or any(len(text) > _LONG for text in found):
                kind = register_type(scalar.dtype)
                found = tuple(text if _is_short(text) else self.define(kind, text) for text in found)
            self._values[scalar.digest] = found
        return found

    def named(self, scalar: Scalar) -> tuple[str, ...]:
        """All lanes as names or literals, which a text may repeat."""
        kind = register_type(scalar.dtype)
        found = tuple(text if _is_short(text) else self.define(kind, text) for text in self.lanes(scalar))
        self._values[scalar.digest] = found
        return found

    # Indices

    def dim(self, dim: Dim) -> str:
        """An index in the kernel's index type."""
        if isinstance(dim, int):
            return str(dim)
        found = remainder_in(dim)
        if found is not None:
            rest, factor, numerator, denominator = found
            text, sign = self._remainder(numerator, denominator), "+"
            if isinstance(factor, int) and factor < 0 and rest != 0:
                factor, sign = -factor, "-"
            text = joined(text) if factor == 1 else f"{joined(self.dim(factor))} * {joined(text)}"
            return bare(text) if rest == 0 else f"{self.dim(rest)} {sign} {text}"
        parts: list[str] = []
        positive = any(monomial and coefficient > 0 for monomial, coefficient in dim.terms)
        for monomial, coefficient in sorted(dim.terms, key=lambda term: (not term[0] and positive, term[1] < 0)):
            factors = [joined(self._atom(atom)) for atom in monomial]
            if abs(coefficient) != 1 or not factors:
                factors.append(str(abs(coefficient)))
            sign = "-" if coefficient < 0 else "+" if parts else ""
            parts.append((f" {sign} " if parts else sign) + " * ".join(factors))
        return "".join(parts)

    def _remainder(self, numerator: Dim, denominator: Dim) -> str:
        a, b = self.dim(numerator), self._divisor(denominator)
        if (bounds(numerator)[0] or -1) >= 0 or bounds(numerator)[0] == 0:
            return f"{joined(a)} % {joined(b)}"
        return f"floor_mod({self.index_type}({a}), {self.index_type}({b}))"

    def _divisor(self, denominator: Dim) -> str:
        text = self.dim(denominator)
        if isinstance(denominator, int) or (bounds(denominator)[0] or 0) >= 1:
            return text
        return f"maximum({text}, ({self.index_type})1)"  # a zero only occurs in empty tensors, but must not trap

    def _atom(self, atom: Symbol | Quotient | Extremum | Opaque) -> str:
        if isinstance(atom, Symbol):
            return self.find_symbol(atom.name)
        if isinstance(atom, Opaque):
            assert isinstance(atom.value, Scalar)
            value = atom.value
            if self.index_type == "int" and isinstance(value, s.Cast) and value.operand.dtype == I32:
                return self.value(value.operand)
            narrow = self.narrow(atom.value)
            return narrow if narrow is not None else f"({self.index_type}){joined(self.value(atom.value))}"
        if isinstance(atom, Quotient):
            a, b = self.dim(atom.numerator), self._divisor(atom.denominator)
            if (bounds(atom.numerator)[0] or -1) >= 0 or bounds(atom.numerator)[0] == 0:
                return f"({joined(a)} / {joined(b)})"
            return f"floor_div({self.index_type}({a}), {self.index_type}({b}))"
        first, *others = (self.dim(operand) for operand in atom.operands)
        for other in others:
            first = f"{atom.kind}imum({self.index_type}({first}), {self.index_type}({other}))"
        return first

    def narrow(self, scalar: Scalar) -> str | None:
        """An i64 that is made of indices alone, in the kernel's index type; None for any other."""
        if isinstance(scalar, s.Index):
            return self.dim(scalar.dim)
        if isinstance(scalar, s.Const) and scalar.dtype == I64 and abs(int(scalar.value)) < 1 << 30:
            return str(int(scalar.value))
        if isinstance(scalar, s.Binary) and scalar.dtype == I64 and scalar.op in _NARROW:
            a, b = self.narrow(scalar.left), self.narrow(scalar.right)
            if a is None or b is None:
                return None
            if scalar.op in ("min", "max"):
                return f"{scalar.op}imum({self.index_type}({a}), {self.index_type}({b}))"
            return f"({joined(a)} {(_INFIX | _BITWISE)[scalar.op]} {joined(b)})"
        return None

    # Values

    def _each(self, scalar: Scalar, make: Callable[..., str], *operands: Scalar) -> tuple[str, ...]:
        """make(a, b, ...) for each lane of the operands."""
        columns = [self.lanes(operand) for operand in operands]
        return tuple(make(*(joined(text) for text in row)) for row in zip(*columns, strict=True))

    def _const(self, scalar: s.Const) -> tuple[str, ...]:
        return (literal(scalar.dtype, scalar.value),)

    def _index(self, scalar: s.Index) -> tuple[str, ...]:
        return (f"(i64){joined(self.dim(scalar.dim))}",)

    def _lanes(self, scalar: s.Lanes) -> tuple[str, ...]:
        return tuple(literal(I64, lane) for lane in range(scalar.lanes))

    def _broadcast(self, scalar: s.Broadcast) -> tuple[str, ...]:
        return self.named(scalar.operand) * scalar.lanes if scalar.lanes > 1 else self.lanes(scalar.operand)

    def _vector(self, scalar: s.Vector) -> tuple[str, ...]:
        return tuple(self.value(element) for element in scalar.elements)

    def _shuffle(self, scalar: s.Shuffle) -> tuple[str, ...]:
        both = (*self.named(scalar.left), *self.named(scalar.right))
        return tuple(both[lane] for lane in scalar.pick)

    def _horizontal(self, scalar: s.Horizontal) -> tuple[str, ...]:
        parts = list(self.named(scalar.operand))
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [
                self._combined(scalar.op, scalar.dtype, a, b) for a, b in zip(parts[:half], parts[half:], strict=True)
            ]
        return (parts[0],)

    def _unary(self, scalar: s.Unary) -> tuple[str, ...]:
        dtype, op, operand = scalar.operand.dtype, scalar.op, scalar.operand
        if op == "isnan":
            return tuple(f"({x} != {x})" for x in self.named(operand))
        if op == "neg":
            return self._each(scalar, lambda x: self._wrapped(dtype, f"-{x}", f"0 - (u{dtype.bits}){x}"), operand)
        if op == "not":
            return self._each(scalar, lambda x: f"!{x}" if dtype == BOOL else f"({memory_type(dtype)})~{x}", operand)
        if op == "abs" and not dtype.is_float:
            kind = memory_type(dtype)
            if dtype.kind == "uint":
                return self.lanes(operand)
            return tuple(f"({x} < 0 ? ({kind})(0 - (u{dtype.bits}){x}) : {x})" for x in self.named(operand))
        if op == "popcount":
            return self._each(scalar, lambda x: f"({memory_type(dtype)})popcount({x})", operand)
        assert dtype.is_float, f"{op} of {dtype}"
        name = _FLOAT_CALLS.get(op, op) + ("" if op in _OWN else FLOAT32_SUFFIX[dtype])
        columns = self.lanes(operand)
        return tuple(f"{name}({bare(x)})" for x in columns)

    @staticmethod
    def _wrapped(dtype: DType, plain: str, unsigned: str) -> str:
        """Arithmetic modulo 2^bits: C leaves the overflow of signed integers undefined and widens narrow ones."""
        if not dtype.is_integer:
            return f"({plain})"
        return f"({memory_type(dtype)})({unsigned if dtype.bits >= 32 and dtype.kind == 'int' else plain})"

    def _combined(self, op: str, dtype: DType, a: str, b: str) -> str:
        """a op b of one element type."""
        if dtype == BOOL:
            return f"({a} {_BOOL[op]} {b})"
        if op in ("lt", "le", "eq", "ne"):
            return f"({a} {_INFIX[op]} {b})"
        if dtype.is_float:
            if op in ("min", "max"):
                return f"{op}imum({bare(a)}, {bare(b)})"
            if op in ("rem", "pow"):
                return f"{'fmod' if op == 'rem' else 'pow'}{FLOAT32_SUFFIX[dtype]}({bare(a)}, {bare(b)})"
            if op == "mul" and self.rounds_products:
                return f"rounded_product({bare(a)}, {bare(b)})"
            return f"({a} {_INFIX[op]} {b})"
        kind = memory_type(dtype)
        if op == "pow":
            return f"({kind})power((i64){a}, (i64){b})"
        if op in _INTEGER_CALLS:
            return f"{_INTEGER_CALLS[op]}(({kind}){a}, ({kind}){b})"
        if op in _BITWISE:
            return f"({kind})({a} {_BITWISE[op]} {b})" if dtype.bits < 32 else f"({a} {_BITWISE[op]} {b})"
        sign = _INFIX[op]
        return self._wrapped(dtype, f"{a} {sign} {b}", f"(u{dtype.bits}){a} {sign} (u{dtype.bits}){b}")

    def _binary(self, scalar: s.Binary) -> tuple[str, ...]:
        op, dtype = scalar.op, scalar.left.dtype
        if dtype == I64 and scalar.lanes == 1:
            a, b = self.narrow(scalar.left), self.narrow(scalar.right)
            if a is not None and b is not None and op in s.COMPARISONS:
                return (f"({joined(a)} {_INFIX[op]} {joined(b)})",)
        if dtype.is_integer and op in ("div", "rem", "shl", "shr"):
            known = scalar.right.operand if isinstance(scalar.right, s.Broadcast) else scalar.right
            while isinstance(known, s.Cast) and known.operand.dtype == I64:
                known = known.operand
            low, high = _bounds(known)
            if low is not None and high is not None and _is_safe(op, dtype, low, high):
                sign = {"div": "/", "rem": "%", "shl": "<<", "shr": ">>"}[op]
                kind = memory_type(dtype)
                left = f"(u{dtype.bits})" if op == "shl" else ""
                return self._each(scalar, lambda a, b: f"({kind})({left}{a} {sign} {b})", scalar.left, scalar.right)
        return self._each(scalar, lambda a, b: self._combined(op, dtype, a, b), scalar.left, scalar.right)

    def _select(self, scalar: s.Select) -> tuple[str, ...]:
        yes = scalar.yes
        if (
            isinstance(yes, s.Load)
            and yes.lanes == 1
            and yes.predicate == scalar.condition
            and self._uses[yes.digest] == 1
        ):
            # C reads only what is chosen: the load's own guard would say the same again.
            (condition,), (otherwise,) = self.named(scalar.condition), self.lanes(scalar.no)
            (text,) = self._load(replace(yes, predicate=None))
            return (f"({condition} ? {joined(text)} : {joined(otherwise)})",)
        return self._each(scalar, lambda c, a, b: f"({c} ? {a} : {b})", scalar.condition, scalar.yes, scalar.no)

    def _fma(self, scalar: s.Fma) -> tuple[str, ...]:
        dtype = scalar.dtype
        if not dtype.is_float:
            product = s.binary("mul", scalar.a, scalar.b)
            return self.lanes(s.binary("add", product, scalar.c))
        name = f"fma{FLOAT32_SUFFIX[dtype]}"
        return self._each(
            scalar, lambda a, b, c: f"{name}({bare(a)}, {bare(b)}, {bare(c)})", scalar.a, scalar.b, scalar.c
        )

    def _call(self, scalar: s.Call) -> tuple[str, ...]:
        assert scalar.name in WARP_VALUES or scalar.name in CONVERSIONS, f"no intrinsic {scalar.name} on a GPU"
        arguments = ", ".join(bare(self.value(argument)) for argument in scalar.arguments)
        # Named at once: all threads of the warp must come by here, whatever becomes of the value.
        return (self.define(register_type(scalar.dtype), f"{scalar.name}({arguments})"),)

    # Conversions

    def _cast(self, scalar: s.Cast) -> tuple[str, ...]:
        source, wanted = scalar.operand.dtype, scalar.dtype
        if isinstance(scalar.operand, s.Index) and wanted in (I32, U32) and self.index_type == "int":
            text = joined(self.dim(scalar.operand.dim))
            return (text if wanted == I32 else f"(u32){text}",)
        return self._each(scalar, lambda x: converted(x, source, wanted), scalar.operand)

    def _bitcast(self, scalar: s.Bitcast) -> tuple[str, ...]:
        source, wanted = scalar.operand.dtype, scalar.dtype

        def bits(x: str) -> str:
            x = narrowed(x, source) if source in HALF else x
            if wanted in HALF:
                return f"{wanted}_to_f32(({wanted}){x})"
            return f"bits_as<{memory_type(wanted)}>({'(u16)' if source in HALF else ''}{x})"

        return self._each(scalar, bits, scalar.operand)

    # Loads

    def element(self, buffer: Buffer, offset: Dim, lane: int = 0, stride: Dim = 1) -> str:
        """An element as an operand or a target."""
        found = self.find_buffer(buffer.name)
        if found.is_scalar:
            return found.name
        if buffer.space == "register" and buffer.lanes > 1:
            offset = offset * buffer.lanes
        return f"{found.name}[{self.dim(offset + stride * lane)}]"

    def pieces(self, dtype: DType, lanes: int, stride: Dim, aligned: bool, buffer: Buffer) -> int:
        """How many elements one access moves."""
        if not aligned or stride != 1 or lanes == 1 or buffer.space == "register":
            return 1
        return min(lanes, PIECE // dtype.bytes)

    def _load(self, scalar: s.Load) -> tuple[str, ...]:
        buffer, lanes, dtype = scalar.buffer, scalar.lanes, scalar.dtype
        if buffer.space == "register":
            return tuple(self.element(buffer, scalar.offset, lane) for lane in range(lanes))
        if scalar.predicate is None:
            if self.pieces(dtype, lanes, scalar.stride, scalar.aligned, buffer) > 1:
                return tuple(from_memory(text, dtype) for text in self.packed(scalar))
            texts = [self.element(buffer, scalar.offset, lane, scalar.stride) for lane in range(lanes)]
            return tuple(from_memory(text, dtype) for text in texts)
        uniform = isinstance(scalar.predicate, s.Broadcast)
        if uniform and self.pieces(dtype, lanes, scalar.stride, scalar.aligned, buffer) > 1:
            return tuple(from_memory(text, dtype) for text in self.packed(scalar))
        conditions = self.named(scalar.predicate.operand) * lanes if uniform else self.lanes(scalar.predicate)  # type: ignore[attr-defined]
        zero = literal(dtype, 0)
        found = []
        for lane, condition in enumerate(conditions):
            text = from_memory(self.element(buffer, scalar.offset, lane, scalar.stride), dtype)
            found.append(f"({joined(condition)} ? {text} : {zero})")
        return tuple(found)

    def packed(self, load: s.Load) -> list[str]:
        """The elements of an aligned load as memory holds them, moved in pieces; zeros where its condition is false."""
        kind = memory_type(load.buffer.dtype)
        size = self.pieces(load.buffer.dtype, load.lanes, 1, True, load.buffer)
        pointer, pack = self.find_buffer(load.buffer.name).name, f"Pack<{kind}, {size}>"
        condition = ""
        if isinstance(load.predicate, s.Broadcast):
            condition = self.named(load.predicate.operand)[0]
        texts: list[str] = []
        for start in range(0, load.lanes, size):
            text = f"*(const {pack}*)({pointer} + {self.dim(load.offset + start)})"
            text = f"{condition} ? {text} : {pack}{{}}" if condition else text
            name = self.define(pack, text, "p")
            texts += [f"{name}.lane[{lane}]" for lane in range(size)]
        return texts


def _is_short(text: str) -> bool:
    """Whether a text is a name or a literal."""
    return text.replace("_", "").replace(".", "").isalnum()


def _bounds(scalar: Scalar) -> tuple[int | None, int | None]:
    """What is known of an integer."""
    if isinstance(scalar, s.Const):
        return int(scalar.value), int(scalar.value)
    return bounds(scalar.dim) if isinstance(scalar, s.Index) else (None, None)


def _is_safe(op: str, dtype: DType, low: int, high: int) -> bool:
    """Whether C's operator means the same for a right operand within bounds."""
    if op in ("shl", "shr"):
        return low >= 0 and high < dtype.bits
    return low > 0 or (high < -1)


def from_memory(text: str, dtype: DType) -> str:
    """A value in a register, from its form in memory."""
    if dtype in HALF:
        return f"{dtype}_to_f32({text})"
    return f"({text} != 0)" if dtype == BOOL else text


def narrowed(text: str, dtype: DType) -> str:
    """The bits of a float rounded to a half type; what was just widened is only unpacked again."""
    widening, _, bits = text.partition("_to_f32")
    if widening == str(dtype) and bare(bits) != bits:
        return bare(bits)
    return f"f32_to_{dtype}({bare(text)})"


def to_memory(text: str, dtype: DType) -> str:
    """A value in the form that memory holds."""
    return narrowed(text, dtype) if dtype in HALF else f"(u8){joined(text)}" if dtype == BOOL else text


def converted(x: str, source: DType, wanted: DType) -> str:
    """Conversion as ONNX's Cast; floats to narrow integers by way of i32 and i64, wrapping, as numpy does on x86."""
    if wanted == BOOL:
        return f"({x} != 0)"
    if wanted in HALF:
        if source == F64:
            return f"{wanted}_to_f32(f64_to_{wanted}({bare(x)}))"
        x = x if source in (F32, *HALF) else f"(float){x}"
        return f"{wanted}_to_f32(f32_to_{wanted}({bare(x)}))"
    if source in HALF and wanted == F32:
        return x
    kind = memory_type(wanted)
    if source.is_float and wanted.is_integer and (wanted.bits < 32 or wanted.kind == "uint"):
        if wanted.bits == 64:
            return f"to_u64({bare(x)})"
        return f"({kind})({'i32' if wanted.bits < 32 else 'i64'}){x}"
    return f"({kind}){x}"


_RENDER: dict[type[Scalar], Callable[[Any, Any], tuple[str, ...]]] = {
    s.Const: ExpressionRenderer._const,
    s.Index: ExpressionRenderer._index,
    s.Lanes: ExpressionRenderer._lanes,
    s.Load: ExpressionRenderer._load,
    s.Unary: ExpressionRenderer._unary,
    s.Binary: ExpressionRenderer._binary,
    s.Select: ExpressionRenderer._select,
    s.Cast: ExpressionRenderer._cast,
    s.Bitcast: ExpressionRenderer._bitcast,
    s.Fma: ExpressionRenderer._fma,
    s.Broadcast: ExpressionRenderer._broadcast,
    s.Vector: ExpressionRenderer._vector,
    s.Shuffle: ExpressionRenderer._shuffle,
    s.Horizontal: ExpressionRenderer._horizontal,
    s.Call: ExpressionRenderer._call,
}
