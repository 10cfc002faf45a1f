"""A program on a GPU: the host walks its steps and queues launches, all of them as one graph where it can."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from ....ir.dims import evaluate, symbols
from ....ir.dtypes import BOOL, DType
from ....ir.errors import DeviceError, TargetError
from ....ir.program import ArenaPlan, Assign, Bind, Place
from .arrays import GpuArray, View, copy_contiguous, is_contiguous
from .code import DeviceCode
from .driver import Block, Device, DeviceFacts, Stream
from .graphs import order
from .memory import Arena, checked_bytes, rounded
from .steps import LAUNCHES_KEPT, Batch, Branch, Kernels, Part, Where, is_fixed, parts_of, prepare, unrolled
from .workspace import Ports, Setting, Source, Workspace

VECTOR = 16
"""Bytes of the widest access of a kernel: arrays that are given are used in place where they are aligned to it."""
_SHARED_DEFAULT = 48 << 10
"""Bytes of dynamic shared memory that a kernel may have without asking."""

OutputShape = Callable[[int, Mapping[str, int]], tuple[int, ...]]
"""(position of the output, the symbols' values) to its shape; ShapeError for one that cannot be."""


class DeviceProgram:
    """A program whose kernels and weights are on a GPU. Calls from several threads at once are fine.

    `constants` are the arrays of the memories of that role, `ready` the segment before which each output's shape is
    known (0: the inputs tell it), `checks` the messages for what a run finds wrong. Raises TargetError where no image
    suits the GPU, DeviceError where memory is short.
    """

    def __init__(
        self,
        device: Device,
        code: DeviceCode,
        inputs: Sequence[tuple[str, DType]],
        outputs: Sequence[tuple[str, DType]],
        ready: Sequence[int],
        arena: ArenaPlan,
        constants: Mapping[str, np.ndarray],
        output_shape: OutputShape,
        checks: Sequence[str] = (),
    ) -> None:
        self._device = device
        self._segments = code.segments
        self._outputs = outputs
        self._ready = ready
        self._output_shape = output_shape
        self._inputs = len(inputs)
        self._dtypes = tuple(dtype.numpy for _, dtype in (*inputs, *outputs))
        ports = [*(name for name, _ in inputs), *code.results]
        self._places = {name: Where(1 + i, 0) for i, name in enumerate(ports)}
        faults = [memory.name for memory in code.memories.values() if memory.role == "fault"]
        self._places |= {name: Where(1 + len(ports), 0) for name in faults}
        self._checks = checks
        self._arenas = [Arena(slots) for slots in arena.slots]
        self._fixed = len(code.segments) == 1 and is_fixed(code.segments[0]) and not any(ready)
        self._most = max(LAUNCHES_KEPT, len(code.segments[0]))
        layout: frozenset[str] = frozenset()
        parts: list[tuple[Part, ...]] = []
        for steps, slots in zip(code.segments, arena.slots, strict=True):
            layout |= {symbol.name for slot in slots for symbol in symbols(slot.bytes)}
            parts.append(parts_of(steps, layout, code.memories))
        self._parts = parts
        self._free: list[Workspace] = []
        with device:
            self._kernels = self._loaded(code)
            self._constants = self._uploaded(constants)

    def _loaded(self, code: DeviceCode) -> Kernels:
        device = self._device
        images = chosen_images(code.images, device.facts)
        modules: dict[bytes, Any] = {}
        functions: dict[str, Any] = {}
        device.owned(self, partial(_clear_all, functions, modules))
        for name, launch in code.launches.items():
            if launch.shared_bytes > device.facts.shared_bytes:
                raise TargetError(
                    f"kernel {name} takes {launch.shared_bytes:,} bytes of shared memory: {device.facts.name} has "
                    f"{device.facts.shared_bytes:,}"
                )
            image = images[name]
            try:
                module = modules.get(image) or device.driver.module_from_buffer(image)
                modules[image] = module
                functions[name] = function = module.get_function(name)
                if launch.shared_bytes > _SHARED_DEFAULT:
                    attribute = device.driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
                    function.set_attribute(attribute, launch.shared_bytes)
            except device.driver.MemoryError as error:
                raise DeviceError(f"{device.facts.name}: no memory for the code of kernel {name}") from error
            except device.driver.Error as error:
                raise TargetError(f"kernel {name} cannot be loaded on {device.facts.name}: {error}") from error
        return Kernels(functions, device.driver.Error, code.launches, code.sizes, code.memories)

    def _uploaded(self, constants: Mapping[str, np.ndarray]) -> Block | None:
        """All weights in one block, as every call reads them."""
        end = 0
        for name, array in constants.items():
            self._places[name] = Where(0, end)
            end += rounded(max(array.nbytes, 1))
        if not constants:
            return None
        block = self._device.allocate(end, "the weights")
        with self._device.errors("the weights cannot be copied to the GPU"):
            for name, array in constants.items():
                if array.nbytes:
                    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    self._device.driver.memcpy_htod(block.address + self._places[name].offset, content)
        return block

    @property
    def kernels(self) -> Kernels:
        """The functions on the GPU, to launch them one by one, as for measuring them."""
        return self._kernels

    # Calls

    def __call__(
        self, setting: Setting, arguments: Sequence[np.ndarray | View], on_device: bool
    ) -> list[np.ndarray] | list[GpuArray]:
        """The outputs, in the GPU's memory where `on_device` says so. The shapes are those of the setting."""
        fixed = self._is_fixed(setting)
        with self._device, self._errors():
            try:
                workspace = self._free.pop()
            except IndexError:
                workspace = self._new_workspace()
            result = self._run(workspace, setting, arguments, on_device, fixed)
            self._free.append(workspace)  # not so after an error: what it has queued is unknown
            return result

    def _new_workspace(self) -> Workspace:
        address = 0 if self._constants is None else self._constants.address
        return Workspace(self._device, address, self._dtypes, self._inputs, len(self._segments), self._checks)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (self._device.driver.Error, DeviceError) as error:
            state = self._device.state()
            if isinstance(error, DeviceError) and not state:
                raise
            failed = "" if isinstance(error, DeviceError) else "running the model on the GPU failed: "
            raise DeviceError(f"{failed}{error}{state}") from error

    def _run(
        self,
        workspace: Workspace,
        setting: Setting,
        arguments: Sequence[np.ndarray | View],
        on_device: bool,
        fixed: bool,
    ) -> list[np.ndarray] | list[GpuArray]:
        workspace.faults.raise_any()  # of a call that nobody has waited for
        stream = workspace.stream
        views = [argument if isinstance(argument, View) else None for argument in arguments]
        sources = tuple(map(_source, views))
        ports = workspace.ports(setting, sources, on_device)
        if ports.given and workspace.busy:
            workspace.finish()  # the page-locked memory may still be read
        for position, room in ports.given:
            np.copyto(room, arguments[position])  # type: ignore[arg-type]
        workspace.busy = True
        addresses: list[int] = []
        for position, view in enumerate(views):
            if view is not None:
                if view.stream not in (0, stream.handle):
                    order(view.stream, stream.handle)
                if sources[position] == "direct":
                    workspace.regions[1 + position] = view.address
                    addresses.append(view.address)
        for position, address in ports.copied:
            view = views[position]
            assert view is not None
            copy_contiguous(view, address, self._device, stream)
        blocks: dict[int, Block] = {}
        if on_device:
            for position, shape in enumerate(setting.outputs):
                if shape is not None:
                    blocks[position] = self._output_block(workspace, position, shape, setting.bound, True)
                    addresses.append(blocks[position].address)
        late: dict[int, tuple[Block, tuple[int, ...]]] = {}
        if fixed:
            self._launch_all(workspace, setting, ports, (sources, on_device, *addresses))
        else:
            self._copy_in(ports, stream)
            late = self._walk_segments(workspace, dict(setting.bound), on_device)
            self._copy_out(ports, stream)
        if on_device:
            # What this very stream has made is written again by this stream only.
            if any(view is not None and view.stream != stream.handle for view in views):
                workspace.keep(views)
            given = {i: (blocks[i], shape) for i, shape in enumerate(setting.outputs) if shape is not None} | late
            return [self._array(workspace, i, *given[i]) for i in range(len(self._outputs))]
        workspace.finish()
        workspace.faults.raise_any()
        results = {i: room.copy() for i, room in ports.taken} | {i: self._fetched(i, *late[i]) for i in late}
        return [results[i] for i in range(len(self._outputs))]

    def _array(self, workspace: Workspace, position: int, block: Block, shape: tuple[int, ...]) -> GpuArray:
        dtype = self._dtypes[self._inputs + position]
        return GpuArray(self._device, workspace.stream, workspace.pool, block, shape, dtype, workspace.faults.raise_any)

    def _fetched(self, position: int, block: Block, shape: tuple[int, ...]) -> np.ndarray:
        result = np.empty(shape, self._dtypes[self._inputs + position])
        if result.nbytes:
            self._device.driver.memcpy_dtoh(result.reshape(-1).view(np.uint8), block.address)
        return result

    def _output_block(
        self, workspace: Workspace, position: int, shape: tuple[int, ...], bound: Mapping[str, int], on_device: bool
    ) -> Block:
        """Memory for an output, to be given away or for the host to take."""
        purpose = f"output {self._outputs[position][0]!r}"
        size = math.prod(shape) * self._dtypes[self._inputs + position].itemsize
        checked_bytes(size, purpose, bound)
        if on_device:
            block = workspace.pool.take(size, purpose)
        else:
            block = workspace.late_output(position, size, purpose)
        workspace.regions[1 + self._inputs + position] = block.address
        return block

    def _copy_in(self, ports: Ports, stream: Stream) -> None:
        if ports.upload:
            self._device.driver.memcpy_htod_async(ports.address, ports.pinned[: ports.upload], stream.pycuda)

    def _copy_out(self, ports: Ports, stream: Stream) -> None:
        if ports.download < ports.end:
            room = ports.pinned[ports.download : ports.end]
            self._device.driver.memcpy_dtoh_async(room, ports.address + ports.download, stream.pycuda)

    # Programs that sizes alone decide

    def _is_fixed(self, setting: Setting) -> bool:
        """Whether the setting has all launches in one list, which is made when it is first asked for."""
        if not self._fixed:
            return False
        if not setting.is_prepared:
            offsets, size = self._arenas[0].at(setting.bound)
            places = self._places | {name: Where(self._arena_region(0), at) for name, at in offsets.items()}
            runs = unrolled(self._segments[0], dict(setting.bound))
            launches = prepare(self._kernels, runs, places, self._most)
            setting.fixed = None if launches is None else (launches, size)
            setting.is_prepared = True
        return setting.fixed is not None

    def _launch_all(self, workspace: Workspace, setting: Setting, ports: Ports, key: tuple[Any, ...]) -> None:
        assert setting.fixed is not None
        launches, size = setting.fixed
        workspace.set_arena(0, size)

        def record(stream: Stream) -> None:
            self._copy_in(ports, stream)
            launches.queue(workspace.regions, stream)
            self._copy_out(ports, stream)

        workspace.launch((setting, *key), record)

    # Programs that the host walks

    def _arena_region(self, segment: int) -> int:
        return 2 + len(self._dtypes) + segment

    def _walk_segments(
        self, workspace: Workspace, bound: dict[str, int], on_device: bool
    ) -> dict[int, tuple[Block, tuple[int, ...]]]:
        """Runs all segments; the memory and the shapes of the outputs that the inputs' shapes do not tell."""
        late: dict[int, tuple[Block, tuple[int, ...]]] = {}
        places = dict(self._places)
        for segment in range(len(self._parts) + 1):
            for position, ready in enumerate(self._ready):
                if ready == segment > 0:
                    shape = self._output_shape(position, bound)
                    late[position] = self._output_block(workspace, position, shape, bound, on_device), shape
            if segment < len(self._parts):
                offsets, size = self._arenas[segment].at(bound)
                workspace.set_arena(segment, size)
                places |= {name: Where(self._arena_region(segment), at) for name, at in offsets.items()}
                self._walk(workspace, self._parts[segment], bound, places)
        return late

    def _walk(
        self, workspace: Workspace, parts: Sequence[Part], bound: dict[str, int], places: Mapping[str, Where]
    ) -> None:
        for part in parts:
            if isinstance(part, Batch):
                part.launches(self._kernels, bound, places).queue(workspace.regions, workspace.stream)
            elif isinstance(part, Bind):
                bound[part.symbol] = self._integer_at(workspace, part.place, part.dtype, bound, places)
            elif isinstance(part, Assign):
                bound[part.symbol] = evaluate(part.value, bound)
            elif isinstance(part, Branch):
                taken = self._integer_at(workspace, part.condition, BOOL, bound, places)
                self._walk(workspace, part.then if taken else part.otherwise, bound, places)
            else:
                trips = math.inf if part.trips is None else evaluate(part.trips, bound)
                index = 0
                while index < trips and (
                    part.condition is None or self._integer_at(workspace, part.condition, BOOL, bound, places)
                ):
                    bound[part.index] = index
                    self._walk(workspace, part.body, bound, places)
                    index += 1
                bound[part.index] = index
                if part.count is not None:
                    bound[part.count] = index

    def _integer_at(
        self, workspace: Workspace, place: Place, dtype: DType, bound: Mapping[str, int], places: Mapping[str, Where]
    ) -> int:
        region, offset = places[place.memory]
        offset += evaluate(place.offset, bound) * dtype.bytes
        content = workspace.read(int(workspace.regions[region]) + offset, dtype.bytes)
        workspace.faults.raise_any()
        return int(np.frombuffer(content, np.uint8 if dtype == BOOL else dtype.numpy)[0])


def _source(view: View | None) -> Source:
    if view is None:
        return "host"
    return "direct" if view.address % VECTOR == 0 and is_contiguous(view) else "copy"


def _clear_all(*collections: Any) -> None:
    for collection in collections:
        collection.clear()


def chosen_images(images: Mapping[str, Mapping[str, bytes]], facts: DeviceFacts) -> Mapping[str, bytes]:
    """The images of the architecture that suits a GPU best: its own machine code, that of an earlier GPU of the same
    generation, or PTX, which the driver compiles. TargetError where there is none."""
    major, minor = facts.capability
    suitable: dict[tuple[bool, int, str], str] = {}
    for name in images:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if found is None:
            continue
        kind, generation, step, variant = found[1], int(found[2]), int(found[3]), found[4]
        own = (generation, step) == (major, minor)
        same = generation == major and step <= minor
        if own or (variant != "a" and (same or (kind == "compute" and not variant and generation < major))):
            suitable[kind == "sm", 10 * generation + step, variant] = name
    if not suitable:
        raise TargetError(
            f"the model is compiled for {', '.join(images)}, which {facts.name} ({facts.architecture}) does not run: "
            f"compile it for cuda:{facts.architecture}"
        )
    return images[suitable[max(suitable)]]
