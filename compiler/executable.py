"""A compiled model in this process: called with arrays, it gives arrays."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backends.cpu.jit import CodeImage
from ..ir.dims import evaluate, symbols
from ..ir.errors import ShapeError, UnsupportedError
from ..ir.program import ALIGNMENT
from .binding import Port, bind_symbols, check_names
from .compiled import Compiled, MemoryPlan, check_runs_here

SHAPES_KEPT = 64
"""How many settings of the symbolic dims are remembered; each costs some hundred bytes."""
_GOOD = 0x101
"""numpy's NPY_ARRAY_C_CONTIGUOUS and NPY_ARRAY_ALIGNED."""


_WORD = ctypes.sizeof(ctypes.c_size_t)
_DATA = object.__basicsize__ // _WORD
"""The data pointer's place in numpy's PyArrayObject, in words: behind the object's head, by numpy's stable ABI."""


def _all_memory() -> ctypes.Array[ctypes.c_size_t]:
    """The words of this process's memory by their addresses / 8: reading an array's data pointer there takes a tenth of
    the time of `array.ctypes.data`. UnsupportedError where numpy keeps its arrays in another way (it is tried)."""
    memory = (ctypes.c_size_t * (1 << 58)).from_address(0)
    probe = np.empty(3, np.uint8)
    if _WORD != 8 or memory[id(probe) // _WORD + _DATA] != probe.ctypes.data:
        raise UnsupportedError("compiled models run in a 64-bit CPython with numpy's usual layout of arrays")
    return memory


class _Sizes(NamedTuple):
    """What one setting of the input shapes means: symbols' values, outputs' shapes and types, bytes of arena 0."""

    symbols: tuple[int, ...]
    outputs: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]
    arena: int


