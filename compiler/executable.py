"""A compiled model in this process: called with arrays, it gives arrays."""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends.cpu.build import Built
from ..backends.cpu.entry import table_order
from ..backends.cpu.jit import CodeImage
from ..ir.dims import evaluate, symbols
from ..ir.errors import OnnxcError, ShapeError
from ..ir.graph import Value
from ..ir.program import ALIGNMENT, ArenaPlan, Bind, walk
from .binding import Port, bind_symbols, check_names
from .dump import stage_text

SHAPES_KEPT = 64
"""How many settings of the symbolic dims are remembered; each costs some hundred bytes."""

# The data pointer's place in numpy's PyArrayObject, part of its stable ABI: reading it is five times faster than asking.
_DATA_OFFSET = object.__basicsize__


def _address(array: np.ndarray) -> int:
    return ctypes.c_void_p.from_address(id(array) + _DATA_OFFSET).value or 0


@dataclass(frozen=True)
class _Sizes:
    """What one setting of the input shapes means: symbols' values, output shapes, bytes of the first arena."""

    symbols: tuple[int, ...]
    outputs: tuple[tuple[int, ...] | None, ...]
    arena: int


class _Workspace:
    """What one call at a time needs: the address table, the symbols and the arenas. Grows to the largest call yet."""

    def __init__(self, table: Sequence[int], symbol_count: int, arenas: int) -> None:
        self.table = (ctypes.c_void_p * (len(table) + arenas))(*table)
        self.symbols = (ctypes.c_int64 * max(symbol_count, 1))()
        self.sizes = (ctypes.c_int64 * arenas)()
        self.arenas: list[np.ndarray | None] = [None] * arenas
        self.fixed = len(table)

    def arena(self, segment: int, size: int) -> None:
        """Makes sure that the segment's arena has `size` bytes."""
        current = self.arenas[segment]
        if current is None or current.nbytes < size + ALIGNMENT:
            current = self.arenas[segment] = np.empty(size + ALIGNMENT, np.uint8)
            self.table[self.fixed + segment] = -(-_address(current) // ALIGNMENT) * ALIGNMENT


class Executable:
    """A compiled model. Calls from several threads at once are fine; each gets a workspace of its own.

    `inputs` and `outputs` are the model's ports. Call it by position or by name; one output comes as an array, several as
    a tuple. Raises ShapeError where an argument does not fit.
    """

    def __init__(self, built: Built, constants: Mapping[str, np.ndarray], threads: int, details: Mapping[str, Any]):
        self._built = built
        self._program = program = built.program
        self._threads = threads
        self._details = dict(details)
        self._constants = {
            name: np.ascontiguousarray(constants[name]) for name in table_order(program) if name in constants
        }
        functions = [f"onnxc_{what}_{i}" for what in ("run", "size") for i in range(len(program.segments))]
        self._image = CodeImage(built.objects, functions, built.target)
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        sizing = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
        count = len(program.segments)
        self._run_segment = [prototype(self._image.address(f"onnxc_run_{i}")) for i in range(count)]
        self._size_segment = [sizing(self._image.address(f"onnxc_size_{i}")) for i in range(count)]
        self._symbols = program.symbols
        self._input_dtypes = tuple(value.dtype.numpy for value in program.inputs)
        self._output_dtypes = tuple(value.dtype.numpy for value in program.outputs)
        order = table_order(program)
        self._table = [0 if name not in self._constants else _address(self._constants[name]) for name in order]
        self._input_slots = [order.index(value.name) for value in program.inputs]
        self._output_slots = [order.index(name) for name in program.results]
        self._free: list[_Workspace] = []
        self._known: OrderedDict[tuple[tuple[int, ...], ...], _Sizes] = OrderedDict()
        self._lock = threading.Lock()
        self._names = [value.name for value in program.inputs]
        self._output_ready = [self._segment_of_output(value) for value in program.outputs]

    @property
    def inputs(self) -> tuple[Port, ...]:
        return tuple(map(Port.of, self._program.inputs))

    @property
    def outputs(self) -> tuple[Port, ...]:
        return tuple(map(Port.of, self._program.outputs))

    @property
    def plan(self) -> ArenaPlan:
        """Where each buffer lies in the arena, and the lower bound of its size."""
        return self._program.plan

    def dump(self, stage: str = "graph", kernel: str | None = None) -> str:
        """The text of a stage: "graph" (after all passes), "kernels", "vectors", "program", "llvm" or "asm".

        `kernel` picks some: a kernel's name or a part of it, or an ONNX node's. OnnxcError for an unknown one.
        """
        graph = self._details.get("graph")
        if stage != "graph":
            return stage_text(stage, self._program, self._built.target, kernel)
        if graph is None:
            raise OnnxcError("this executable was loaded: only one that was compiled here has its graph")
        return str(graph)

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(map(str, ports)) for ports in (self.inputs, self.outputs))
        return f"<onnxc.Executable {self._program.name}: ({inputs}) -> ({outputs})>"

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if named:
            given = dict(zip(self._names, arguments, strict=False)) | named
            if len(given) != len(arguments) + len(named):
                raise ShapeError(
                    f"an input is given twice, by position and by name; the inputs are {', '.join(self._names)}"
                )
            check_names(given, self._program.inputs)
            arguments = tuple(given[name] for name in self._names)
        results = self._execute(arguments)
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The outputs by name, for inputs by name."""
        check_names(inputs, self._program.inputs)
        results = self._execute(tuple(inputs[name] for name in self._names))
        return {value.name: result for value, result in zip(self._program.outputs, results, strict=True)}

    def _execute(self, arguments: Sequence[Any]) -> list[np.ndarray]:
        if len(arguments) != len(self._input_dtypes):
            check_names(dict(zip(self._names, arguments, strict=False)), self._program.inputs)
            raise ShapeError(f"{len(arguments)} arguments for {len(self._names)} inputs: {', '.join(self._names)}")
        arrays = [
            a
            if type(a) is np.ndarray and a.dtype == d and a.flags.c_contiguous and a.dtype.isnative
            else self._converted(a, i)
            for i, (a, d) in enumerate(zip(arguments, self._input_dtypes, strict=True))
        ]
        shapes = tuple([a.shape for a in arrays])
        sizes = self._known.get(shapes) or self._sizes(shapes)
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = _Workspace(self._table, len(self._symbols), len(self._run_segment))
        table = workspace.table
        for slot, array in zip(self._input_slots, arrays, strict=True):
            table[slot] = _address(array)
        if self._symbols:
            workspace.symbols[: len(sizes.symbols)] = sizes.symbols
        workspace.arena(0, sizes.arena)
        outputs: list[np.ndarray] = []
        for shape, dtype, slot in zip(sizes.outputs, self._output_dtypes, self._output_slots, strict=True):
            result = np.empty(shape if shape is not None else (0,), dtype)
            table[slot] = _address(result)
            outputs.append(result)
        self._run_segment[0](ctypes.addressof(table), ctypes.addressof(workspace.symbols), self._threads)
        if len(self._run_segment) > 1 or None in sizes.outputs:
            self._later_segments(workspace, outputs)
        self._free.append(workspace)
        return outputs

    def _later_segments(self, workspace: _Workspace, outputs: list[np.ndarray]) -> None:
        """Runs the segments whose memory depends on what the first computed."""
        table, symbol_values = workspace.table, workspace.symbols
        for segment in range(1, len(self._run_segment) + 1):
            bound = dict(zip(self._symbols, symbol_values, strict=False))
            for position, ready in enumerate(self._output_ready):
                if ready == segment:
                    value = self._program.outputs[position]
                    shape = [evaluate(dim, bound) for dim in value.shape]
                    if any(size < 0 for size in shape):
                        raise ShapeError(f"output {value.name!r} would have the shape {shape}")
                    outputs[position] = np.empty(shape, self._output_dtypes[position])
                    table[self._output_slots[position]] = _address(outputs[position])
            if segment == len(self._run_segment):
                break
            self._size_segment[segment](ctypes.addressof(symbol_values), ctypes.addressof(workspace.sizes))
            if not 0 <= workspace.sizes[segment] < 1 << 46:
                raise ShapeError(f"sizes computed from data ask for {workspace.sizes[segment]} bytes: {bound}")
            workspace.arena(segment, workspace.sizes[segment])
            self._run_segment[segment](ctypes.addressof(table), ctypes.addressof(symbol_values), self._threads)

    def _segment_of_output(self, value: Value) -> int:
        """The first segment before which the output's shape is known; 0 where the inputs tell it."""
        names = {s.name for dim in value.shape for s in symbols(dim)}
        segment = 0
        for number, steps in enumerate(self._program.segments):
            for step in walk(steps):
                name = getattr(step, "symbol", None) or getattr(step, "count", None)
                if name in names:
                    segment = max(segment, number + 1)
        return segment

    def _converted(self, argument: Any, position: int) -> np.ndarray:
        """An argument as a contiguous array of the right type; ShapeError where it has another type."""
        value = self._program.inputs[position]
        if not isinstance(argument, np.ndarray) and hasattr(argument, "__dlpack__"):
            argument = np.from_dlpack(argument)
        array = np.asarray(argument)
        wanted = self._input_dtypes[position]
        native = array.dtype.newbyteorder("=")
        plain = not isinstance(argument, np.ndarray | np.generic)
        if native != wanted and not (plain and np.can_cast(array.dtype, wanted, "same_kind")):
            raise ShapeError(f"input {value.name!r} is of {array.dtype}: it must be {wanted}, {Port.of(value)}")
        # ascontiguousarray makes rank 0 rank 1.
        return np.ascontiguousarray(array, wanted).reshape(array.shape)

    def _sizes(self, shapes: tuple[tuple[int, ...], ...]) -> _Sizes:
        program = self._program
        bound = bind_symbols(program.inputs, shapes, program.assumptions)
        values = tuple(bound.get(name, 0) for name in self._symbols)
        outputs = tuple(
            None if ready else tuple(evaluate(dim, bound) for dim in value.shape)
            for value, ready in zip(program.outputs, self._output_ready, strict=True)
        )
        for value, shape in zip(program.outputs, outputs, strict=True):
            if shape is not None and any(size < 0 for size in shape):
                raise ShapeError(f"inputs of shapes {shapes} give the output {value.name!r} the shape {shape}")
        symbol_values = (ctypes.c_int64 * max(len(values), 1))(*values)
        result = (ctypes.c_int64 * len(self._size_segment))()
        self._size_segment[0](ctypes.addressof(symbol_values), ctypes.addressof(result))
        sizes = _Sizes(values, outputs, result[0])
        with self._lock:
            self._known[shapes] = sizes
            while len(self._known) > SHAPES_KEPT:
                self._known.popitem(last=False)
        return sizes


__all__ = ["Bind", "Executable"]
