"""LLVM IR text at its lowest level: types, literals, instructions, names in scope, index arithmetic and addresses."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from ...ir import scalars as s
from ...ir.dims import Atom, Dim, Opaque, Quotient, Symbol, bounds
from ...ir.dtypes import BOOL, F64, I64, DType
from ...ir.errors import UnsupportedError
from ...ir.scalars import Buffer, Scalar
from ...ir.target import Target
from .legalize import known_constant

Value: TypeAlias = int | str
"""An i64: known, or the name of an SSA value."""

_INTEGERS = ("i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64")
_REGISTER = {"f32": "float", "f64": "double", "f16": "float", "bf16": "float", "bool": "i1"} | {
    name: f"i{name[1:]}" for name in _INTEGERS
}
_MEMORY = _REGISTER | {"f16": "i16", "bf16": "i16", "bool": "i8"}


def register_type(dtype: DType, lanes: int = 1) -> str:
    """LLVM's type of a value in a register."""
    return vector_type(_table(_REGISTER, dtype), lanes)


def memory_type(dtype: DType, lanes: int = 1) -> str:
    """LLVM's type of elements in memory."""
    return vector_type(_table(_MEMORY, dtype), lanes)


def _table(table: Mapping[str, str], dtype: DType) -> str:
    found = table.get(dtype.name)
    if found is None:
        raise UnsupportedError(f"the CPU backend has no arithmetic on {dtype}")
    return found


def vector_type(element: str, lanes: int) -> str:
    return element if lanes == 1 else f"<{lanes} x {element}>"


def quoted(name: str) -> str:
    """A name as LLVM spells it after % or @."""
    if re.fullmatch(r"[A-Za-z_][\w.$-]*", name, re.ASCII):
        return name
    return (
        '"'
        + "".join(c if " " <= c <= "~" and c not in '"\\' else "".join(f"\\{b:02X}" for b in c.encode()) for c in name)
        + '"'
    )


def literal(dtype: DType, value: s.Number) -> str:
    """A number as LLVM spells it."""
    if dtype == BOOL:
        return "true" if value else "false"
    if not dtype.is_float:
        return str(int(value))
    with np.errstate(over="ignore"):
        number = float(value) if dtype == F64 else float(np.asarray(value, dtype.numpy))
    if math.isfinite(number) and number == int(number) and abs(number) < 1e6:
        return f"{number:.1f}"
    return f"0x{struct.unpack('>Q', struct.pack('>d', number))[0]:016X}"


def splat(dtype: DType, lanes: int, value: s.Number) -> str:
    text = literal(dtype, value)
    return text if lanes == 1 else f"splat ({register_type(dtype)} {text})"


def constant_lanes(values: Sequence[int], element: str = "i64") -> str:
    return "<" + ", ".join(f"{element} {value}" for value in values) + ">"


@dataclass(frozen=True)
class Memory:
    """Where a buffer in scope begins; `roots` are the buffers it may point into, if it is an alias.

    In kernels that check themselves it lies in the `bytes` from `base` on, or these are None where no size tells."""

    pointer: str
    attributes: str = ""
    roots: frozenset[str] = frozenset()
    base: str = ""
    bytes: Value | None = None


@dataclass(frozen=True)
class Registers:
    """The variables of a register buffer, each a stack slot that LLVM promotes."""

    slots: tuple[str, ...]
    type: str


@dataclass
class Frame:
    """What a block of statements has defined: names, and values that need no second computation."""

    depth: int
    symbols: dict[str, tuple[Value, int]] = field(default_factory=dict)
    buffers: dict[str, Memory | Registers] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)


@dataclass
class ModuleText:
    """What the functions of one module share."""

    target: Target
    threaded: bool
    functions: list[str] = field(default_factory=list)
    helpers: dict[str, str] = field(default_factory=dict)
    zeros: int = 0
    guarded: dict[int, tuple[Scalar, Scalar]] = field(default_factory=dict)
    turns: dict[int, int] = field(default_factory=dict)
    checked: str = ""
    """What messages call the kernel, where it checks itself (see `bounds`)."""
    messages: dict[str, str] = field(default_factory=dict)
    spare: int = 0

    def weights(self, turns: int) -> int:
        """The number of the metadata that say how often a loop of so many turns goes on.

        Without them LLVM takes the innermost loop for the hottest one, and has been seen to keep the constants of a
        short loop after a matrix product in registers, and the sums of the product on the stack.
        """
        return self.turns.setdefault(turns, len(self.turns))


