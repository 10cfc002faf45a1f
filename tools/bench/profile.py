"""Time per kernel, in ONNX's names: the program's steps are walked from Python and each call of a kernel is timed.

Kernels, arena and constants are those of the compiled model; only the code between the calls is replaced. Timing costs
about half a microsecond a call, which is measured on nothing and subtracted.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...backends.cpu.jit import CodeImage
from ...compiler.binding import bind_symbols
from ...compiler.compiled import Compiled
from ...ir.dims import evaluate
from ...ir.errors import UnsupportedError
from ...ir.program import ALIGNMENT, Assign, Bind, Choose, Memory, Place, Repeat, Run, Steps
from ...passes.work import NOTHING, Load, load_of

Array = np.ndarray[Any, Any]


@dataclass
class Entry:
    """One call of the program: the kernel, the ONNX nodes, the seconds of each run and what one run asks for."""

    kernel: str
    origin: tuple[str, ...]
    seconds: list[float] = field(default_factory=list)
    load: Load = NOTHING

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Walker:
    """Runs a compiled model step by step. Raises UnsupportedError for one that was not compiled in this process."""

    def __init__(self, compiled: Compiled, threads: int) -> None:
        if compiled.program is None or compiled.device is not None:
            raise UnsupportedError("profiles are made of models compiled for the CPU in this process")
        self._compiled, self._threads = compiled, threads
        self.program = compiled.program()
        self._image = CodeImage(compiled.objects, list(self.program.kernels), compiled.target)
        self._functions: dict[str, Any] = {}
        for name, kernel in self.program.kernels.items():
            arguments = [ctypes.c_void_p] * len(kernel.parameters) + [ctypes.c_int64] * (len(kernel.sizes) + 1)
            self._functions[name] = ctypes.CFUNCTYPE(None, *arguments)(self._image.address(name))
        self._loads: dict[tuple[str, tuple[int, ...]], Load] = {}
        self._memory: dict[str, Array] = {}
        self._arenas: list[Array] = []
        self.entries: dict[int, Entry] = {}
        self._totals: dict[int, float] = {}
        self.counting = True
        """Whether what the calls ask for is counted: in one run."""

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """One run, its times added to `entries`; the outputs."""
        program = self.program
        arrays = [np.require(inputs[value.name], value.dtype.numpy, ["C"]) for value in program.inputs]
        self.symbols = bind_symbols(program.inputs, [array.shape for array in arrays])
        self._memory = {value.name: array for value, array in zip(program.inputs, arrays, strict=True)}
        for memory in program.memories.values():
            if memory.role == "constant":
                self._memory[memory.name] = self._compiled.constants[memory.name]
        self._totals = {}
        for number, segment in enumerate(program.segments):
            self._allocate(number)
            self._steps(segment)
        for position, seconds in self._totals.items():
            self.entries[position].seconds.append(seconds)
        return [
            self._memory[name].reshape([evaluate(dim, self.symbols) for dim in value.shape])
            for name, value in zip(program.results, program.outputs, strict=True)
        ]

    def _allocate(self, number: int) -> None:
        """Memory for what the segment begins with: outputs and others on their own, the arena as it is planned."""
        for memory in self.program.memories.values():
            if memory.role in ("output", "fault") and memory.name not in self._memory and self._is_known(memory):
                self._memory[memory.name] = np.zeros(evaluate(memory.size, self.symbols), memory.dtype.numpy)
        slots = self.program.plan.slots[number]
        room = [-(-evaluate(slot.bytes, self.symbols) // ALIGNMENT) * ALIGNMENT for slot in slots]
        offsets: dict[int, int] = {}
        while len(offsets) < len(slots):
            for index, slot in enumerate(slots):
                if index not in offsets and offsets.keys() >= set(slot.below):
                    offsets[index] = max((offsets[j] + room[j] for j in slot.below), default=0)
        size = max((offsets[i] + room[i] for i in offsets), default=0)
        if len(self._arenas) <= number or self._arenas[number].nbytes < size:
            raw = np.zeros(size + ALIGNMENT, np.uint8)
            start = -raw.ctypes.data % ALIGNMENT
            self._arenas[number:] = [raw[start : start + size]]
        for index, slot in enumerate(slots):
            self._memory[slot.memory] = self._arenas[number][offsets[index] :]

    def _is_known(self, memory: Memory) -> bool:
        try:
            evaluate(memory.size, self.symbols)
        except KeyError:
            return False
        return True

    def _address(self, place: Place) -> int:
        memory = self.program.memories[place.memory]
        return self._memory[place.memory].ctypes.data + evaluate(place.offset, self.symbols) * memory.dtype.bytes

    def _integer(self, place: Place, kind: Any) -> int:
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * kind.itemsize).from_address(self._address(place)))
        return int(memory.view(kind)[0])

    def _steps(self, steps: Steps) -> None:
        for step in steps:
            if isinstance(step, Run):
                self._call(step)
            elif isinstance(step, Bind):
                self.symbols[step.symbol] = self._integer(step.place, step.dtype.numpy)
            elif isinstance(step, Assign):
                self.symbols[step.symbol] = evaluate(step.value, self.symbols)
            elif isinstance(step, Choose):
                self._steps(step.then if self._integer(step.condition, np.dtype(np.uint8)) else step.otherwise)
            else:
                self._repeat(step)

    def _repeat(self, step: Repeat) -> None:
        index, trips = 0, None if step.trips is None else evaluate(step.trips, self.symbols)
        while trips is None or index < trips:
            if step.condition is not None and not self._integer(step.condition, np.dtype(np.uint8)):
                break
            self.symbols[step.index] = index
            self._steps(step.body)
            index += 1
        if step.count is not None:
            self.symbols[step.count] = index

    def _call(self, step: Run) -> None:
        sizes = tuple(evaluate(size, self.symbols) for size in step.sizes)
        arguments = (*map(self._address, step.arguments), *sizes, self._threads)
        function, clock = self._functions[step.kernel], time.perf_counter
        start = clock()
        function(*arguments)
        seconds = clock() - start
        key = id(step)
        if key not in self.entries:
            self.entries[key] = Entry(step.kernel, step.origin)
        self._totals[key] = self._totals.get(key, 0.0) + seconds
        if self.counting:
            known = self._loads.get((step.kernel, sizes))
            if known is None:
                known = self._loads[step.kernel, sizes] = load_of(self.program.kernels[step.kernel], sizes)
            self.entries[key].load += known


def profile(
    compiled: Compiled, inputs: Mapping[str, Array], threads: int, runs: int = 20, least: float = 1.0
) -> tuple[list[Entry], list[Array]]:
    """(calls in the order of the program, outputs) after at least `runs` runs and `least` seconds."""
    walker = Walker(compiled, threads)
    outputs = walker.run(inputs)
    walker.counting = False
    for entry in walker.entries.values():
        entry.seconds.clear()  # the first run finds memory and caches cold
    end = time.perf_counter() + least
    done = 0
    while done < runs or time.perf_counter() < end:
        outputs = walker.run(inputs)
        done += 1
    cost = overhead()
    for entry in walker.entries.values():
        entry.seconds = [max(seconds - cost, 0.0) for seconds in entry.seconds]
    return [entry for entry in walker.entries.values() if entry.seconds], outputs


def overhead() -> float:
    """Seconds that timing a call takes: of a function that only reads a flag."""
    nothing: Any = ctypes.CFUNCTYPE(ctypes.c_int)(("Py_IsInitialized", ctypes.pythonapi))
    clock = time.perf_counter
    samples = []
    for _ in range(2000):
        start = clock()
        nothing()
        samples.append(clock() - start)
    return statistics.median(samples)
