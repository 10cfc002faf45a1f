"""The kernels of a compiled model on the GPU, to be timed one by one and all together."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...backends.cuda.runtime.driver import Device, Stream
from ...backends.cuda.runtime.graphs import Graph
from ...backends.cuda.runtime.memory import rounded
from ...backends.cuda.runtime.program import DeviceProgram
from ...backends.cuda.runtime.steps import Launches, Where, is_fixed, prepare, unrolled
from ...compiler.binding import bind_symbols
from ...compiler.compiled import Compiled
from ...ir.dims import evaluate
from ...ir.errors import UnsupportedError
from .clock import Clock, Times, interleaved

Array = np.ndarray[Any, Any]
NODES = 512
"""Launches in one graph at most."""


class Bench:
    """A model whose kernels can be launched in any order: every value has memory of its own, so that none is
    overwritten by what comes later, and has been computed once from the inputs given.

    UnsupportedError for a model in which the run decides what runs.
    """

    def __init__(self, device: Device, compiled: Compiled, inputs: Sequence[Array]) -> None:
        code = compiled.device
        assert code is not None, "a model for a GPU"
        if len(code.segments) != 1 or not is_fixed(code.segments[0]):
            raise UnsupportedError(f"{compiled.name}: what runs is decided by the run, so that kernels are not timed")
        self._device = device
        bound = bind_symbols(compiled.inputs, [array.shape for array in inputs], compiled.assumptions)
        runs = [(run, dict(known)) for run, known in unrolled(code.segments[0], dict(bound))]
        known = runs[-1][1] if runs else bound
        self._places: dict[str, Where] = {}
        end = 0
        for name, memory in code.memories.items():
            self._places[name] = Where(0, end)
            end += rounded(max(evaluate(memory.bytes, known), 1))
        self._result = compiled.outputs[0], code.results[0], [evaluate(dim, known) for dim in compiled.outputs[0].shape]
        arrays = {value.name: array for value, array in zip(compiled.inputs, inputs, strict=True)}
        with device:
            self.stream = Stream(device)
            inputs_of, outputs_of = (
                [(value.name, value.dtype) for value in ports] for ports in (compiled.inputs, compiled.outputs)
            )
            # Without its constants: they have places of their own here.
            self._program = DeviceProgram(
                device, code, inputs_of, outputs_of, compiled.ready, compiled.arena, {}, lambda position, bound: ()
            )
            self._block = device.allocate(end, "all values of a model")
            self._regions = np.array([self._block.address], np.uint64)
            for name, array in (arrays | dict(compiled.constants)).items():
                if array.nbytes:
                    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    device.driver.memcpy_htod(self._block.address + self._places[name].offset, content)
            prepared = [prepare(self._program.kernels, [run], self._places) for run in runs]
            self.launches = [found if found is not None and len(found) else None for found in prepared]
            self._queue(self.launches, 1, self.stream)
            self.stream.pycuda.synchronize()

    def output(self) -> Array:
        """The first output, as the first run has made it."""
        value, memory, shape = self._result
        result: Array = np.empty(shape, value.dtype.numpy)
        with self._device:
            address = self._block.address + self._places[memory].offset
            self._device.driver.memcpy_dtoh(result.reshape(-1).view(np.uint8), address)
        return result

    def _queue(self, launches: Sequence[Launches | None], repeats: int, stream: Stream) -> None:
        for _ in range(repeats):
            for launch in launches:
                if launch is not None:
                    launch.queue(self._regions, stream)

    def graph(self, launches: Sequence[Launches | None], repeats: int) -> Graph:
        """A graph of these launches, so often one after the other."""
        with self._device:
            capturing = Stream(self._device, apart=True)
            return Graph(self._device, capturing, partial(self._queue, launches, repeats))

    def function(self, launches: Sequence[Launches | None], repeats: int) -> partial[None]:
        """Replays such a graph on the bench's stream."""
        return partial(_launch, self._device, self.graph(launches, repeats), self.stream)

    def kernel_times(self, clock: Clock, rounds: int, seconds: float) -> list[Times | None]:
        """The time of each launch in a graph of many of it, None where nothing is launched."""
        # All launches once tell how often each has to be repeated to last long enough.
        count = max(1, sum(launch is not None for launch in self.launches))
        with self._device:
            whole = clock.seconds(self.function(self.launches, 1), 3, self.stream)
        repeats = max(1, min(NODES, int(seconds * count / whole)))
        functions = {
            str(number): (self.function([launch], repeats), self.stream)
            for number, launch in enumerate(self.launches)
            if launch is not None
        }
        times = interleaved(clock, functions, rounds, seconds)
        found = [times.get(str(number)) for number in range(len(self.launches))]
        return [None if time is None else time.per(repeats) for time in found]


def _launch(device: Device, graph: Graph, stream: Stream) -> None:
    with device:
        graph.launch(stream)


def copy_bandwidth(device: Device, clock: Clock, size: int, rounds: int, seconds: float) -> float:
    """Bytes a second of a copy within the GPU's memory, those read and those written counted."""
    source, target = (device.allocate(size, "measuring copies") for _ in range(2))
    stream = Stream(device)
    noise = np.random.default_rng(0).integers(0, 256, min(size, 1 << 20), np.uint8)
    with device:
        for start in range(0, size, noise.nbytes):
            part = noise[: min(noise.nbytes, size - start)]
            device.driver.memcpy_htod(source.address + start, part)

    def copy() -> None:
        with device:
            device.driver.memcpy_dtod_async(target.address, source.address, size, stream.pycuda)

    times = interleaved(clock, {"copy": (copy, stream)}, rounds, seconds)
    return 2 * size / times["copy"].median


@functools.cache
def _dtype(name: str) -> np.dtype[Any]:
    from ...ir.dtypes import BY_NAME

    return BY_NAME[name].numpy


def random_array(shape: Sequence[int], dtype: str, seed: int = 0) -> Array:
    """Normal numbers of an element type; of large arrays the content repeats, so that making them takes no time."""
    size = math.prod(shape)
    count = min(size, (1 << 20) - 3)
    values = np.random.default_rng(seed).standard_normal(count, np.float32).astype(_dtype(dtype))
    return np.resize(values, size).reshape(tuple(shape))


def speeds(seconds: float, size: int, flops: int, limits: Mapping[str, float], kind: str) -> dict[str, Any]:
    """What a time means: GB/s, TFLOP/s and the share of the limit that is nearer. `limits` has measured bytes a second
    as "copy" and operations a second by precision; `kind` is the precision."""
    floor = max(size / limits["copy"], flops / limits[kind] if limits.get(kind) else 0.0)
    found: dict[str, Any] = {"us": round(seconds * 1e6, 3), "bytes": size, "gb_per_s": round(size / seconds / 1e9, 2)}
    if flops:
        found |= {"flops": flops, "tflop_per_s": round(flops / seconds / 1e12, 3)}
    return found | {"share_of_limit": round(floor / seconds, 4)}
