"""The dimensions of a model's inputs: names and expressions of ONNX as symbols, and their specialisation."""

from __future__ import annotations

import ast
import keyword
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx

from ..ir.dims import (
    Dim,
    Symbol,
    as_symbol,
    ceildiv,
    dim_max,
    dim_min,
    floordiv,
    linear,
    modulo,
    substitute,
    symbol,
    symbols,
)
from ..ir.dtypes import BY_ONNX
from ..ir.errors import ModelError, ShapeError, UnsupportedError
from ..ir.graph import OptionalType, SequenceType, TensorType, Type, substitute_type

_ANONYMOUS = ("", "?", "-1", "None")
"""What exporters write for a dimension that has no name."""

Ratio: TypeAlias = tuple[Dim, int]
"""A numerator and a denominator."""


def _whole(ratio: Ratio) -> Dim:
    if ratio[1] != 1:
        raise ValueError("a quotient that is not rounded")
    return ratio[0]


def _scaled(function: Callable[[Dim, int], Dim]) -> Callable[[Ratio], Ratio]:
    return lambda ratio: (function(*ratio), 1)


def _over_dims(function: Callable[..., Dim]) -> Callable[..., Ratio]:
    return lambda *ratios: (function(*map(_whole, ratios)), 1)


def _divide(left: Ratio, right: Ratio) -> Ratio:
    divisor = _whole(right)
    if not isinstance(divisor, int) or divisor <= 0:
        raise ValueError("a quotient by no positive number")
    return left[0], left[1] * divisor


_OPERATIONS: Mapping[type, Callable[[Ratio, Ratio], Ratio]] = {
    ast.Add: _over_dims(operator.add),
    ast.Sub: _over_dims(operator.sub),
    ast.Mult: _over_dims(operator.mul),
    ast.Div: _divide,
    ast.FloorDiv: _over_dims(floordiv),
    ast.Mod: _over_dims(modulo),
}
_FUNCTIONS: Mapping[str, Callable[..., Ratio]] = {
    "floor": _scaled(floordiv),
    "ceil": _scaled(ceildiv),
    "ceiling": _scaled(ceildiv),
    "floordiv": _over_dims(floordiv),
    "ceildiv": _over_dims(ceildiv),
    "mod": _over_dims(modulo),
    "min": _over_dims(dim_min),
    "max": _over_dims(dim_max),
}


def identifier(text: str) -> str:
    """`text` made into an ASCII identifier that is no keyword."""
    name = re.sub(r"[^0-9A-Za-z_]", "_", text)
    return f"_{name}" if not name or name[0].isdigit() or keyword.iskeyword(name) else name


class Symbols:
    """The symbols of one model: each dim_param has one, and no two share theirs."""

    def __init__(self) -> None:
        self._by_text: dict[str, str] = {}
        self._taken: set[str] = set()

    def fresh(self, stem: str) -> Dim:
        """A symbol of its own, named after `stem`."""
        return symbol(self._unique(stem))

    def _unique(self, stem: str) -> str:
        base = name = identifier(stem)
        number = 1
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        return name

    def named(self, text: str) -> Dim:
        """The symbol of a dim_param."""
        if text not in self._by_text:
            self._by_text[text] = self._unique(text)
        return symbol(self._by_text[text])

    def find(self, text: str) -> str | None:
        """The symbol's name for a dim_param or for that name itself."""
        return self._by_text.get(text, text if text in self._taken else None)

    def parse(self, text: str, known: frozenset[str]) -> Dim:
        """The dim that a dim_param means: an expression over the names in `known`, else a symbol of its own."""

        def walk(tree: ast.expr) -> Ratio:
            if isinstance(tree, ast.Constant) and type(tree.value) is int:
                return tree.value, 1
            if isinstance(tree, ast.Name) and tree.id in known:
                return self.named(tree.id), 1
            if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
                return -_whole(walk(tree.operand)), 1
            if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATIONS:
                return _OPERATIONS[type(tree.op)](walk(tree.left), walk(tree.right))
            if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.keywords:
                return _FUNCTIONS[tree.func.id.lower()](*map(walk, tree.args))
            raise ValueError("no expression over known names")

        if text in known:
            return self.named(text)
        try:
            return _whole(walk(ast.parse(text.strip(), mode="eval").body))
        except (SyntaxError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError, MemoryError):
            return self.named(text)


