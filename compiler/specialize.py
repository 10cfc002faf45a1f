"""Models in which the value of an input decides ranks or axes: compiled anew for each such value, on demand.

An axis that comes as an input cannot be a symbol, as a size can: it decides what code there is. Such a model is
compiled when its first values are seen, with them as constants; where a rank hangs on a size (a branch that squeezes an
axis only if its size is 1), the sizes of the inputs are fixed too. The compiled forms are kept, the least recently used
dropped.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from ..ir.dtypes import BY_ONNX
from ..ir.errors import ShapeError, UnsupportedError, ValueNeeded
from .binding import Port
from .compiled import Compiled, MemoryPlan
from .executable import Executable

CompileValues: TypeAlias = Callable[[onnx.ModelProto, Mapping[str, Sequence[int]]], Executable]

KEPT = 16
"""Compiled forms that are kept."""
LARGEST = 64
"""Elements above which an input is data and never a constant of the code."""


class SpecializingExecutable:
    """Has the interface of an Executable; `parameters` are the inputs whose values the code depends on."""

    def __init__(self, model: onnx.ModelProto, compile_values: CompileValues, reason: str) -> None:
        self._model = model
        self._compile = compile_values
        self._by_shape = False
        initial = {tensor.name for tensor in model.graph.initializer}
        self._values = [value for value in model.graph.input if value.name not in initial]
        self.parameters = tuple(value.name for value in self._values if _is_small(value))
        self._reason = reason
        self._known: OrderedDict[tuple[bytes, ...], Executable] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def compiled(self) -> Compiled:
        """Raises UnsupportedError: there is no code that serves all runs, to be saved or shown."""
        values = ", ".join(self.parameters) or "sizes of inputs"
        raise UnsupportedError(
            f"no one code serves all runs of this model: it is compiled anew for {values} ({self._reason})"
        )

    @property
    def plan(self) -> MemoryPlan:
        return self.compiled.plan

    def dump(self, stage: str = "graph") -> str:
        return self.compiled.dump(stage)

    def save(self, path: str | os.PathLike[str]) -> Path:
        from .artifact import save

        return save(self.compiled, path)

    @property
    def inputs(self) -> tuple[Port, ...]:
        return tuple(map(_port, self._values))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return tuple(map(_port, self._model.graph.output))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        names = [value.name for value in self._values]
        results = list(self.run(dict(zip(names, arguments, strict=False)) | named).values())
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The outputs by name, for inputs by name; compiles where these parameter values are new."""
        return self.specialized(inputs).run({k: v for k, v in inputs.items() if k not in self.parameters})

    def specialized(self, inputs: Mapping[str, Any]) -> Executable:
        """The executable for the values that the parameters have in `inputs`. ShapeError where one is missing."""
        missing = [name for name in self.parameters if name not in inputs]
        if missing:
            raise ShapeError(f"inputs do not fit (missing: {', '.join(missing)})")
        arrays = {name: np.asarray(inputs[name]) for name in self.parameters}
        others = {v.name: np.shape(inputs[v.name]) for v in self._values if v.name in inputs and v.name not in arrays}
        key = tuple(f"{a.dtype}{a.shape}".encode() + a.tobytes() for a in arrays.values())
        with self._lock:
            found = self._known.get((*key, repr(others).encode() if self._by_shape else b""))
            if found is None:
                found = self._compiled(arrays, others)
                self._known[(*key, repr(others).encode() if self._by_shape else b"")] = found
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
        return found

    def _compiled(self, arrays: Mapping[str, np.ndarray], others: Mapping[str, tuple[int, ...]]) -> Executable:
        model = self._with_constants(arrays)
        if not self._by_shape and arrays:
            try:
                return self._compile(model, {})
            except ValueNeeded:
                pass
        self._by_shape = True
        return self._compile(model, others)

    def _with_constants(self, arrays: Mapping[str, np.ndarray]) -> onnx.ModelProto:
        if not arrays:
            return self._model
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
        return model


def _is_small(value: onnx.ValueInfoProto) -> bool:
    if value.type.WhichOneof("value") != "tensor_type":
        return False
    tensor = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else 1 << 30 for d in tensor.shape.dim]
    numeric = BY_ONNX.get(tensor.elem_type)
    return len(dims) <= 1 and math.prod(dims) <= LARGEST and numeric is not None and numeric.kind != "string"


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    return Port(value.name, BY_ONNX[tensor.elem_type].name if tensor.elem_type in BY_ONNX else "?", shape)


def load_proto(model: str | os.PathLike[str] | bytes | onnx.ModelProto) -> tuple[onnx.ModelProto, str | None]:
    """The parsed model and the folder of its external data."""
    if isinstance(model, onnx.ModelProto):
        return model, None
    if isinstance(model, bytes):
        return onnx.load_model_from_string(model), None
    return onnx.load(os.fspath(model), load_external_data=False), os.path.dirname(os.path.abspath(os.fspath(model)))
