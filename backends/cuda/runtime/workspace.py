"""What one call of a program needs of a GPU, kept for the next one."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from ....ir.run_state import raise_faults, words_of
from .driver import Block, Device, Stream
from .graphs import CaptureBroken, Graph
from .memory import Pool, checked_bytes, rounded
from .steps import Launches

GRAPHS_KEPT = 16
"""Graphs of one workspace, by sizes and by the addresses of the arrays that were given; a kernel in one costs 1 KB."""
ADDRESSES_KEPT = 64
"""Sizes and addresses that are remembered to have been seen once: the second time they get a graph."""
PENDING = 64
"""Calls whose inputs are kept alive until the GPU has read them; before more of them the host waits."""
_NO_TIMING = 2
"""CU_EVENT_DISABLE_TIMING."""

Source = Literal["host", "copy", "direct"]
"""How an input comes: from the host, from an array of the GPU by a copy, or as such an array in place."""


class Setting:
    """What one setting of the input shapes means to a program: the symbols' values, and the shapes of the inputs and
    of the outputs (None where a later segment tells it)."""

    def __init__(
        self,
        bound: Mapping[str, int],
        inputs: Sequence[tuple[int, ...]],
        outputs: Sequence[tuple[int, ...] | None],
    ) -> None:
        self.bound = bound
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.fixed: tuple[Launches, int] | None = None
        """All launches and the bytes of the arena, where the sizes alone decide them."""
        self.is_prepared = False


class Ports(NamedTuple):
    """Where the inputs and outputs of a call lie that are no arrays in place, at equal offsets in two memories: in one
    of the GPU from `address` on, and in a page-locked one.

    `given` and `taken` are (position, array in page-locked memory) of inputs that the host gives and outputs that it
    takes, `copied` (position, address). Bytes go to the GPU from 0 to `upload`, from it from `download` to `end`.
    """

    key: tuple[Any, ...]
    address: int
    pinned: np.ndarray
    given: tuple[tuple[int, np.ndarray], ...]
    copied: tuple[tuple[int, int], ...]
    taken: tuple[tuple[int, np.ndarray], ...]
    upload: int
    download: int
    end: int


class Faults:
    """What a run's checks have found. Arrays that a run leaves on the GPU hold it, and not the workspace."""

    def __init__(self, device: Device, checks: Sequence[str]) -> None:
        self._checks = checks
        self._words: np.ndarray | None = None
        if checks:
            # GPUs write page-locked memory at the address that it has for the host: a run without faults costs nothing.
            self._words = device.allocate_pinned(8 * words_of(len(checks)), "what checks find").view(np.int64)
            self._words[:] = 0

    @property
    def address(self) -> int:
        return 0 if self._words is None else int(self._words.ctypes.data)

    def raise_any(self) -> None:
        """IndexRangeError for what checks have found since this was asked last."""
        if self._words is not None and self._words[0]:
            words = self._words.tolist()
            self._words[:] = 0
            raise_faults(self._checks, words)


