"""Lowered regions and whole programs run on the emulator: the CUDA text that ships, compiled by g++."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from emulator import harness
from onnxc.backends.cuda.launch import launch_of
from onnxc.backends.cuda.schedules import schedule
from onnxc.backends.cuda.source import function_name, render_kernels
from onnxc.ir.dims import evaluate, symbols
from onnxc.ir.loops import Kernel
from onnxc.ir.program import Assign, Bind, Choose, Place, Program, Run, Steps
from onnxc.ir.target import Target
from onnxc.passes.lower import lower
from onnxc.passes.regions import BindSymbol, Call, Lowered, Region, Repeated

Array = np.ndarray[Any, Any]
ALIGNED = 256
"""Bytes to which regions' buffers are aligned where a test says nothing else; what the emulator gives."""


def aligned(region: Region, count: int = ALIGNED) -> Region:
    """The region with the addresses of all buffers known to be multiples of so many bytes."""
    return replace(region, alignments={buffer.name: count for buffer in region.buffers})


def numbered(lowered: Lowered) -> list[Kernel]:
    """The kernels of a lowered region, each of a name of its own."""
    return [
        replace(call.kernel, name=f"{call.kernel.name}_{number}") for number, call in enumerate(lowered.kernel_calls)
    ]


def text(lowered: Lowered) -> str:
    """The CUDA text of all kernels of a lowered region."""
    return render_kernels(tuple(numbered(lowered)))


def run(
    region: Region,
    lowered: Lowered,
    target: Target,
    inputs: Sequence[Array],
    sizes: Mapping[str, int] | None = None,
    checked: bool = False,
    seed: int = 0,
) -> list[Array]:
    """The outputs of a region that was lowered for `target`; `checked` also finds races and wrong addresses."""
    assert target.kind == "cuda"
    known = dict(sizes or {})
    memory: dict[str, Array] = {f"x{i}": np.ascontiguousarray(array) for i, array in enumerate(inputs)}
    memory |= {name: np.ascontiguousarray(make()) for name, make in lowered.packed.items()}
    kernels = numbered(lowered)
    library = harness.compile_source(render_kernels(tuple(kernels)), checked) if kernels else None
    named = dict(zip(map(id, lowered.kernel_calls), kernels, strict=True))

    def array(name: str) -> Array:
        """A buffer, made when it is first used: its size may be bound by a kernel before."""
        if name not in memory:
            outputs = {buffer.name: tensor.shape for buffer, tensor in region.outputs}
            scratch = {buffer.name: buffer for buffer in (*lowered.workspaces, *(b for b, _ in region.outputs))}
            shape = outputs.get(name, (scratch[name].size,))
            memory[name] = np.full([evaluate(d, known) for d in shape], 77, scratch[name].dtype.numpy)
        return memory[name]

    def made(call: Call) -> None:
        assert library is not None
        sizes = [evaluate(dim, known) for dim in call.sizes]
        launch(library, named[id(call)], [array(name) for name in call.arguments], sizes, seed)

    for item in lowered.calls:
        if isinstance(item, BindSymbol):
            known[item.symbol] = int(array(item.buffer).reshape(-1)[item.element])
        elif isinstance(item, Repeated):
            for turn in range(evaluate(item.trips, known)):
                known[item.index] = turn
                for call in item.calls:
                    made(call)
        else:
            made(item)
    return [array(buffer.name) for buffer, _ in region.outputs]


def launch(
    library: harness.Library, kernel: Kernel, arguments: Sequence[Array], sizes: Sequence[int], seed: int = 0
) -> None:
    """Runs a kernel with the values of its sizes."""
    shape = launch_of(kernel)
    grid = evaluate(shape.grid, dict(zip(kernel.sizes, sizes, strict=True)))
    library.launch(function_name(kernel), grid, shape.threads, shape.shared_bytes, [*arguments, *sizes], seed)


def run_program(program: Program, inputs: Sequence[Array], checked: bool = False, seed: int = 0) -> list[Array]:
    """The outputs of a program, every kernel run on the emulator, every memory an array of its own."""
    kernels = tuple(program.kernels.values())
    library = harness.compile_source(render_kernels(kernels), checked) if kernels else None
    known: dict[str, int] = {}
    memory: dict[str, Array] = {name: np.ascontiguousarray(make()) for name, make in program.constants.items()}
    for value, array in zip(program.inputs, inputs, strict=True):
        memory[value.name] = np.array(array)
        for dim, extent in zip(value.shape, array.shape, strict=True):
            for symbol in symbols(dim):
                if str(dim) == symbol.name:
                    known[symbol.name] = extent

    def at(place: Place) -> Array:
        found = memory.get(place.memory)
        wanted = program.memories[place.memory]
        if found is None or (wanted.role != "constant" and found.size < evaluate(wanted.size, known)):
            found = np.full(evaluate(wanted.size, known), 77, wanted.dtype.numpy)
            memory[place.memory] = found
        return found.reshape(-1)[evaluate(place.offset, known) :]

    def steps(block: Steps) -> None:
        for step in block:
            if isinstance(step, Run):
                assert library is not None
                arguments = [at(place) for place in step.arguments]
                launch(library, program.kernels[step.kernel], arguments, [evaluate(d, known) for d in step.sizes], seed)
            elif isinstance(step, Bind):
                known[step.symbol] = int(at(step.place)[0])
            elif isinstance(step, Assign):
                known[step.symbol] = evaluate(step.value, known)
            elif isinstance(step, Choose):
                steps(step.then if at(step.condition)[0] else step.otherwise)
            else:
                trips = None if step.trips is None else evaluate(step.trips, known)
                count = 0
                while (trips is None or count < trips) and (step.condition is None or at(step.condition)[0]):
                    known[step.index] = count
                    steps(step.body)
                    count += 1
                if step.count is not None:
                    known[step.count] = count

    for segment in program.segments:
        steps(segment)
    return [
        at(Place(name))[: evaluate(program.memories[name].size, known)].reshape([evaluate(d, known) for d in v.shape])
        for name, v in zip(program.results, program.outputs, strict=True)
    ]


def lowered_graph(graph: Any, target: Target) -> Program:
    """The program of a graph that all passes have seen, for a GPU."""
    return lower(graph, schedule, target)
