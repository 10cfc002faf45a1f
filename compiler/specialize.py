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
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
import onnx

from ..ir.dtypes import BY_ONNX
from ..ir.errors import HostNeeded, ShapeError, UnsupportedError, ValueNeeded
from .binding import Port
from .compiled import Compiled
from .deferred import Deferred
from .interface import Interface

Shape: TypeAlias = tuple[int | None, ...]
CompileValues: TypeAlias = Callable[[onnx.ModelProto, Mapping[str, Shape], int], Interface]
"""Compiles a model with some sizes fixed, those left open being of some smallest size or more."""

KEPT = 16
"""Compiled forms that are kept."""
ROUTES = 64
"""Settings of shapes and parameter values whose compiled form is found at once."""
LARGEST = 64
"""Elements above which an input is data and never a constant of the code."""
STRETCHED = 2
"""The smallest size of an axis that is not squeezed or broadcast."""


class SpecializingExecutable(Deferred):
    """Has the interface of an Executable; `parameters` are the inputs whose values the code depends on."""

    def __init__(
        self,
        model: onnx.ModelProto,
        compile_values: CompileValues,
        reason: str,
        for_host: Callable[[HostNeeded | ValueNeeded], Deferred] | None = None,
    ) -> None:
        """`for_host` gives what runs the model where all values and sizes do not suffice to compile it."""
        self._model = model
        self._compile = compile_values
        self._for_host = for_host
        initial = {tensor.name for tensor in model.graph.initializer}
        self._values = [value for value in model.graph.input if value.name not in initial]
        self._small = tuple(value.name for value in self._values if _is_small(value))
        self._level = 0
        self._reason = reason
        self._known: OrderedDict[tuple[bytes, ...], Interface] = OrderedDict()
        self._divided: Deferred | None = None
        self._lock = threading.Lock()
        self._by_value = [[(v.name, by and v.name in self._small) for v in self._values] for by, _ in _LEVELS]
        self._routes: dict[tuple[Any, ...], tuple[Interface | Deferred, tuple[str, ...]]] = {}
        self._routes_level = 0

    @property
    def compiled(self) -> Compiled:
        """Raises UnsupportedError: there is no code that serves all runs, to be saved or shown."""
        values = ", ".join(self._small) or "sizes of inputs"
        raise UnsupportedError(
            f"no one code serves all runs of this model: it is compiled anew for {values} ({self._reason})"
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        """The inputs whose values the code depends on, as far as is known yet."""
        return self._small if _LEVELS[self._level][0] else ()

    @property
    def inputs(self) -> tuple[Port, ...]:
        return tuple(map(_port, self._values))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return tuple(map(_port, self._model.graph.output))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name, for inputs by name; compiles where these parameter values are new."""
        route = None
        with suppress(AttributeError, KeyError):  # an input that is missing, or is no array
            route = self._routes.get(self._place(inputs)) if len(inputs) == len(self._values) else None
        if route is not None:
            executable, taken = route
            return executable.run({name: inputs[name] for name in taken})
        executable = self.specialized(inputs)
        known = {port.name for port in executable.inputs}
        results = executable.run({k: v for k, v in inputs.items() if k in known or k not in self._small})
        with suppress(AttributeError, KeyError):
            self._keep(self._place(inputs), executable, tuple(name for name in inputs if name in known))
        return results

    def serving(self, inputs: Mapping[str, Any]) -> Interface | Deferred:
        return self.specialized(inputs)

    def _place(self, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """What decides which code runs, as fast to make as can be: shapes, and of parameters type and values.

        AttributeError or KeyError where arguments are no arrays or not all are there.
        """
        place: list[Any] = []
        for name, by_value in self._by_value[self._level]:
            array = inputs[name]
            place.append((array.dtype.str, array.shape, array.tobytes()) if by_value else array.shape)
        return tuple(place)

    def _keep(self, place: tuple[Any, ...], executable: Interface | Deferred, taken: tuple[str, ...]) -> None:
        with self._lock:
            if len(self._routes) >= ROUTES or self._routes_level != self._level:
                self._routes, self._routes_level = {}, self._level
            if executable is self._divided or executable in self._known.values():
                self._routes[place] = (executable, taken)

    def specialized(self, inputs: Mapping[str, Any]) -> Interface | Deferred:
        """The executable for the values that the parameters have in `inputs`. ShapeError where one is missing."""
        missing = [name for name in self._small if name not in inputs]
        if missing:
            raise ShapeError(f"inputs do not fit (missing: {', '.join(missing)})")
        arrays = {value.name: self._seen(value.name, inputs) for value in self._values if value.name in inputs}
        with self._lock:
            if self._divided is not None:
                return self._divided
            found = self._known.get(self._key(arrays))
            if found is None:
                try:
                    found = self._compiled(arrays)
                except (ValueNeeded, HostNeeded) as error:
                    if self._for_host is None:
                        raise
                    self._divided = self._for_host(error)
                    return self._divided
                self._known[self._key(arrays)] = found
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
                    self._routes = {}  # perhaps to that one
        return found

    def _seen(self, name: str, inputs: Mapping[str, Any]) -> np.ndarray:
        """An input as far as the code may depend on it: its values where it is small, of others the shape alone, so
        that what lies in a GPU's memory stays there."""
        argument = inputs[name]
        if name in self._small and hasattr(argument, "cpu"):  # a tensor of PyTorch
            argument = argument.cpu()
        if name in self._small or not hasattr(argument, "shape"):
            return np.asarray(argument)
        return np.broadcast_to(np.uint8(0), tuple(argument.shape))

    def _key(self, arrays: Mapping[str, np.ndarray]) -> tuple[bytes, ...]:
        _, fixed = _LEVELS[self._level]
        values = [f"{a.dtype}{a.shape}".encode() + a.tobytes() for n, a in arrays.items() if n in self.parameters]
        return (*values, repr([fixed(a.shape) for n, a in arrays.items() if n not in self.parameters]).encode())

    def _compiled(self, arrays: Mapping[str, np.ndarray]) -> Interface:
        """Compiled with as few values and sizes fixed as will do; remembers which those are."""
        while True:
            _, fixed = _LEVELS[self._level]
            values = {name: arrays[name] for name in self.parameters}
            sizes = {name: fixed(array.shape) for name, array in arrays.items() if name not in values}
            shapes = {name: shape for name, shape in sizes.items() if set(shape) - {None}}
            try:
                return self._compile(self._with_constants(values), shapes, STRETCHED if fixed is _ones else 0)
            except (ValueNeeded, HostNeeded):
                if self._level + 1 == len(_LEVELS):
                    raise
                self._level += 1

    def _with_constants(self, arrays: Mapping[str, np.ndarray]) -> onnx.ModelProto:
        if not arrays:
            return self._model
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
        return model


def _none(shape: Shape) -> Shape:
    return (None,) * len(shape)


def _ones(shape: Shape) -> Shape:
    return tuple(size if size is not None and size < STRETCHED else None for size in shape)


def _all(shape: Shape) -> Shape:
    return shape


_LEVELS: Sequence[tuple[bool, Callable[[Shape], Shape]]] = ((False, _ones), (True, _none), (True, _ones), (True, _all))
"""Whether values are constants, and which sizes are fixed: in this order until the model can be compiled."""


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
