"""What calling a compiled model is like on every target: its ports, arguments by position or by name, their types."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.dims import evaluate
from ..ir.errors import BroadcastError, ShapeError
from ..ir.graph import Value
from .binding import Port, bind_symbols, check_names
from .compiled import Compiled, MemoryPlan
from .stretching import Variants


class Interface(ABC):
    """A compiled model that can be called. Raises ShapeError where an argument does not fit."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self._names = [value.name for value in compiled.inputs]
        self._input_dtypes = tuple(value.dtype.numpy for value in compiled.inputs)
        self._output_dtypes = tuple(value.dtype.numpy for value in compiled.outputs)
        self.variants: Variants | None = None
        """What runs in place of this one where sizes are 1 that it takes for others."""

    @abstractmethod
    def _execute(self, arguments: Sequence[Any], *settings: Any) -> list[Any]:
        """The outputs, for arguments in the order of the inputs."""

    @property
    def inputs(self) -> tuple[Port, ...]:
        return tuple(map(Port.of, self._compiled.inputs))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return tuple(map(Port.of, self._compiled.outputs))

    @property
    def compiled(self) -> Compiled:
        """Code, weights and description, as `save` writes them."""
        return self._compiled

    @property
    def plan(self) -> MemoryPlan:
        """The arena: its bytes, their lower bound, and the buffers; `plan.at(batch=8)` at other sizes."""
        return self._compiled.plan

    def dump(self, stage: str = "graph") -> str:
        """The text of a stage: import, graph, kernels, vectors, program, llvm or asm."""
        return self._compiled.dump(stage)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes an artifact that `onnxc.load` runs without compiling, by custom `*.onnxc`; returns its path."""
        from .artifact import save

        return save(self._compiled, path)

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(map(str, ports)) for ports in (self.inputs, self.outputs))
        return f"<onnxc.{type(self).__name__} {self._compiled.name}: ({inputs}) -> ({outputs})>"

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if named:
            given = dict(zip(self._names, arguments, strict=False)) | named
            if len(given) != len(arguments) + len(named):
                raise ShapeError(
                    f"an input is given twice, by position and by name; the inputs are {', '.join(self._names)}"
                )
            check_names(given, self._compiled.inputs)
            arguments = tuple(given[name] for name in self._names)
        return self._call(arguments)

    def _call(self, arguments: Sequence[Any]) -> Any:
        """The output, or a tuple of them, for arguments in the order of the inputs."""
        try:
            results = self._execute(arguments)
        except BroadcastError as error:
            if self.variants is None:
                raise
            return self.variants.of(arguments, error)(*arguments)
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name, for inputs by name."""
        return self._run(inputs)

    def _run(self, inputs: Mapping[str, Any], *settings: Any) -> dict[str, Any]:
        """`run`, handing `settings` of a kind of executable on to `_execute`."""
        check_names(inputs, self._compiled.inputs)
        arguments = tuple(inputs[name] for name in self._names)
        try:
            return self._by_name(self._execute(arguments, *settings))
        except BroadcastError as error:
            if self.variants is None:
                raise
            found: dict[str, Any] = self.variants.of(arguments, error).run(inputs, *settings)
            return found

    def _by_name(self, results: Sequence[Any]) -> dict[str, Any]:
        return {value.name: result for value, result in zip(self._compiled.outputs, results, strict=True)}

    def _wrong_count(self, arguments: Sequence[Any]) -> ShapeError:
        check_names(dict(zip(self._names, arguments, strict=False)), self._compiled.inputs)
        return ShapeError(f"{len(arguments)} arguments for {len(self._names)} inputs: {', '.join(self._names)}")

    def _converted(self, argument: Any, position: int) -> np.ndarray:
        """An argument as a contiguous, aligned array of the right type; ShapeError where it has another type."""
        wanted = self._input_dtypes[position]
        if type(argument) is int and argument >= 0 and self._compiled.inputs[position].shape[1:] == (0,):
            return np.empty((argument, 0), wanted)  # a size, as `passes.append` asks for it
        if not isinstance(argument, np.ndarray) and hasattr(argument, "__dlpack__"):
            argument = np.from_dlpack(argument)
        array = np.asarray(argument)
        native = array.dtype.newbyteorder("=")
        plain = not isinstance(argument, np.ndarray | np.generic)
        if native != wanted and not (plain and np.can_cast(array.dtype, wanted, "same_kind")):
            raise self._wrong_type(position, array.dtype)
        return np.require(array, wanted, ["C_CONTIGUOUS", "ALIGNED"]).reshape(array.shape)

    def _wrong_type(self, position: int, found: np.dtype[Any]) -> ShapeError:
        value, wanted = self._compiled.inputs[position], self._input_dtypes[position]
        return ShapeError(f"input {value.name!r} is of {found}: it must be {wanted}, {Port.of(value)}")

    def _bound(self, shapes: tuple[tuple[int, ...], ...]) -> tuple[dict[str, int], list[tuple[int, ...] | None]]:
        """The symbols' values for inputs of these shapes, and the outputs' shapes (None: a later segment tells it)."""
        compiled = self._compiled
        bound = bind_symbols(compiled.inputs, shapes, compiled.assumptions)
        outputs: list[tuple[int, ...] | None] = []
        for value, ready in zip(compiled.outputs, compiled.ready, strict=True):
            shape = None if ready else _shape(value, bound)
            if shape is not None and any(size < 0 for size in shape):
                raise ShapeError(f"inputs of shapes {shapes} give the output {value.name!r} the shape {shape}")
            outputs.append(shape)
        return bound, outputs


def computed_shape(value: Value, bound: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an output by symbols that the run has bound; ShapeError where it cannot be."""
    shape = _shape(value, bound)
    if any(size < 0 for size in shape):
        raise ShapeError(f"output {value.name!r} would have the shape {list(shape)}")
    return shape


def _shape(value: Value, bound: Mapping[str, int]) -> tuple[int, ...]:
    try:
        return tuple(evaluate(dim, bound) for dim in value.shape)
    except ZeroDivisionError:
        raise ShapeError(f"output {value.name!r}: a size of {Port.of(value)} is divided by 0") from None
