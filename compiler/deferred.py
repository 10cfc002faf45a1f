"""What is like a compiled model for its callers, though no one code serves all its runs."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..ir.errors import ShapeError
from .binding import Port
from .compiled import Compiled, MemoryPlan
from .interface import Interface


class Deferred(ABC):
    """Has the interface of an Executable; what needs the code of the whole model raises UnsupportedError."""

    @property
    @abstractmethod
    def compiled(self) -> Compiled:
        """Raises UnsupportedError: there is no code that serves all runs, to be saved or shown."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[Port, ...]:
        """The model's inputs."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[Port, ...]:
        """The model's outputs."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name, for inputs by name."""

    def serving(self, inputs: Mapping[str, Any]) -> Interface | Deferred:
        """What runs these inputs: itself, or where values decide the code what was compiled for theirs."""
        return self

    @property
    def plan(self) -> MemoryPlan:
        return self.compiled.plan

    def dump(self, stage: str = "graph") -> str:
        return self.compiled.dump(stage)

    def save(self, path: str | os.PathLike[str]) -> Path:
        from .artifact import save

        return save(self.compiled, path)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        names = self._names
        if len(arguments) > len(names) or set(names[: len(arguments)]) & set(named):
            raise ShapeError(f"too many arguments, or one given twice: the inputs are {', '.join(names)}")
        results = list(self.run(dict(zip(names, arguments, strict=False)) | named).values())
        return results[0] if len(results) == 1 else tuple(results)

    @cached_property
    def _names(self) -> list[str]:
        return [port.name for port in self.inputs]

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(map(str, ports)) for ports in (self.inputs, self.outputs))
        return f"<onnxc.{type(self).__name__}: ({inputs}) -> ({outputs})>"
