"""A compiled model in this process: called with arrays, it gives arrays."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..backends.cpu.jit import CodeImage
from ..backends.cpu.python_call import ARENA, HELD, Port, PythonCalls, arrays_are_as_known, workspace_record
from ..backends.cpu.violations import VIOLATION, raise_violation
from ..ir.dims import symbols
from ..ir.errors import ShapeError
from ..ir.graph import Value
from ..ir.program import ALIGNMENT
from ..ir.run_state import STATE, raise_faults, started, words_of
from .compiled import Compiled, check_runs_here
from .interface import Interface, computed_shape
from .limits import check_outputs, check_run
from .pages import in_large_pages

SHAPES_KEPT = 64
"""How many settings of the symbolic dims are remembered; each costs some hundred bytes."""
RECYCLED = 31 << 20
"""Bytes up to which glibc is to keep memory of outputs for the next ones. By itself it gives larger arrays back to the
system when they are freed, until it has seen one of that size freed (and 32 MB at most): the pages of all outputs were
new in each call, which took a third of the time of GPT-2's step."""
_GOOD = 0x101
"""numpy's NPY_ARRAY_C_CONTIGUOUS and NPY_ARRAY_ALIGNED."""


def _data_addresses() -> Callable[[np.ndarray], int]:
    """What tells where an array's data lies: by a look into the array, which takes a tenth of the time of
    `array.ctypes.data`, where numpy's arrays are as its ABI says."""
    if not arrays_are_as_known():
        return lambda array: array.ctypes.data
    words = (ctypes.c_size_t * (1 << 58)).from_address(0)
    return lambda array: words[(id(array) >> 3) + 2]


class _Sizes(NamedTuple):
    """What one setting of the input shapes means: symbols' values, outputs' shapes and types, bytes of arena 0."""

    symbols: tuple[int, ...]
    outputs: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]
    arena: int


class _Workspace:
    """What one call at a time needs: the address table, the symbols and the arenas, which grow to the largest call yet.

    `sizes` is the setting that it was last prepared for.
    """

    def __init__(
        self, table: Sequence[int], state: int | None, checks: int, symbol_count: int, arenas: int, threads: int
    ) -> None:
        """`state` is the place in the table of what random operators go by: numbers of this workspace's own."""
        self.state = started()
        self.faults = (ctypes.c_int64 * words_of(checks))()
        table = [*table, *([ctypes.addressof(self.faults)] if checks else [])]
        if state is not None:
            table[state] = self.state.ctypes.data
        self.table = (ctypes.c_size_t * (len(table) + arenas))(*table)
        self.symbols = (ctypes.c_int64 * max(symbol_count, 1))()
        self.arena_bytes = (ctypes.c_int64 * arenas)()
        self.arenas: list[np.ndarray | None] = [None] * arenas
        self.fixed = len(table)
        self.sizes: _Sizes | None = None
        faults = (ctypes.addressof(self.faults), len(self.faults)) if checks else (0, 0)
        places = ctypes.addressof(self.table), ctypes.addressof(self.symbols)
        self.record, self._objects = workspace_record(*places, *faults, threads, len(table))
        self.address = self.record.ctypes.data
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
            if segment == 0:
                self.record[ARENA] = size