class _Workspace:
    """What one call at a time needs: the address table, the symbols and the arenas, which grow to the largest call yet.

    `sizes` is the setting that it was last prepared for.
    """

    def __init__(self, table: Sequence[int], symbol_count: int, arenas: int, threads: int) -> None:
        self.table = (ctypes.c_size_t * (len(table) + arenas))(*table)
        self.symbols = (ctypes.c_int64 * max(symbol_count, 1))()
        self.arena_bytes = (ctypes.c_int64 * arenas)()
        self.arenas: list[np.ndarray | None] = [None] * arenas
        self.fixed = len(table)
        self.sizes: _Sizes | None = None
        # Arguments that are ctypes objects already are passed faster.
        address = ctypes.addressof
        self.arguments = (
            ctypes.c_void_p(address(self.table)),
            ctypes.c_void_p(address(self.symbols)),
            ctypes.c_int64(threads),
        )

    def prepare(self, sizes: _Sizes) -> None:
        self.symbols[: len(sizes.symbols)] = list(sizes.symbols)
        self.arena(0, sizes.arena)
        self.sizes = sizes

    def arena(self, segment: int, size: int) -> None:
        """Makes sure that the segment's arena has `size` bytes."""
        current = self.arenas[segment]
        if current is None or current.nbytes < size + ALIGNMENT:
            current = self.arenas[segment] = np.empty(size + ALIGNMENT, np.uint8)
            self.table[self.fixed + segment] = -(-current.ctypes.data // ALIGNMENT) * ALIGNMENT


class Executable:
    """A compiled model. Calls from several threads at once are fine; each gets a workspace of its own.

    `inputs` and `outputs` are the model's ports. Call it by position or by name; one output comes as an array, several
    as a tuple. Raises ShapeError where an argument does not fit, TargetError where its code cannot run on this machine.
    """

    def __init__(self, compiled: Compiled, threads: int) -> None:
        check_runs_here(compiled.target)
        self._compiled = compiled
        self._threads = threads
        count = compiled.segments
        functions = [f"onnxc_{what}_{i}" for what in ("run", "size") for i in range(count)]
        self._image = CodeImage(compiled.objects, functions, compiled.target)
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        sizing = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
        self._run_segment = [prototype(self._image.address(f"onnxc_run_{i}")) for i in range(count)]
        self._size_segment = [sizing(self._image.address(f"onnxc_size_{i}")) for i in range(count)]
        self._memory = _all_memory()
        self._run_first = self._run_segment[0]
        self._names = [value.name for value in compiled.inputs]
        self._input_dtypes = tuple(value.dtype.numpy for value in compiled.inputs)
        self._output_dtypes = tuple(value.dtype.numpy for value in compiled.outputs)
        self._ports = len(compiled.inputs) + len(compiled.outputs)
        given = {symbol.name for value in compiled.inputs for dim in value.shape for symbol in symbols(dim)}
        self._simple = count == 1 and given == set(compiled.symbols)  # the run computes no sizes
        self._table = [0] * self._ports + [array.ctypes.data for array in compiled.constants.values()]
        self._free: list[_Workspace] = []
        # Neither this nor the list above needs a lock: a thread that forks in the middle of a call leaves none held.
        self._known: dict[tuple[tuple[int, ...], ...], _Sizes] = {}

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
        return f"<onnxc.Executable {self._compiled.name}: ({inputs}) -> ({outputs})>"

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if named:
            given = dict(zip(self._names, arguments, strict=False)) | named
            if len(given) != len(arguments) + len(named):
                raise ShapeError(
                    f"an input is given twice, by position and by name; the inputs are {', '.join(self._names)}"
                )
            check_names(given, self._compiled.inputs)
            arguments = tuple(given[name] for name in self._names)
        results = self._execute(arguments)
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The outputs by name, for inputs by name."""
        check_names(inputs, self._compiled.inputs)
        results = self._execute(tuple(inputs[name] for name in self._names))
        return {value.name: result for value, result in zip(self._compiled.outputs, results, strict=True)}

    def _execute(self, arguments: Sequence[Any]) -> list[np.ndarray]:
        """Every line here is paid by each call: one and a half microseconds in all for one input and one output."""
        dtypes, memory = self._input_dtypes, self._memory
        count = len(dtypes)
        if len(arguments) != count:
            check_names(dict(zip(self._names, arguments, strict=False)), self._compiled.inputs)
            raise ShapeError(f"{len(arguments)} arguments for {count} inputs: {', '.join(self._names)}")
        arrays: list[np.ndarray] = []
        outputs: list[np.ndarray] = []
        shapes: list[tuple[int, ...]] = []
        addresses: list[Any] = []
        for array in arguments:
            # numpy has one object for each of its types in native order; an array with another is looked at closely.
            good = type(array) is np.ndarray and array.dtype is dtypes[len(arrays)] and array.flags.num & _GOOD == _GOOD
            if not good:
                array = self._converted(array, len(arrays))
            arrays.append(array)
            shapes.append(array.shape)
            addresses.append(memory[(id(array) >> 3) + _DATA])
        known = tuple(shapes)
        sizes = self._known.get(known) or self._sizes(known)
        for shape, dtype in sizes.outputs:
            output = np.empty(shape, dtype)
            outputs.append(output)
            addresses.append(memory[(id(output) >> 3) + _DATA])
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = _Workspace(self._table, len(self._compiled.symbols), self._compiled.segments, self._threads)
        if workspace.sizes is not sizes:
            workspace.prepare(sizes)
        workspace.table[: self._ports] = addresses
        self._run_first(*workspace.arguments)
        if not self._simple:
            self._later_segments(workspace, outputs)
        self._free.append(workspace)
        return outputs

    def _later_segments(self, workspace: _Workspace, outputs: list[np.ndarray]) -> None:
        """Runs the segments whose memory depends on what the first computed."""
        table, symbol_values, compiled = workspace.table, workspace.symbols, self._compiled
        workspace.sizes = None  # the run writes symbols
        for segment in range(1, compiled.segments + 1):
            bound = dict(zip(compiled.symbols, symbol_values, strict=False))
            for position, ready in enumerate(compiled.ready):
                if ready == segment:
                    value = compiled.outputs[position]
                    shape = [evaluate(dim, bound) for dim in value.shape]
                    if any(size < 0 for size in shape):
                        raise ShapeError(f"output {value.name!r} would have the shape {shape}")
                    outputs[position] = np.empty(shape, self._output_dtypes[position])
                    table[len(compiled.inputs) + position] = outputs[position].ctypes.data
            if segment == compiled.segments:
                break
            self._size_segment[segment](ctypes.addressof(symbol_values), ctypes.addressof(workspace.arena_bytes))
            if not 0 <= workspace.arena_bytes[segment] < 1 << 46:
                raise ShapeError(f"sizes computed from data ask for {workspace.arena_bytes[segment]} bytes: {bound}")
            workspace.arena(segment, workspace.arena_bytes[segment])
            self._run_segment[segment](*workspace.arguments)

    def _converted(self, argument: Any, position: int) -> np.ndarray:
        """An argument as a contiguous, aligned array of the right type; ShapeError where it has another type."""
        value = self._compiled.inputs[position]
        if not isinstance(argument, np.ndarray) and hasattr(argument, "__dlpack__"):
            argument = np.from_dlpack(argument)
        array = np.asarray(argument)
        wanted = self._input_dtypes[position]
        native = array.dtype.newbyteorder("=")
        plain = not isinstance(argument, np.ndarray | np.generic)
        if native != wanted and not (plain and np.can_cast(array.dtype, wanted, "same_kind")):
            raise ShapeError(f"input {value.name!r} is of {array.dtype}: it must be {wanted}, {Port.of(value)}")
        return np.require(array, wanted, ["C_CONTIGUOUS", "ALIGNED"]).reshape(array.shape)

    def _sizes(self, shapes: tuple[tuple[int, ...], ...]) -> _Sizes:
        compiled = self._compiled
        bound = bind_symbols(compiled.inputs, shapes, compiled.assumptions)
        values = tuple(bound.get(name, 0) for name in compiled.symbols)
        outputs: list[tuple[tuple[int, ...], np.dtype[Any]]] = []
        for value, ready, dtype in zip(compiled.outputs, compiled.ready, self._output_dtypes, strict=True):
            # Memory for what later segments tell the shape of comes when they do.
            shape = (0,) if ready else tuple(evaluate(dim, bound) for dim in value.shape)
            if any(size < 0 for size in shape):
                raise ShapeError(f"inputs of shapes {shapes} give the output {value.name!r} the shape {shape}")
            outputs.append((shape, dtype))
        symbol_values = (ctypes.c_int64 * max(len(values), 1))(*values)
        result = (ctypes.c_int64 * compiled.segments)()
        self._size_segment[0](ctypes.addressof(symbol_values), ctypes.addressof(result))
        if len(self._known) >= SHAPES_KEPT:
            self._known = {}
        sizes = self._known[shapes] = _Sizes(values, tuple(outputs), result[0])
        return sizes
