"""Runs definitions on numpy arrays, all elements of a tensor at once: what an operator's declaration says it computes.

Reads outside a buffer poison the element: a result that depends on one is an error, a guarded one is fine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnxc.ir import scalars as s
from onnxc.ir.dims import Dim, Extremum, Opaque, Quotient, Symbol, evaluate, symbol
from onnxc.ir.dtypes import BOOL, DType, of_numpy
from onnxc.ir.tensors import Tensor

CHUNK = 1 << 22
"""Reductions over more elements than this at once run one slice of their outermost range at a time."""

Result = tuple[np.ndarray, Any]
"""Values, and where they are poisoned (False: nowhere)."""


def evaluate_tensor(
    tensor: Tensor, buffers: Mapping[str, np.ndarray], bindings: Mapping[str, int] | None = None
) -> np.ndarray:
    """The array that a definition stands for, with the given content of its buffers and values of its symbols."""
    sizes = dict(bindings or {})
    shape = tuple(evaluate(extent, sizes) for extent in tensor.shape)
    if math.prod(shape) == 0:
        return np.zeros(shape, tensor.dtype.numpy)
    names = [f"i{axis}" for axis in range(len(shape))]
    indices = [symbol(name, 0, extent - 1) for name, extent in zip(names, tensor.shape, strict=True)]
    frame = _Frame(buffers, {name: np.int64(size) for name, size in sizes.items()})
    if shape:
        grids = np.meshgrid(*map(np.arange, shape), indexing="ij", sparse=True)
        frame = frame.inner(dict(zip(names, grids, strict=True)))
    values, poisoned = frame.run(tensor.at(indices))
    if np.any(poisoned):
        raise IndexError("an element reads outside its operand")
    return np.array(np.broadcast_to(values, shape), tensor.dtype.numpy)


class _Frame:
    """Expressions evaluated under one set of index values; those free of them are evaluated by the frame around."""

    def __init__(self, buffers: Mapping[str, np.ndarray], names: Mapping[str, Any], parent: _Frame | None = None):
        self.buffers, self.names, self.parent = buffers, names, parent
        self.done: dict[bytes, Result] = {}

    def inner(self, names: Mapping[str, Any]) -> _Frame:
        return _Frame(self.buffers, names, self)

    def run(self, node: s.Scalar) -> Result:
        if self.parent is not None and not any(name in self.names for name in node.free):
            return self.parent.run(node)
        if node.digest not in self.done:
            with np.errstate(all="ignore"):
                self.done[node.digest] = self.step(node)
        return self.done[node.digest]

    def lookup(self, name: str) -> Any:
        if name in self.names:
            return self.names[name]
        if self.parent is None:
            raise KeyError(f"symbol {name} has no value")
        return self.parent.lookup(name)

    def dim(self, dim: Dim) -> Result:
        if isinstance(dim, int):
            return np.int64(dim), False
        total: Any = np.int64(0)
        poisoned: Any = False
        for monomial, coefficient in dim.terms:
            term: Any = np.int64(coefficient)
            for atom in monomial:
                value, bad = self.atom(atom)
                term, poisoned = term * value, poisoned | np.asarray(bad)
            total = total + term
        return total, poisoned

    def atom(self, atom: object) -> Result:
        if isinstance(atom, Symbol):
            return self.lookup(atom.name), False
        if isinstance(atom, Quotient):
            (a, x), (b, y) = self.dim(atom.numerator), self.dim(atom.denominator)
            return np.floor_divide(a, np.where(b == 0, 1, b)), x | np.asarray(y)
        if isinstance(atom, Extremum):
            pick = np.minimum if atom.kind == "min" else np.maximum
            value, poisoned = self.dim(atom.operands[0])
            for operand in atom.operands[1:]:
                other, bad = self.dim(operand)
                value, poisoned = pick(value, other), poisoned | np.asarray(bad)
            return value, poisoned
        assert isinstance(atom, Opaque) and isinstance(atom.value, s.Scalar)
        value, poisoned = self.run(atom.value)
        outside = False if atom.lower is None else value < atom.lower
        if atom.upper is not None:
            upper, bad = self.dim(atom.upper)
            outside, poisoned = outside | (value > upper), poisoned | np.asarray(bad)
        return value, poisoned | np.asarray(outside)

    def step(self, node: s.Scalar) -> Result:
        if isinstance(node, s.Const):
            return np.asarray(node.value).astype(node.dtype.numpy), False
        if isinstance(node, s.Index):
            return self.dim(node.dim)
        if isinstance(node, s.Load):
            offset, poisoned = self.dim(node.offset)
            content = self.buffers[node.buffer.name]
            assert of_numpy(content.dtype) == node.dtype, f"{node.buffer.name} is {content.dtype}, read as {node.dtype}"
            outside = (offset < 0) | (offset >= content.size)
            if content.size == 0:
                return np.zeros(np.shape(offset), node.dtype.numpy), np.asarray(poisoned) | True
            return content.reshape(-1)[np.where(outside, 0, offset)], poisoned | np.asarray(outside)
        if isinstance(node, s.Select):
            (condition, bad), (yes, x), (no, y) = self.run(node.condition), self.run(node.yes), self.run(node.no)
            return np.where(condition, yes, no), np.where(condition, x, y) | np.asarray(bad)
        if isinstance(node, s.Reduce):
            return self.reduce(node)
        operands, poisons = zip(*(self.run(child) for child in node.children), strict=True)
        poisoned = np.asarray(poisons[0])
        for other in poisons[1:]:
            poisoned = poisoned | np.asarray(other)
        return self.compute(node, *operands), poisoned

    def compute(self, node: s.Scalar, *operands: Any) -> Any:
        if isinstance(node, s.Unary):
            result = UNARY[node.op](*operands)
            return result if node.dtype == BOOL else result.astype(node.dtype.numpy)
        if isinstance(node, s.Binary):
            left, right = operands
            if node.op in ("div", "rem") and left.dtype.kind in "iu":
                quotient, rest = _truncated(left, right)
                return quotient if node.op == "div" else rest
            return BINARY[node.op](left, right)
        if isinstance(node, s.Fma):
            return operands[0] * operands[1] + operands[2]
        if isinstance(node, s.Bitcast):
            return np.ascontiguousarray(operands[0]).view(node.dtype.numpy).reshape(np.shape(operands[0]))
        assert isinstance(node, s.Cast), type(node).__name__
        return convert(operands[0], node.operand.dtype, node.dtype, node.saturate)

    def reduce(self, node: s.Reduce) -> Result:
        limits = [self.dim(extent)[0] for _, extent in node.ranges]  # an extent may depend on the indices around
        extents = [int(np.max(limit)) for limit in limits]
        names = [name for name, _ in node.ranges]
        rank = max((np.ndim(self.lookup(name)) for name in node.free), default=0)
        around = math.prod(np.broadcast_shapes(*(np.shape(self.lookup(name)) for name in node.free)))
        combine = COMBINE[node.op]
        identity = np.asarray(s.IDENTITY[node.op](node.dtype)).astype(node.dtype.numpy)
        value: Any = identity
        poisoned: Any = False
        if math.prod(extents) == 0:
            return value, False
        chunks: list[list[np.ndarray]] = [[np.arange(extent) for extent in extents]]
        if around * math.prod(extents) > CHUNK:
            chunks = [[np.asarray([position]), *chunks[0][1:]] for position in range(extents[0])]
        for ranges in chunks:
            # Each range gets an axis of its own in front of those there are.
            grids = {
                name: values.reshape((-1,) + (1,) * (rank + len(ranges) - 1 - level))
                for level, (name, values) in enumerate(zip(names, ranges, strict=True))
            }
            body, bad = self.inner(grids).run(node.body)
            counts = np.asarray(True)
            for name, limit in zip(names, limits, strict=True):
                counts = counts & (grids[name] < limit)
            inner = (*(len(values) for values in ranges), *(1,) * rank)
            shape = np.broadcast_shapes(np.shape(body), np.shape(bad), np.shape(counts), inner)
            body = np.where(counts, np.broadcast_to(body, shape), identity)
            bad = np.broadcast_to(bad, shape) & counts
            axes = tuple(range(len(ranges)))
            value = combine(value, combine.reduce(body, axis=axes).astype(node.dtype.numpy))
            poisoned = poisoned | np.any(bad, axis=axes)
        return value, poisoned


def convert(values: np.ndarray, source: DType, target: DType, saturate: bool = False) -> np.ndarray:
    """ONNX's Cast where numpy's conversion means the same."""
    if saturate and target.is_float:
        values = np.clip(values.astype(np.float32), *target.limits)
    if target == BOOL:
        return values != 0
    if source.is_float and target.is_integer:
        return np.trunc(values.astype(np.float64)).astype(np.int64).astype(target.numpy)
    return values.astype(target.numpy)


def _truncated(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C's quotient and remainder; both 0 for a divisor of 0."""
    divisor = np.where(right == 0, 1, right).astype(right.dtype)
    floor = np.floor_divide(left, divisor)
    rest = left - floor * divisor
    up = (rest != 0) & ((left < 0) != (divisor < 0))
    quotient = np.where(right == 0, 0, floor + up).astype(left.dtype)
    return quotient, np.where(right == 0, 0, left - quotient * divisor).astype(left.dtype)