class Executable(Interface):
    """A compiled model on the CPU. Calls from several threads at once are fine; each gets a workspace of its own.

    `inputs` and `outputs` are the model's ports. Call it by position or by name; one output comes as an array, several
    as a tuple. Raises ShapeError where an argument does not fit, TargetError where its code cannot run on this machine.
    """

    def __init__(self, compiled: Compiled, threads: int, most: int, mapped: bool = False) -> None:
        """`most` are the bytes that a run may take; `mapped` constants stay in the file that they are mapped from."""
        check_runs_here(compiled.target)
        super().__init__(compiled)
        self._threads = threads
        self._most = most
        count = compiled.segments
        functions = [f"onnxc_{what}_{i}" for what in ("run", "size") for i in range(count)]
        checked = any(VIOLATION.encode() in content for content in compiled.objects)
        self._image = CodeImage(compiled.objects, [*functions, *([VIOLATION] if checked else [])], compiled.target)
        self._violation = self._image.address(VIOLATION) if checked else 0
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        sizing = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
        self._run_segment = [prototype(self._image.address(f"onnxc_run_{i}")) for i in range(count)]
        self._size_segment = [sizing(self._image.address(f"onnxc_size_{i}")) for i in range(count)]
        self._data_of = _data_addresses()
        self._run_first = self._run_segment[0]
        self._ports = len(compiled.inputs) + len(compiled.outputs)
        given = {symbol.name for value in compiled.inputs for dim in value.shape for symbol in symbols(dim)}
        self._writes_symbols = given != set(compiled.symbols)  # loops, and sizes that data tell
        self._computes_sizes = count > 1 or any(compiled.ready)
        self._simple = not self._computes_sizes and not compiled.checks and not checked
        self._mapped = mapped
        self._placed: dict[str, Mapping[str, np.ndarray]] = {}
        names = list(compiled.constants)
        self._state = self._ports + names.index(STATE) if STATE in names else None
        self._constant_bytes = sum(array.nbytes for array in compiled.constants.values())
        self._workspaces: dict[int, _Workspace] = {}
        """All of them by the addresses of their records; `_take` gives one that is free."""
        # Neither this nor the list of the free ones needs a lock: a thread that forks in the middle of a call leaves
        # none held.
        self._known: dict[tuple[tuple[int, ...], ...], _Sizes] = {}
        self._run_fast: Callable[[Executable, Mapping[str, Any]], dict[str, Any]] = Interface.run
        self._call_fast: Callable[[Executable, tuple[Any, ...]], Any] = Interface._call
        ports = [[value.name for value in values] for values in (compiled.outputs, compiled.inputs)]
        self._donated = {ports[0].index(output): ports[1].index(source) for output, source in compiled.donated}
        """For outputs the inputs whose memory they are, by position."""
        plain = not (self._computes_sizes or checked or self._donated)
        self._native = self._python_calls() if plain else None
        if self._native is None:
            self._take, self._give = _free_list()
        else:
            self._take, self._give = self._native.take, self._native.give
            self._run_fast, self._call_fast = self._native.run, self._native.call

    def _python_calls(self) -> PythonCalls | None:
        def ports(values: Sequence[Value], dtypes: Sequence[np.dtype[Any]]) -> list[Port]:
            return [Port(value.name, dtype, len(value.shape)) for value, dtype in zip(values, dtypes, strict=True)]

        inputs = ports(self._compiled.inputs, self._input_dtypes)
        outputs = ports(self._compiled.outputs, self._output_dtypes)
        return PythonCalls.of(inputs, outputs, self._image.address("onnxc_run_0"), (Interface.run, Interface._call))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name, for inputs by name."""
        return self._run_fast(self, inputs)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return super().__call__(*arguments, **named) if named else self._call_fast(self, arguments)

    def _execute(self, arguments: Sequence[Any], *settings: Any) -> list[np.ndarray]:
        """What `PythonCalls` does, for all arguments and on all interpreters."""
        dtypes, data_of = self._input_dtypes, self._data_of
        count = len(dtypes)
        if len(arguments) != count:
            raise self._wrong_count(arguments)
        arrays: list[np.ndarray] = []
        shapes: list[tuple[int, ...]] = []
        for array in arguments:
            # numpy has one object for each of its types in native order; an array with another is looked at closely.
            good = type(array) is np.ndarray and array.dtype is dtypes[len(arrays)] and array.flags.num & _GOOD == _GOOD
            if not good:
                array = self._converted(array, len(arrays))
            arrays.append(array)
            shapes.append(array.shape)
        known = tuple(shapes)
        sizes = self._known.get(known) or self._sizes(known)
        outputs = [
            self._donation(position, arguments, arrays) if position in self._donated else np.empty(shape, dtype)
            for position, (shape, dtype) in enumerate(sizes.outputs)
        ]
        workspace = self._workspaces.get(self._take()) or self._new_workspace()
        try:
            if self._native is not None or workspace.sizes is not sizes:
                workspace.prepare(sizes)
            workspace.table[: self._ports] = [data_of(array) for array in (*arrays, *outputs)]
            self._run_first(*workspace.arguments)
            if not self._simple:
                if workspace.faults and workspace.faults[0]:
                    raise_faults(self._compiled.checks, list(workspace.faults))
                if self._computes_sizes:
                    self._later_segments(workspace, outputs)
                if self._violation:
                    raise_violation(self._violation)
        except BaseException:
            ctypes.memset(workspace.faults, 0, ctypes.sizeof(workspace.faults))
            raise
        finally:
            self._give(workspace.address)
        return outputs

    def _donation(self, output: int, arguments: Sequence[Any], arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The array that an output is written into: what was given as the input, not a copy of it."""
        position = self._donated[output]
        array = arrays[position]
        if array is not arguments[position] or not array.flags.writeable:
            name, result = self._compiled.inputs[position].name, self._compiled.outputs[output].name
            raise ShapeError(
                f"input {name!r} is donated, and becomes the output {result!r}: it must be a writeable, C-contiguous"
                f" array of numpy of {self._input_dtypes[position]}"
            )
        return arrays[position]

    def _new_workspace(self) -> _Workspace:
        checks = len(self._compiled.checks)
        symbol_count, segments = len(self._compiled.symbols), self._compiled.segments
        table = [0] * self._ports + [array.ctypes.data for array in self._constants().values()]
        workspace = _Workspace(table, self._state, checks, symbol_count, segments, self._threads)
        return self._workspaces.setdefault(workspace.address, workspace)

    def _constants(self) -> Mapping[str, np.ndarray]:
        """The constants where runs read them. Before the first run those of a file are moved to large pages: loading a
        model takes no time for its weights. Threads that do so at once keep the copy of one of them."""
        if "" not in self._placed:
            constants = self._compiled.constants
            placed = self._placed.setdefault("", constants if self._mapped else in_large_pages(constants))
            self._compiled = replace(self._compiled, constants=placed)
        return self._placed[""]

    def _later_segments(self, workspace: _Workspace, outputs: list[np.ndarray]) -> None:
        """Runs the segments whose memory depends on what the first computed."""
        table, symbol_values, compiled = workspace.table, workspace.symbols, self._compiled
        workspace.sizes = None  # the run writes symbols
        for segment in range(1, compiled.segments + 1):
            bound = dict(zip(compiled.symbols, symbol_values, strict=False))
            for position, ready in enumerate(compiled.ready):
                if ready == segment:
                    shape = computed_shape(compiled.outputs[position], bound)
                    check_outputs([compiled.outputs[position]], [shape], self._most)
                    outputs[position] = np.empty(shape, self._output_dtypes[position])
                    table[len(compiled.inputs) + position] = self._data_of(outputs[position])
            if segment == compiled.segments:
                break
            self._size_segment[segment](ctypes.addressof(symbol_values), ctypes.addressof(workspace.arena_bytes))
            if workspace.arena_bytes[segment] != check_run(compiled.arena.slots[segment], [], bound, self._most):
                raise ShapeError(f"sizes computed from data are too large: {bound}")
            workspace.arena(segment, workspace.arena_bytes[segment])
            self._run_segment[segment](*workspace.arguments)
            if workspace.faults and workspace.faults[0]:
                raise_faults(compiled.checks, list(workspace.faults))

    def _sizes(self, shapes: tuple[tuple[int, ...], ...]) -> _Sizes:
        compiled = self._compiled
        bound, found = self._bound(shapes)
        written = check_outputs(compiled.outputs, found, self._most)
        arena = check_run(compiled.arena.slots[0], written, bound, self._most)
        values = tuple(bound.get(name, 0) for name in compiled.symbols)
        # Memory for what later segments tell the shape of comes when they do.
        outputs = tuple(((0,) if s is None else s, t) for s, t in zip(found, self._output_dtypes, strict=True))
        symbol_values = (ctypes.c_int64 * max(len(values), 1))(*values)
        result = (ctypes.c_int64 * compiled.segments)()
        self._size_segment[0](ctypes.addressof(symbol_values), ctypes.addressof(result))
        if result[0] != arena:
            raise ShapeError(f"inputs of shapes {shapes} give sizes that are too large")
        ports = zip(
            (*shapes, *(shape for shape, _ in outputs)), (*self._input_dtypes, *self._output_dtypes), strict=True
        )
        np.empty(RECYCLED, np.uint8)  # allocated and freed, not touched
        touched = arena + self._constant_bytes + sum(math.prod(shape) * dtype.itemsize for shape, dtype in ports)
        if len(self._known) >= SHAPES_KEPT:
            self._known = {}
            if self._native is not None:
                self._native.forget()
        if self._native is not None:
            dims = [size for shape in (*shapes, *(shape for shape, _ in outputs)) for size in shape]
            self._native.know(dims, values, arena, touched > HELD or self._writes_symbols)
        sizes = self._known[shapes] = _Sizes(values, outputs, arena)
        return sizes


def _free_list() -> tuple[Callable[[], int], Callable[[int], object]]:
    """Like `take` and `give` of PythonCalls."""
    free: list[int] = []

    def take() -> int:
        try:
            return free.pop()
        except IndexError:
            return 0

    return take, free.append