def type_of(proto: onnx.TypeProto, name: str, dim: Callable[[onnx.TensorShapeProto.Dimension, int], Dim]) -> Type:
    """The type that a TypeProto declares; dim(declared, axis) gives each dimension.

    Raises UnsupportedError for a type that the compiler has not, and for a tensor of unknown rank.
    """
    kind = proto.WhichOneof("value")
    if kind == "sequence_type":
        return SequenceType(type_of(proto.sequence_type.elem_type, name, dim))
    if kind == "optional_type":
        return OptionalType(type_of(proto.optional_type.elem_type, name, dim))
    if kind != "tensor_type":
        raise UnsupportedError(f'"{name}" is a {(kind or "value without a type").replace("_", " ")}, not a tensor')
    dtype = BY_ONNX.get(proto.tensor_type.elem_type)
    if dtype is None:
        raise ModelError(f'"{name}" declares the unknown element type {proto.tensor_type.elem_type}')
    if not proto.tensor_type.HasField("shape"):
        raise UnsupportedError(f'"{name}" declares no shape; give it with shapes={{"{name}": (...)}}')
    return TensorType(dtype, tuple(dim(d, axis) for axis, d in enumerate(proto.tensor_type.shape.dim)))


@dataclass
class _Bindings:
    """Numbers for symbols, each with the words for where it comes from."""

    numbers: dict[str, tuple[int, str]]

    def bind(self, name: str, number: int, source: str) -> None:
        old = self.numbers.setdefault(name, (number, source))
        if old[0] != number:
            raise ShapeError(f'dimension "{name}" is {old[0]} by {old[1]}, but {number} by {source}')

    @property
    def dims(self) -> dict[str, Dim]:
        return {name: number for name, (number, _) in self.numbers.items()}

    def solve(self, dim: Dim, number: int, what: str, source: str) -> bool:
        """Makes dim = number hold where at most one symbol is free; False where more are."""
        plain = as_symbol(dim)
        if plain is not None:
            self.bind(plain.name, number, f"{what} in {source}")
            return True
        left = substitute(dim, self.dims)
        free = symbols(left)
        if len(free) > 1:
            return False
        found = linear(left, free[0].name) if free else None
        if found is not None and isinstance(found[0], int) and isinstance(found[1], int):
            quotient, rest = divmod(number - found[1], found[0])
            if rest == 0 and quotient >= 0:
                self.bind(free[0].name, quotient, source)
                return True
        if left != number:
            raise ShapeError(f"{what} is declared as {dim}, which cannot be {number} as {source} says")
        return True