def mangled(kind: str) -> str:
    """The suffix by which LLVM's intrinsics tell types apart."""
    names = {"float": "f32", "double": "f64"}
    if not kind.startswith("<"):
        return names.get(kind, kind)
    lanes, _, element = kind[1:-1].split()
    return f"v{lanes}{names.get(element, element)}"


class AddressRenderer:
    """Appends instructions to a function; knows what its names mean by the frames of its blocks."""

    def __init__(self, module: ModuleText):
        self.module = module
        self.target = module.target
        self.lines: list[str] = []
        self.frames = [Frame(0)]
        self._count = 0

    # Instructions

    def fresh(self) -> str:
        self._count += 1
        return f"%.{self._count}"

    def emit(self, instruction: str) -> str:
        """The value of an instruction that depends on its operands alone, computed before if it was."""
        for frame in reversed(self.frames):
            found = frame.values.get(instruction)
            if found is not None:
                return found
        name = self.emit_effect(instruction)
        self.frames[-1].values[instruction] = name
        return name

    def emit_effect(self, instruction: str) -> str:
        """The value of an instruction that depends on memory or place."""
        name = self.fresh()
        self.lines.append(f"  {name} = {instruction}")
        return name

    def intrinsic(self, name: str, kind: str, *operands: str) -> str:
        """A call of llvm.`name` on operands of one type, which is the result's."""
        return self.emit(f"call {kind} @llvm.{name}.{mangled(kind)}({', '.join(f'{kind} {o}' for o in operands)})")

    def broadcast(self, element: str, value: Value, lanes: int) -> str:
        if lanes == 1 or not str(value).startswith("%"):
            return str(value) if lanes == 1 else f"splat ({element} {value})"
        kind = f"<{lanes} x {element}>"
        first = self.emit(f"insertelement {kind} poison, {element} {value}, i64 0")
        return self.emit(f"shufflevector {kind} {first}, {kind} poison, <{lanes} x i32> zeroinitializer")

    # Names

    def find_symbol(self, name: str) -> tuple[Value, int]:
        for frame in reversed(self.frames):
            found = frame.symbols.get(name)
            if found is not None:
                return found
        return self.capture_symbol(name)

    def find_buffer(self, name: str) -> Memory | Registers:
        for frame in reversed(self.frames):
            found = frame.buffers.get(name)
            if found is not None:
                return found
        return self.capture_buffer(name)

    def capture_symbol(self, name: str) -> tuple[Value, int]:
        raise AssertionError(f"no symbol {name} in scope")

    def capture_buffer(self, name: str) -> Memory | Registers:
        raise AssertionError(f"no buffer {name} in scope")

    # Index dims: each value with the depth of the innermost loop that it varies in

    def arithmetic(self, op: str, a: Value, b: Value) -> Value:
        """add or mul on i64, with what is known folded."""
        if isinstance(a, int) and isinstance(b, int):
            return a + b if op == "add" else a * b
        if isinstance(a, int):
            a, b = b, a
        if b == (0 if op == "add" else 1):
            return a
        return self.emit(f"{op} nsw i64 {a}, {b}")

    def dim(self, dim: Dim) -> Value:
        return self._dim(dim)[0]

    def _dim(self, dim: Dim) -> tuple[Value, int]:
        if isinstance(dim, int):
            return dim, 0
        total: Value = 0
        groups, constant, _ = self._groups(dim)
        depth = 0
        for depth, value in groups:  # noqa: B007
            total = self.arithmetic("add", total, value)
        return self.arithmetic("add", total, constant), depth

    def _groups(self, dim: Dim) -> tuple[list[tuple[int, Value]], int, bool]:
        """`dim` as a sum of values of rising depth, a constant, and whether no partial sum can exceed the whole.

        Summed in this order the part that does not vary in a loop is one value, which LLVM computes before the loop.
        """
        if isinstance(dim, int):
            return [], dim, dim >= 0
        constant, rising = 0, True
        groups: dict[int, Value] = {}
        for monomial, coefficient in dim.terms:
            factors: list[tuple[int, str]] = []
            for atom in monomial:
                value, depth = self._atom(atom)
                rising = rising and isinstance(atom, Symbol) and atom.lower is not None and atom.lower >= 0
                if isinstance(value, int):
                    coefficient *= value
                else:
                    factors.append((depth, value))
            rising = rising and coefficient >= 0
            if not factors or coefficient == 0:
                constant += coefficient
                continue
            factors.sort()
            term: Value = self.arithmetic("mul", factors[0][1], coefficient)
            for _, factor in factors[1:]:
                term = self.arithmetic("mul", term, factor)
            depth = factors[-1][0]
            groups[depth] = self.arithmetic("add", groups[depth], term) if depth in groups else term
        return sorted(groups.items()), constant, rising and constant >= 0

    def _atom(self, atom: Atom) -> tuple[Value, int]:
        if isinstance(atom, Symbol):
            return self.find_symbol(atom.name)
        if isinstance(atom, Opaque):
            assert isinstance(atom.value, Scalar) and atom.value.dtype == I64, f"index {atom} is no i64"
            known = known_constant(atom.value)
            return (int(known), 0) if known is not None else (self.index_value(atom.value), self.frames[-1].depth)
        if isinstance(atom, Quotient):
            return self._quotient(atom)
        operands = [self._dim(operand) for operand in atom.operands]
        depth = max(depth for _, depth in operands)
        result, *others = (value for value, _ in operands)
        for other in others:
            if isinstance(result, int) and isinstance(other, int):
                result = min(result, other) if atom.kind == "min" else max(result, other)
            else:
                result = self.intrinsic(f"s{atom.kind}", "i64", str(result), str(other))
        return result, depth

    def _quotient(self, atom: Quotient) -> tuple[Value, int]:
        (a, depth), (b, other_depth) = self._dim(atom.numerator), self._dim(atom.denominator)
        depth = max(depth, other_depth)
        if isinstance(a, int) and isinstance(b, int):
            return (a // b if b else 0), depth
        if isinstance(b, int) and b & (b - 1) == 0:
            return self.emit(f"ashr i64 {a}, {b.bit_length() - 1}") if b > 1 else a, depth
        if not isinstance(b, int) and (bounds(atom.denominator)[0] or 0) < 1:
            b = self.intrinsic("smax", "i64", b, "1")  # a zero only occurs in empty tensors, but must not trap
        lower = bounds(atom.numerator)[0]
        if lower is not None and lower >= 0:
            return self.emit(f"udiv i64 {a}, {b}"), depth
        quotient = self.emit(f"sdiv i64 {a}, {b}")
        rest = self.emit(f"srem i64 {a}, {b}")
        borrow = self.emit(f"ashr i64 {rest}, 63")
        return self.emit(f"add nsw i64 {quotient}, {borrow}"), depth

    # Addresses

    def memory(self, buffer: Buffer) -> Memory:
        found = self.find_buffer(buffer.name)
        assert isinstance(found, Memory), f"{buffer} is a register, not memory"
        return found

    def address(self, buffer: Buffer, offset: Dim, surely_inside: bool = True) -> str:
        """The address of an element. Loop-invariant parts come first, the constant last, as x86 adds it for nothing."""
        pointer, element = self.memory(buffer).pointer, memory_type(buffer.dtype)
        groups, constant, rising = self._groups(offset)
        flag = " inbounds" if rising and surely_inside and not self.module.checked else ""
        for _, value in [*groups, (0, constant)]:
            if value != 0:
                pointer = self.emit(f"getelementptr{flag} {element}, ptr {pointer}, i64 {value}")
        return pointer

    def element(self, buffer: Buffer, pointer: str, index: Value) -> str:
        return (
            pointer
            if index == 0
            else self.emit(f"getelementptr {memory_type(buffer.dtype)}, ptr {pointer}, i64 {index}")
        )

    def element_pointers(self, buffer: Buffer, pointer: str, lanes: int, stride: Value) -> str:
        """A vector of addresses `stride` elements apart."""
        if isinstance(stride, int):
            offsets = constant_lanes([stride * lane for lane in range(lanes)])
        else:
            wide = self.broadcast("i64", stride, lanes)
            offsets = self.emit(f"mul <{lanes} x i64> {wide}, {constant_lanes(range(lanes))}")
        return self.emit(f"getelementptr {memory_type(buffer.dtype)}, ptr {pointer}, <{lanes} x i64> {offsets}")

    def register(self, buffer: Buffer, offset: Dim, lanes: int) -> tuple[str, str]:
        """(slot, type) of a register variable."""
        found = self.find_buffer(buffer.name)
        index = self.dim(offset)
        assert isinstance(found, Registers) and isinstance(index, int), f"register {buffer}[{offset}]: not a constant"
        assert lanes == buffer.lanes, f"register {buffer} of {buffer.lanes} lanes used with {lanes}"
        return found.slots[index], found.type

    def index_value(self, scalar: Scalar) -> str:
        """The run-time value of an index."""
        raise NotImplementedError