class Workspace:
    """A stream, the arenas and the memory for inputs and outputs, which grow to the largest call; graphs of calls.

    `regions` are the addresses of the constants, the inputs, the outputs, the records of checks and the arenas, in this
    order; `dtypes` those of inputs and outputs; `checks` messages for the records (see `passes.checks`).
    """

    def __init__(
        self,
        device: Device,
        constants: int,
        dtypes: Sequence[np.dtype[Any]],
        inputs: int,
        arenas: int,
        checks: Sequence[str] = (),
    ) -> None:
        self.device = device
        self.stream = Stream(device)
        self.pool = Pool(device)
        self.regions = np.zeros(2 + len(dtypes) + arenas, np.uint64)
        self.regions[0] = constants
        self.faults = Faults(device, checks)
        self.regions[1 + len(dtypes)] = self.faults.address
        self.busy = False
        """Whether work may be queued that no call has waited for."""
        self._capturing = Stream(device, apart=True)
        self._dtypes = dtypes
        self._inputs = inputs
        self._arenas: list[Block | None] = [None] * arenas
        self._block: Block | None = None
        self._pinned: np.ndarray = np.empty(0, np.uint8)
        self._word: np.ndarray | None = None
        self._late: dict[int, Block] = {}
        self._ports: Ports | None = None
        self._graphs: OrderedDict[Any, Graph] = OrderedDict()
        self._seen: deque[Any] = deque(maxlen=ADDRESSES_KEPT)
        self._pending: deque[tuple[Any, Any]] = deque()
        self._events: list[Any] = []
        device.owned(self, partial(_clear, self._events, self._pending))

    # Memory

    def set_arena(self, segment: int, size: int) -> None:
        """Makes sure that the segment's arena has `size` bytes."""
        block = self._arenas[segment]
        if block is None or block.size < size:
            self._forget_addresses()
            del block
            self._arenas[segment] = None  # given back before more is asked for
            block = self._arenas[segment] = self.device.allocate(size, "intermediate values")
            self.regions[segment - len(self._arenas)] = block.address

    def late_output(self, position: int, size: int, purpose: str) -> Block:
        """Memory for an output whose size the run has told, for the host to take."""
        block = self._late.pop(position, None)
        if block is None or block.size < size:
            del block
            block = self.device.allocate(size, purpose)
        self._late[position] = block
        return block

    def ports(self, setting: Setting, sources: tuple[Source, ...], on_device: bool) -> Ports:
        """The places of inputs and outputs but for what stays where it is: inputs that come "direct", and all outputs
        where they stay `on_device`."""
        key = (setting, sources, on_device)
        if self._ports is not None and self._ports.key == key:
            return self._ports
        shapes: dict[int, tuple[int, ...]] = dict(enumerate(setting.inputs))
        shapes |= {self._inputs + i: shape for i, shape in enumerate(setting.outputs) if shape is not None}
        hosted, copied = ([i for i, source in enumerate(sources) if source == kind] for kind in ("host", "copy"))
        taken = [] if on_device else [position for position in shapes if position >= self._inputs]
        offsets: dict[int, int] = {}
        ends = [0]
        for position in (*hosted, *copied, *taken):
            offsets[position] = ends[-1]
            size = math.prod(shapes[position]) * self._dtypes[position].itemsize
            ends.append(ends[-1] + rounded(checked_bytes(max(size, 1), "an input or output", setting.bound)))
        if self._block is None or self._block.size < ends[-1]:
            self._forget_addresses()
            self._block = None
            self._block = self.device.allocate(ends[-1], "inputs and outputs")
        if self._pinned.nbytes < ends[-1]:
            self._forget_addresses()
            self._pinned = self.device.allocate_pinned(ends[-1], "inputs and outputs")
        address, pinned = self._block.address, self._pinned

        def staged(position: int) -> np.ndarray:
            dtype, shape, start = self._dtypes[position], shapes[position], offsets[position]
            return pinned[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

        for position, offset in offsets.items():
            self.regions[1 + position] = address + offset
        self._ports = Ports(
            key,
            address,
            pinned,
            given=tuple((position, staged(position)) for position in hosted),
            copied=tuple((position, address + offsets[position]) for position in copied),
            taken=tuple((position - self._inputs, staged(position)) for position in taken),
            upload=ends[len(hosted)],
            download=ends[len(hosted) + len(copied)],
            end=ends[-1],
        )
        return self._ports

    def _forget_addresses(self) -> None:
        """Before memory is replaced: nothing runs that uses it, and nothing knows of it."""
        self.finish()
        self._graphs.clear()
        self._seen.clear()
        self._ports = None

    def read(self, address: int, size: int) -> bytes:
        """Up to 8 bytes of the GPU's memory when all that is queued has been done."""
        if self._word is None:
            self._word = self.device.allocate_pinned(8, "values that decide what runs")
        self.device.driver.memcpy_dtoh_async(self._word[:size], address, self.stream.pycuda)
        self.stream.pycuda.synchronize()
        return self._word[:size].tobytes()

    # Work

    def launch(self, key: Any, record: Callable[[Stream], None]) -> None:
        """Queues what `record` does at a stream, by a graph from the second time on that the key comes."""
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._seen:
                self._seen.append(key)
                record(self.stream)
                return
            try:
                graph = self._graphs[key] = Graph(self.device, self._capturing, record)
            except CaptureBroken:
                record(self.stream)
                return
            if len(self._graphs) > GRAPHS_KEPT:
                self._graphs.popitem(last=False)
        else:
            self._graphs.move_to_end(key)
        graph.launch(self.stream)

    def finish(self) -> None:
        """Waits for all that is queued."""
        self.stream.pycuda.synchronize()
        self.busy = False
        while self._pending:
            self._events.append(self._pending.popleft()[0])

    def keep(self, inputs: Any) -> None:
        """Keeps inputs alive until what is queued now has been done."""
        event = self._events.pop() if self._events else self.device.driver.Event(_NO_TIMING)
        event.record(self.stream.pycuda)
        self._pending.append((event, inputs))
        while self._pending and (len(self._pending) > PENDING or self._pending[0][0].query()):
            event, _ = self._pending.popleft()
            event.synchronize()
            self._events.append(event)


def _clear(*collections: Any) -> None:
    for collection in collections:
        collection.clear()