def input_types(
    inputs: Iterable[onnx.ValueInfoProto],
    symbols_of: Symbols,
    dims: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
    smallest: int = 0,
) -> dict[str, Type]:
    """The types of a graph's inputs, specialised by `dims` (symbol or dim_param -> number) and `shapes` (by input).

    None in a shape leaves that axis as the model has it; axes that stay symbols of their own are taken to be `smallest`
    or larger. A dimension without a name, or of size -1 as Paddle writes it, becomes the symbol <input>_<axis>.
    Raises ShapeError where `dims`, `shapes` and the model contradict each other or name what is not there, ModelError
    for smaller ones.
    """
    declared = list(inputs)
    shapes = dict(shapes or {})
    texts = {text for value in declared for text in _dim_params(value.type)}
    known = frozenset(text for text in texts if text.isidentifier() and not keyword.iskeyword(text))
    for text in sorted(known):
        symbols_of.named(text)
    types: dict[str, Type] = {}
    for value in declared:
        types[value.name] = _declared_type(value, symbols_of, known, shapes.get(value.name))
    if missing := [name for name in shapes if name not in types]:
        raise ShapeError(f'shapes names "{missing[0]}", but the inputs are {", ".join(types) or "none"}')
    bindings = _Bindings({})
    for name, number in (dims or {}).items():
        found = symbols_of.find(name)
        if found is None:
            names = ", ".join(s.name for s in _symbols_of(types.values()))
            raise ShapeError(f'dims names "{name}", but the symbolic dimensions are {names or "none"}')
        bindings.bind(found, _number(number, f'dims["{name}"]'), f'dims["{name}"]')
    equations = [
        (dim, _number(number, f'shapes["{name}"]'), f'axis {axis} of "{name}"', f'shapes["{name}"]')
        for name, shape in shapes.items()
        for axis, (dim, number) in enumerate(zip(_shape(name, types[name], shape), shape, strict=True))
        if number is not None
    ]
    # Plain symbols first: what they bind may leave one unknown in an expression.
    pending = sorted(equations, key=lambda equation: as_symbol(equation[0]) is None)
    while pending:
        later = [equation for equation in pending if not bindings.solve(*equation)]
        if len(later) == len(pending):
            raise ShapeError(f"{later[0][2]} is {later[0][0]}: give dims= for its symbols, as shapes= leaves them open")
        pending = later
    tensors = [type for type in types.values() if isinstance(type, TensorType)]
    plain = {item.name for type in tensors for dim in type.shape if (item := as_symbol(dim)) is not None}
    values = {**{name: symbol(name, smallest) for name in plain if smallest}, **bindings.dims}
    return {name: substitute_type(type, values) for name, type in types.items()}


def _dim_params(type: onnx.TypeProto) -> list[str]:
    kind = type.WhichOneof("value")
    if kind in ("sequence_type", "optional_type"):
        return _dim_params(getattr(type, kind).elem_type)
    return [dim.dim_param for dim in type.tensor_type.shape.dim] if kind == "tensor_type" else []


def _declared_type(
    value: onnx.ValueInfoProto, symbols_of: Symbols, known: frozenset[str], shape: Sequence[int | None] | None
) -> Type:
    def dim(declared: onnx.TensorShapeProto.Dimension, axis: int) -> Dim:
        size = declared.dim_value
        if size < -1 and shape is None:
            raise ModelError(f'axis {axis} of "{value.name}" has the size {size}; give the right shape with shapes=')
        if declared.HasField("dim_value") and size >= 0:
            return size
        if declared.dim_param in _ANONYMOUS:
            return symbols_of.fresh(f"{value.name}_{axis}")
        return symbols_of.parse(declared.dim_param, known)

    proto = value.type
    if shape is not None and proto.HasField("tensor_type") and not proto.tensor_type.HasField("shape"):
        proto = onnx.helper.make_tensor_type_proto(proto.tensor_type.elem_type, [None] * len(shape))
    return type_of(proto, value.name, dim)


def _symbols_of(types: Iterable[Type]) -> list[Symbol]:
    found = {s: None for t in types if isinstance(t, TensorType) for d in t.shape for s in symbols(d)}
    return list(found)


def _number(number: object, source: str) -> int:
    if not hasattr(number, "__index__") or isinstance(number, bool) or (value := operator.index(number)) < 0:
        raise ShapeError(f"{source} must be made of integers from 0 on, found {number!r}")
    return value


def _shape(name: str, type: Type, shape: Sequence[int | None]) -> tuple[Dim, ...]:
    if not isinstance(type, TensorType) or type.rank != len(shape):
        raise ShapeError(f'shapes gives "{name}" the shape {tuple(shape)}, but it is a {type}')
    return type.shape
