"""Sizes that turn out to be 1 where the code was compiled for equal ones.

Of two open sizes that are broadcast against each other, code takes for granted that they are equal, which is what
nearly all models mean. ONNX allows either of them to be 1. A run in which one is has other code, compiled when the
first such run comes, with the sizes that are 1 fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..ir.errors import BroadcastError, OnnxcError
from ..ir.graph import Value

Pattern: TypeAlias = "tuple[tuple[int | None, ...], ...]"
"""Of each input, which axes are fixed to 1."""
Compile: TypeAlias = "Callable[[Mapping[str, Sequence[int | None]]], Any]"
"""The model compiled with some axes of its inputs fixed."""

KEPT = 16
"""Compiled forms that are kept, the newest ones."""


class Variants:
    """The code for runs in which certain sizes are 1."""

    def __init__(self, inputs: Sequence[Value], compile_for: Compile) -> None:
        self._inputs, self._compile = inputs, compile_for
        self._known: dict[Pattern, Any] = {}

    def of(self, arguments: Sequence[Any], reason: BroadcastError) -> Any:
        """The executable for arguments whose sizes do not fit the usual code. Raises `reason` where no axis is 1."""
        pattern = tuple(map(_ones, self._inputs, map(np.shape, arguments)))
        if not any(any(axes) for axes in pattern):
            raise reason
        found = self._known.get(pattern)
        if found is None:
            shapes = {value.name: axes for value, axes in zip(self._inputs, pattern, strict=True) if any(axes)}
            try:
                found = self._compile(shapes)
            except OnnxcError as error:
                raise reason from error
            while len(self._known) >= KEPT:
                self._known.pop(next(iter(self._known)), None)
            self._known[pattern] = found
        return found


def _ones(value: Value, shape: Sequence[int]) -> tuple[int | None, ...]:
    """The axes of size 1 that the model leaves open."""
    pairs = zip(value.shape, shape, strict=True)
    return tuple(1 if size == 1 and not isinstance(dim, int) else None for dim, size in pairs)
