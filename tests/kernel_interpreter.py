"""The kernel language executed on numpy arrays: the oracle for passes over kernels and for their renderers.

Slow and plain. Every value is an array with one entry per lane; arithmetic is that of numpy in the element type, so f32
results are exact. All accesses to memory are checked against the buffer's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxc.backends.cpu.dot_products import DOTS
from onnxc.ir import loops as k
from onnxc.ir import scalars as s
from onnxc.ir.dims import Dim, Opaque, substitute
from onnxc.ir.dtypes import F32, F64
from onnxc.ir.loops import Block, Kernel
from onnxc.ir.scalars import Scalar

Array = npt.NDArray[Any]

MATH: Mapping[str, Callable[[Array], Array]] = {
    "exp": np.exp, "log": np.log, "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "tan": np.tan, "sinh": np.sinh,
    "cosh": np.cosh, "log1p": np.log1p, "expm1": np.expm1, "exp2": np.exp2, "log2": np.log2, "asin": np.arcsin,
    "acos": np.arccos, "atan": np.arctan, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "sigmoid": lambda x: np.where(x < 0, np.exp(-np.abs(x)), 1.0) / (1.0 + np.exp(-np.abs(x))),
}  # fmt: skip
_UNARY: Mapping[str, Callable[[Array], Array]] = {
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "floor": np.floor, "ceil": np.ceil, "round": np.rint,
    "trunc": np.trunc, "not": np.invert, "isnan": np.isnan, "popcount": np.bitwise_count,
    "reciprocal_estimate": np.reciprocal, "exp2_estimate": np.exp2,
}  # fmt: skip
_BINARY: Mapping[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "lt": np.less, "le": np.less_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """(s, e) with s = round(a + b) and s + e = a + b exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _sum_to_odd(a: Array, b: Array) -> Array:
    """a + b rounded to odd: a second rounding to fewer bits is then exact (Boldo & Melquiond 2008)."""
    total, error = _two_sum(a, b)
    even = (total.view(np.int64) & 1) == 0
    nudge = even & (error != 0) & np.isfinite(total)
    return np.where(nudge, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def exact_fma(a: Array, b: Array, c: Array) -> Array:
    """a*b + c rounded once, in the operands' type (for f64 only where a*b neither overflows nor underflows)."""
    if a.dtype != np.float64:
        product = a.astype(np.float64) * b.astype(np.float64)
        return _sum_to_odd(product, c.astype(np.float64)).astype(a.dtype)
    with np.errstate(all="ignore"):
        high = a * b
        split_a, split_b = a * 134217729.0, b * 134217729.0
        a1, b1 = split_a - (split_a - a), split_b - (split_b - b)
        low = ((a1 * b1 - high) + a1 * (b - b1) + (a - a1) * b1) + (a - a1) * (b - b1)
        t1, t2 = _two_sum(c, low)
        v1, v2 = _two_sum(high, t1)
        exact = v1 + _sum_to_odd(t2, v2)
    return np.where(np.isfinite(exact), exact, high + c)


def _integer_power(base: Array, exponent: Array) -> Array:
    """Wrapping power of integers; a negative exponent gives the truncated reciprocal (0 for base 0)."""
    result, square, left = np.ones_like(base), base.copy(), np.abs(exponent.astype(np.int64))
    while left.any():
        result = np.where(left & 1, result * square, result)
        square, left = square * square, left >> 1
    unit = np.where(np.abs(base) == 1, result, 0).astype(base.dtype)
    return np.where(exponent < 0, unit, result)


def _binary(op: str, a: Array, b: Array) -> Array:
    if op in _BINARY:
        return _BINARY[op](a, b)
    whole = a.dtype.kind in "iu"
    if op == "pow":
        return _integer_power(a, b) if whole else np.power(a.astype(np.float64), b.astype(np.float64)).astype(a.dtype)
    if op in ("shl", "shr"):
        width = a.dtype.itemsize * 8
        inside = (b >= 0) & (b < width)
        amount = np.where(inside, b, 0).astype(a.dtype)
        return np.where(inside, a << amount if op == "shl" else a >> amount, 0).astype(a.dtype)
    if not whole:
        return a / b if op == "div" else np.fmod(a, b)
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    rest = np.fmod(a, safe)
    return np.where(b == 0, 0, rest if op == "rem" else (a - rest) // safe).astype(a.dtype)


class _Context:
    """Values known where the mask of active lanes is that of this context; a parent's mask is wider."""

    def __init__(self, parent: _Context | None, mask: Array | None):
        self.parent, self.mask = parent, mask
        self.values: dict[bytes, Array] = {}

    def find(self, digest: bytes) -> Array | None:
        context: _Context | None = self
        while context is not None:
            if digest in context.values:
                return context.values[digest]
            context = context.parent
        return None


class Interpreter:
    """Executes one kernel. `buffers` holds a flat array per parameter; those written are changed in place.

    `fused` says whether Fma rounds once. IndexError where a statement reads or writes outside a buffer.
    """

    def __init__(self, buffers: Mapping[str, Array], sizes: Mapping[str, int] | None = None, fused: bool = True):
        self.memory: dict[str, tuple[Array, int]] = {name: (array, 0) for name, array in buffers.items()}
        self.symbols: dict[str, int] = dict(sizes or {})
        self.fused = fused
        self._loads: dict[bytes, frozenset[bytes]] = {}

    def evaluate(self, scalar: Scalar) -> Array:
        """The value of an expression, an array with one entry per lane."""
        with np.errstate(all="ignore"):
            return self._value(scalar, _Context(None, None))

    def dim(self, dim: Dim, context: _Context | None = None) -> int:
        """The value of an index."""
        if isinstance(dim, int):
            return dim
        if context is not None and context.mask is not None and len(context.mask) > 1:
            context = _Context(context, np.array([context.mask.any()]))
        names = {name: value for name, value in self.symbols.items() if name in s.free_symbols(dim)}

        def opaque(atom: Opaque) -> Dim:
            assert isinstance(atom.value, Scalar)
            value = int(self._value(atom.value, context or _Context(None, None))[0])
            low, high = atom.lower, None if atom.upper is None else self.dim(atom.upper)
            if context is None or context.mask is None or context.mask.all():
                assert (low is None or low <= value) and (high is None or value <= high), f"{value} for {atom}"
            return value

        result = substitute(dim, names, opaque)
        if not isinstance(result, int):
            raise KeyError(f"unbound symbols in {result}")
        return result

    def run(self, block: Block) -> None:
        with np.errstate(all="ignore"):
            self._block(block)

    # Statements.

    def _block(self, block: Block) -> None:
        memory, symbols = dict(self.memory), dict(self.symbols)
        for statement in block:
            self._statement(statement)
        self.memory, self.symbols = memory, symbols

    def _statement(self, statement: k.Statement) -> None:
        if isinstance(statement, k.For):
            for position in range(0, self.dim(statement.extent), statement.step):
                self.symbols[statement.index] = position
                self._block(statement.body)
            self.symbols.pop(statement.index, None)
        elif isinstance(statement, k.Let):
            value = statement.value
            self.symbols[statement.name] = (
                int(self.evaluate(value)[0]) if isinstance(value, Scalar) else self.dim(value)
            )
        elif isinstance(statement, k.Define):
            self._allocate(statement.buffer)
            self._store(statement.buffer, 0, self.evaluate(statement.value), None, 1)
        elif isinstance(statement, k.Alloc):
            self._allocate(statement.buffer)
        elif isinstance(statement, k.Alias):
            source, start = self.memory[statement.source.name]
            start += self.dim(statement.offset)
            if statement.condition is not None and not self.evaluate(statement.condition)[0]:
                assert statement.otherwise is not None
                source, start = self.memory[statement.otherwise.name]
            wanted = np.dtype(statement.buffer.dtype.numpy)
            if wanted.itemsize != source.itemsize:  # Groups of elements as one.
                ratio = max(1, wanted.itemsize // source.itemsize)
                start *= source.itemsize
                assert start % wanted.itemsize == 0
                source, start = source[: len(source) // ratio * ratio].view(wanted), start // wanted.itemsize
            self.memory[statement.buffer.name] = source, start
        elif isinstance(statement, k.Store):
            predicate = None if statement.predicate is None else self.evaluate(statement.predicate)
            if predicate is not None and not predicate.any():
                return
            stored = self.evaluate(statement.value)
            self._store(statement.buffer, self.dim(statement.offset), stored, predicate, self.dim(statement.stride))
        elif isinstance(statement, k.If):
            self._block(statement.then if self.evaluate(statement.condition)[0] else statement.otherwise)
        elif isinstance(statement, k.While):
            while self.evaluate(statement.condition)[0]:
                self._block(statement.body)
        elif not (isinstance(statement, k.Intrinsic) and statement.name == "prefetch"):
            raise NotImplementedError("a barrier has no meaning in sequential execution")

    def _allocate(self, buffer: s.Buffer) -> None:
        count = self.dim(buffer.size) * (buffer.lanes if buffer.space == "register" else 1)
        content = np.frombuffer(b"\x7b" * (count * buffer.dtype.numpy.itemsize), buffer.dtype.numpy).copy()
        self.memory[buffer.name] = content != 0 if buffer.dtype.name == "bool" else content, 0

    def _positions(self, buffer: s.Buffer, offset: int, lanes: int, stride: int) -> tuple[Array, npt.NDArray[np.int64]]:
        array, start = self.memory[buffer.name]
        if buffer.space == "register":
            assert lanes == buffer.lanes, f"{lanes} lanes of register {buffer} of {buffer.lanes}"
            offset *= lanes
        return array, start + offset + np.arange(lanes, dtype=np.int64) * stride

    def _store(self, buffer: s.Buffer, offset: int, value: Array, predicate: Array | None, stride: int) -> None:
        array, where = self._positions(buffer, offset, len(value), stride)
        active = np.ones(len(value), np.bool_) if predicate is None else predicate
        self._check(buffer, array, where[active])
        assert value.dtype == array.dtype, f"{value.dtype} stored to {buffer}: {array.dtype}"
        array[where[active]] = value[active]

    def _check(self, buffer: s.Buffer, array: Array, where: Array) -> None:
        if len(where) and (where.min() < 0 or where.max() >= len(array)):
            raise IndexError(f"{buffer}[{where.min()}..{where.max()}] of {len(array)}")

    # Expressions.

    def _reads(self, scalar: Scalar) -> frozenset[bytes]:
        """Digests of the loads in an expression."""
        found = self._loads.get(scalar.digest)
        if found is None:
            found = frozenset(part.digest for part in s.walk(scalar) if isinstance(part, s.Load))
            self._loads[scalar.digest] = found
        return found

    def _guarded(self, scalar: Scalar, condition: Array, context: _Context) -> Array:
        """An expression whose value matters only where the condition holds: its loads are not made elsewhere."""
        if condition.all() or all(context.find(digest) is not None for digest in self._reads(scalar)):
            return self._value(scalar, context)
        mask = condition if context.mask is None else condition & context.mask
        return self._value(scalar, _Context(context, mask))

    def _value(self, scalar: Scalar, context: _Context) -> Array:
        found = context.find(scalar.digest)
        if found is None:
            found = self._compute(scalar, context)
            assert found.shape == (scalar.lanes,) and found.dtype == scalar.dtype.numpy, (
                f"{found.dtype}{found.shape}: {scalar}"
            )
            context.values[scalar.digest] = found
        return found

    def _compute(self, scalar: Scalar, context: _Context) -> Array:
        dtype = scalar.dtype.numpy
        mask = context.mask
        if isinstance(scalar, s.Const):
            return np.array([scalar.value]).astype(dtype)
        if isinstance(scalar, s.Index):
            return np.array([self.dim(scalar.dim, context)], np.int64)
        if isinstance(scalar, s.Lanes):
            return np.arange(scalar.lanes, dtype=dtype)
        if isinstance(scalar, s.Load):
            return self._load(scalar, context)
        if isinstance(scalar, s.Select):
            condition = self._value(scalar.condition, context)
            yes = self._guarded(scalar.yes, condition, context)
            return np.where(condition, yes, self._guarded(scalar.no, ~condition, context))
        if isinstance(scalar, s.Broadcast):
            active = None if mask is None else np.array([mask.any()])
            inner = context if mask is None or len(mask) == 1 else _Context(context, active)
            return np.repeat(self._value(scalar.operand, inner), scalar.lanes)
        if isinstance(scalar, s.Vector):
            inner_contexts = [
                context if mask is None else _Context(context, mask[i : i + 1]) for i in range(scalar.lanes)
            ]
            return np.concatenate([self._value(e, c) for e, c in zip(scalar.elements, inner_contexts, strict=True)])
        if isinstance(scalar, s.Shuffle | s.Horizontal):
            context = context if mask is None else _Context(context, None)
        parts = [self._value(child, context) for child in scalar.children]
        return self._combine(scalar, parts, dtype)

    def _load(self, scalar: s.Load, context: _Context) -> Array:
        active = np.ones(scalar.lanes, np.bool_)
        if context.mask is not None:
            active = active & context.mask
        if scalar.predicate is not None:
            active = active & self._value(scalar.predicate, context)
        result = np.zeros(scalar.lanes, scalar.dtype.numpy)
        if active.any():
            offset, stride = self.dim(scalar.offset, context), self.dim(scalar.stride, context)
            array, where = self._positions(scalar.buffer, offset, scalar.lanes, stride)
            self._check(scalar.buffer, array, where[active])
            result[active] = array[where[active]]
        return result

    def _combine(self, scalar: Scalar, parts: list[Array], dtype: np.dtype[np.generic]) -> Array:
        if isinstance(scalar, s.Unary):
            if scalar.op in s.MATH:
                return MATH[scalar.op](parts[0].astype(np.float64)).astype(dtype)
            return _UNARY[scalar.op](parts[0]).astype(dtype)
        if isinstance(scalar, s.Binary):
            return _binary(scalar.op, *parts)
        if isinstance(scalar, s.Cast):
            if dtype == np.bool_:
                return np.asarray(parts[0] != 0)
            source = parts[0].astype(np.float32) if parts[0].dtype.kind == "V" else parts[0]
            if scalar.saturate and scalar.dtype.is_float:
                source = np.clip(source, *scalar.dtype.limits)
            return source.astype(dtype)
        if isinstance(scalar, s.Bitcast):
            return parts[0].view(dtype)
        if isinstance(scalar, s.Fma):
            exact = self.fused and scalar.dtype in (F32, F64)
            return exact_fma(parts[0], parts[1], parts[2]) if exact else parts[0] * parts[1] + parts[2]
        if isinstance(scalar, s.Shuffle):
            return np.concatenate(parts)[list(scalar.pick)]
        if isinstance(scalar, s.Horizontal):
            result = parts[0][:1]
            for lane in range(1, len(parts[0])):
                result = _binary(scalar.op, result, parts[0][lane : lane + 1])
            return result
        if isinstance(scalar, s.Call) and scalar.name.startswith("pack_"):
            limits = np.iinfo(dtype)
            pieces = np.clip(parts, limits.min, limits.max).reshape(len(parts), -1, 4)
            return pieces.transpose(1, 0, 2).reshape(-1).astype(dtype)
        if isinstance(scalar, s.Call) and dtype.kind == "i":
            dot = DOTS[scalar.name]
            left, right = (
                part.view(kind.numpy).reshape(-1, dot.group).astype(dtype)
                for part, kind in zip(parts[1:], (dot.left, dot.right), strict=True)
            )
            return np.asarray(parts[0] + (left * right).sum(axis=1, dtype=dtype))
        raise NotImplementedError(type(scalar).__name__)


def run_kernel(
    kernel: Kernel, buffers: Mapping[str, Array], sizes: Mapping[str, int] | None = None, fused: bool = True
) -> None:
    """Runs a kernel on flat arrays, one per parameter by name; outputs are written in place."""
    interpreter = Interpreter(buffers, sizes, fused)
    for parameter in kernel.parameters:
        assert buffers[parameter.name].dtype == parameter.dtype.numpy, parameter.name
        assert len(buffers[parameter.name]) >= interpreter.dim(parameter.size), parameter.name
    interpreter.run(kernel.body)
