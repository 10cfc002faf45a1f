"""Calls: operators with their operands before their outputs have types, and what may rewrite them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import onnx

from ..ir.errors import UnsupportedError
from ..ir.graph import Attribute, Graph, Type, Value

Body = Callable[[Sequence[Type]], Graph]
"""Makes a region for inputs of the given types."""

NEWEST = 1 << 30
"""Stands for the version of a node that has its newest form."""


@dataclass(frozen=True)
class Call:
    """An operator with its operands, before its outputs have types.

    `version` is the opset in which the operator got the meaning that the call has; `outputs` are the names to define,
    "" for one that nobody reads; `graphs` are ONNX's bodies behind `bodies`, for functions of the schema.
    """

    op: str
    inputs: tuple[Value | None, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("",)
    version: int = NEWEST
    bodies: Mapping[str, Body] = field(default_factory=dict)
    graphs: Mapping[str, onnx.GraphProto] = field(default_factory=dict)
    origin: tuple[str, ...] = ()

    def input(self, position: int) -> Value | None:
        """The operand at a position, None where it is absent."""
        return self.inputs[position] if position < len(self.inputs) else None

    def with_input(self, position: int, value: Value | None) -> Call:
        """This call with one operand replaced or added; trailing absent operands are dropped."""
        values = list(self.inputs) + [None] * (position + 1 - len(self.inputs))
        values[position] = value
        while values and values[-1] is None:
            values.pop()
        return replace(self, inputs=tuple(values))

    def with_attributes(self, drop: Sequence[str] = (), /, **changes: Attribute) -> Call:
        """This call with attributes removed and set."""
        kept = {name: value for name, value in self.attributes.items() if name not in drop}
        return replace(self, attributes=kept | changes)

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        value = self.attributes.get(name, default)
        if not isinstance(value, int):
            raise UnsupportedError(f"attribute {name} must be an integer, found {value!r}")
        return value


class Builder(Protocol):
    """What a lift may do: add nodes before the one it returns."""

    def emit(self, call: Call) -> tuple[Value, ...]:
        """Adds the nodes for a call; its outputs."""

    def constant(self, array: np.ndarray, stem: str, origin: tuple[str, ...] = ()) -> Value:
        """Adds a constant, named after `stem`."""

    def known(self, value: Value | None) -> np.ndarray | None:
        """The array of a value that is a constant."""

    def settled(self, value: Value) -> bool:
        """Whether every element of a small value is known: a number, or a size of the model."""

    def region(self, name: str, types: Sequence[Type], fill: Callable[[tuple[Value, ...]], Sequence[Value]]) -> Graph:
        """A region with inputs of the given types; `fill` adds its nodes and returns its outputs."""


Lift = Callable[[Call, Builder], Call | None]
"""The call in its newer form, or None where its outputs are emitted already."""
