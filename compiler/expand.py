"""Composite operators: each is a Python function that adds the nodes which it stands for.

An expansion is declared like an operator (`ir.ops.declare`): its positional parameters are the operands, the
keyword-only ones the attributes with their defaults. What it returns are the outputs. Shapes are symbolic throughout.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..ir.dims import Dim
from ..ir.dtypes import DType
from ..ir.errors import UnsupportedError
from ..ir.graph import Attribute, TensorType, Value
from .calls import Body, Builder, Call

Expansion = TypeVar("Expansion", bound=Callable[..., Any])
EMPTY = inspect.Parameter.empty


class Nodes:
    """Adds nodes on behalf of a call: `n("Add", x, y)` is the sum."""

    def __init__(self, call: Call, build: Builder) -> None:
        self.call, self.build = call, build
        self.stem = next(filter(None, call.outputs), "value")

    def wanted(self, position: int) -> bool:
        """Whether output number `position` is read."""
        return position < len(self.call.outputs) and self.call.outputs[position] != ""

    def known(self, value: Value | None) -> np.ndarray | None:
        """The array of a value that is a constant."""
        return self.build.known(value)

    def several(
        self, op: str, inputs: Sequence[Value | None], outputs: int, **attributes: Attribute
    ) -> tuple[Value, ...]:
        """The outputs of a node."""
        return self.build.emit(Call(op, tuple(inputs), attributes, ("",) * outputs, origin=self.call.origin))

    def __call__(self, op: str, *inputs: Value | np.ndarray | float | None, **attributes: Attribute) -> Value:
        """The only output of a node; a number among the operands is a scalar of the first tensor's type."""
        first = next((value for value in inputs if isinstance(value, Value)), None)
        values = [
            self.like(value, first)
            if isinstance(value, int | float)
            else self.constant(value)
            if isinstance(value, np.ndarray)
            else value
            for value in inputs
        ]
        return self.several(op, values, 1, **attributes)[0]

    def loop(
        self,
        trips: int,
        state: Sequence[Value],
        body: Callable[[Sequence[Value]], tuple[Value, Sequence[Value]]],
    ) -> tuple[Value, ...]:
        """The state after at most so many turns; `body` maps it to the condition to go on and the next state."""

        def fill(values: tuple[Value, ...]) -> Sequence[Value]:
            condition, after = body(values[2:])
            return (condition, *after)

        inputs = (self.constant(np.array(trips, np.int64)), self.constant(np.array(True)), *state)
        bodies: dict[str, Body] = {"body": lambda types: self.build.region("turn", types, fill)}
        return self.build.emit(Call("Loop", inputs, {}, ("",) * len(state), bodies=bodies, origin=self.call.origin))

    def constant(self, array: npt.ArrayLike) -> Value:
        return self.build.constant(np.asarray(array), f"{self.stem}.constant", self.call.origin)

    def like(self, number: float, value: Value | None) -> Value:
        """A scalar of the type of `value`."""
        assert value is not None
        with np.errstate(over="ignore"):  # a limit of the largest f32 is an infinity in f16
            return self.constant(np.array(number).astype(value.dtype.numpy))

    def dims(self, *sizes: Dim) -> Value:
        """An i64 vector of sizes."""
        numbers = [size for size in sizes if isinstance(size, int)]
        if len(numbers) == len(sizes):
            return self.constant(np.array(numbers, np.int64))
        return self("Dims", values=tuple(sizes), shape=(len(sizes),))

    def size(self, size: Dim) -> Value:
        """An i64 scalar."""
        if isinstance(size, int):
            return self.constant(np.array(size, np.int64))
        return self("Dims", values=(size,), shape=())

    def reshape(self, x: Value, *shape: Dim) -> Value:
        return x if x.shape == shape else self("Reshape", x, self.dims(*shape), allowzero=1)

    def transpose(self, x: Value, *perm: int) -> Value:
        return self("Transpose", x, perm=perm)

    def cast(self, x: Value, dtype: DType) -> Value:
        return x if x.dtype == dtype else self("Cast", x, to=dtype)

    def expand(self, x: Value, *shape: Dim) -> Value:
        return x if x.shape == shape else self("Expand", x, self.dims(*shape))

    def slice(self, x: Value, axis: int, start: Dim, end: Dim) -> Value:
        return self("Slice", x, self.dims(start), self.dims(end), self.dims(axis))

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        return self.several("Concat", parts, 1, axis=axis)[0]

    def split(self, x: Value, sizes: Sequence[Dim], axis: int) -> tuple[Value, ...]:
        return self.several("Split", (x, self.dims(*sizes)), len(sizes), axis=axis)

    def positions(self, extent: Dim, *shape: Dim) -> Value:
        """0, 1, ... `extent` - 1 as i64, in the given shape."""
        return self.reshape(self("Range", self.size(0), self.size(extent), self.size(1)), *(shape or (extent,)))


class Expansions:
    """Collects the expansions of one file (`declare = Expansions()`)."""

    def __init__(self) -> None:
        self.functions: dict[str, Callable[..., Any]] = {}

    def __call__(self, *names: str) -> Callable[[Expansion], Expansion]:
        """Declares composite operators: a function of `Nodes`, operands and attributes."""

        def register(function: Expansion) -> Expansion:
            self.functions.update(dict.fromkeys(names, function))
            return function

        return register


def expand(function: Callable[..., Any], call: Call, build: Builder) -> None:
    """Adds the nodes that a composite call stands for, its outputs under the names that it gives them.

    Raises UnsupportedError for attributes that the expansion does not know, and where operands are missing.
    """
    nodes = Nodes(call, build)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    attributes = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
    any_attribute = any(p.kind == p.VAR_KEYWORD for p in parameters)  # the schema has checked them
    unknown = [name for name in call.attributes if name not in attributes and not any_attribute]
    if unknown:
        raise UnsupportedError(f"its attribute {unknown[0]!r} is not supported")
    given: dict[str, Attribute] = {**attributes, **call.attributes}
    missing = [name for name, default in attributes.items() if default is EMPTY and name not in call.attributes]
    if missing:
        raise UnsupportedError(f"it lacks the attribute {missing[0]!r}")
    operands: list[Value | None] = list(call.inputs)
    variadic = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    positional = [p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    if not variadic:
        if any(value is not None for value in operands[len(positional) :]):
            raise UnsupportedError(f"it has {len(operands)} operands, at most {len(positional)} are supported")
        operands = (operands + [None] * len(positional))[: len(positional)]
    for parameter, value in zip(positional, operands, strict=False):
        if value is None and parameter.default is EMPTY and "None" not in str(parameter.annotation):
            raise UnsupportedError(f"it lacks its operand {parameter.name!r}")
        if value is not None and not isinstance(value.type, TensorType):
            raise UnsupportedError(f"its operand {parameter.name!r} is no tensor")
    found = function(nodes, *operands, **given)
    outputs = found if isinstance(found, tuple) else (found,)
    for position, name in enumerate(call.outputs):
        if name and (position >= len(outputs) or outputs[position] is None):
            raise UnsupportedError(f"its output {position} is not supported")
        if name:
            build.emit(Call("Identity", (outputs[position],), {}, (name,), origin=call.origin))


def joined(*families: Expansions) -> Mapping[str, Callable[..., Any]]:
    """The expansions of several files."""
    return {name: function for family in families for name, function in family.functions.items()}
