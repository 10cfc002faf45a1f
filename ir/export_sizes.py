"""Sizes as ONNX nodes: symbolic dimensions have no spelling in ONNX, so they are computed from shapes again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from .dims import Atom, Dim, Extremum, Quotient, Symbol, as_symbol
from .dtypes import I64
from .errors import UnsupportedError
from .graph import TensorType, Value
from .ops.declare import identifier

SYMBOLIC_LIMIT = 64
"""Tensors of more elements decide no shapes."""


class Sizes:
    """Writes dims as ONNX nodes within one graph; `outer` is that of the graph around.

    A symbol is the size of an axis of some value that is already there (`declare` tells which are).
    """

    def __init__(self, outer: Sizes | None = None) -> None:
        self._outer = outer
        self._axes: dict[str, tuple[str, int]] = {}
        self._elements: dict[str, tuple[str, int]] = {}
        self._written: dict[Dim, str] = {}
        self._numbers: Iterator[int] = outer._numbers if outer is not None else count()
        self._taken: set[str] = outer._taken if outer is not None else set()
        self.nodes: list[NodeProto] = []

    def declare(self, values: Iterable[Value]) -> None:
        """Makes known what has been defined."""
        for value in values:
            self._declare_elements(value)
            for axis, dim in enumerate(value.type.shape if isinstance(value.type, TensorType) else ()):
                found = as_symbol(dim)
                if found is not None:
                    self._axes.setdefault(found.name, (value.name, axis))

    def _declare_elements(self, value: Value) -> None:
        """A size may also be an element of a tensor that decides a shape: see `Inference.static`."""
        type = value.type
        if not isinstance(type, TensorType) or not type.dtype.is_integer or not type.static or type.rank > 1:
            return
        count = type.shape[0] if type.shape else 1
        if isinstance(count, int) and count <= SYMBOLIC_LIMIT:
            for element in range(count):
                self._elements.setdefault(f"{identifier(value.name)}_{element}", (value.name, element))

    def apart(self, values: Iterable[Value]) -> dict[Value, Value]:
        """Other names for those of a body's values that a body before it has used: side by side they would be twins."""
        found = {}
        for value in values:
            if value.name in self._taken:
                found[value] = Value(f"{value.name}~{next(self._numbers)}", value.type)
            self._taken.add(value.name)
        return found

    def take(self) -> list[NodeProto]:
        """The nodes written since the last call."""
        nodes, self.nodes = self.nodes, []
        return nodes

    def vector(self, dims: Sequence[Dim], name: str) -> None:
        """Defines the i64 vector `name` of the given dims."""
        if all(isinstance(dim, int) for dim in dims):
            self.constant(np.array(dims, np.int64), name)
        else:
            self._node("Concat", [self.scalar(dim) for dim in dims], name, axis=0)

    def join(self, parts: Sequence[str], name: str, dtype: int, rank: int) -> None:
        """Defines `name` as vectors of one element, one after the other, as ONNX's element type `dtype`; rank 0: the
        only one as a scalar."""
        cast = [self._node("Cast", [part], to=dtype) for part in parts]
        if rank:
            self._node("Concat", cast, name, axis=0)
        else:
            self._node("Squeeze", cast, name)

    def constant(self, array: np.ndarray, name: str) -> str:
        """Defines `name` as an array."""
        return self._node("Constant", [], name, value=numpy_helper.from_array(array, name))

    def scalar(self, dim: Dim) -> str:
        """The name of an i64 vector that holds `dim` alone."""
        found = self._found(dim)
        if found is None:
            found = self._written[dim] = self._sum(dim)
        return found

    def _found(self, dim: Dim) -> str | None:
        return self._written.get(dim) or (self._outer._found(dim) if self._outer is not None else None)

    def _sum(self, dim: Dim) -> str:
        if isinstance(dim, int):
            return self.constant(np.array([dim], np.int64), self._name())
        terms = []
        for monomial, coefficient in dim.terms:
            factors = [self._atom(atom) for atom in monomial]
            if coefficient != 1 or not factors:
                factors.append(self.scalar(coefficient))
            terms.append(self._chain("Mul", factors))
        return self._chain("Add", terms)

    def _chain(self, op: str, operands: Sequence[str]) -> str:
        result = operands[0]
        for operand in operands[1:]:
            result = self._node(op, [result, operand])
        return result

    def _atom(self, atom: Atom) -> str:
        if isinstance(atom, Symbol):
            source = self._source("_axes", atom.name)
            if source is not None:
                return self._node("Shape", [source[0]], start=source[1], end=source[1] + 1)
            source = self._source("_elements", atom.name)
            if source is None:
                raise UnsupportedError(f"the size {atom} cannot be written in ONNX: no value has it as an axis")
            flat = self._node("Reshape", [source[0], self.scalar(-1)])
            element = self._node("Gather", [flat, self.scalar(source[1])], axis=0)
            return self._node("Cast", [element], to=I64.onnx)
        if isinstance(atom, Quotient):
            numerator, denominator = self.scalar(atom.numerator), self.scalar(atom.denominator)
            # ONNX's integer division truncates, its Mod has the divisor's sign: together they give the floor.
            rest = self._node("Mod", [numerator, denominator])
            return self._node("Div", [self._node("Sub", [numerator, rest]), denominator])
        if isinstance(atom, Extremum):
            return self._node("Min" if atom.kind == "min" else "Max", [self.scalar(dim) for dim in atom.operands])
        raise UnsupportedError(f"the size {atom} is computed from data and cannot be written in ONNX")

    def _source(self, table: str, name: str) -> tuple[str, int] | None:
        found: tuple[str, int] | None = getattr(self, table).get(name)
        return found if found is not None or self._outer is None else self._outer._source(table, name)

    def _node(self, op: str, inputs: Sequence[str], name: str | None = None, **attributes: Any) -> str:
        name = name or self._name()
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def _name(self) -> str:
        return f"~size{next(self._numbers)}"