def _shift(left: bool) -> Callable[[Any, Any], Any]:
    def shift(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        bits = a.dtype.itemsize * 8
        safe = np.minimum(b, bits - 1).astype(a.dtype)
        return np.where(b >= bits, 0, np.left_shift(a, safe) if left else np.right_shift(a, safe)).astype(a.dtype)

    return shift


def _elementwise(function: Callable[[float], float]) -> Callable[[Any], Any]:
    return np.vectorize(function, otypes=[np.float64])


UNARY: dict[str, Callable[..., Any]] = {
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "floor": np.floor, "ceil": np.ceil, "round": np.rint,
    "trunc": np.trunc, "not": np.invert, "isnan": np.isnan, "exp": np.exp, "log": np.log, "tanh": np.tanh,
    "erf": _elementwise(math.erf), "sin": np.sin, "cos": np.cos, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos,
    "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh, "asinh": np.arcsinh, "acosh": np.arccosh,
    "atanh": np.arctanh, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "log1p": np.log1p, "expm1": np.expm1,
    "exp2": np.exp2, "log2": np.log2, "popcount": np.bitwise_count,
}  # fmt: skip

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "rem": np.fmod, "pow": np.power,
    "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "lt": np.less, "le": np.less_equal, "eq": np.equal, "ne": np.not_equal, "shl": _shift(True), "shr": _shift(False),
}  # fmt: skip

COMBINE: dict[str, Any] = {
    "add": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or,
}  # fmt: skip
