"""The GPU of this process, through PyCUDA, which is imported when a GPU is first asked for.

Models share the device's primary context with all else that uses CUDA here (PyTorch, CuPy): it is pushed for the
length of a call and popped after it, on whatever thread that is.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ....ir.errors import DeviceError, TargetError

SPARE_ROUNDS = 2
"""How often an allocation is tried: again when what was kept for later has been given up."""


@dataclass(frozen=True)
class DeviceFacts:
    """What kernels and messages need to know of a GPU: bytes of all its memory, and of shared memory that one block
    may have."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    shared_bytes: int
    driver_version: int

    @property
    def architecture(self) -> str:
        """As in the names of targets: sm_90."""
        return "sm_{}{}".format(*self.capability)


def pycuda_driver() -> Any:
    """PyCUDA's interface to the driver. TargetError tells what is missing and what to install."""
    try:
        return importlib.import_module("pycuda.driver")
    except ModuleNotFoundError as error:
        raise TargetError(
            f"target cuda: {error.name} is not installed: `pip install onnxc[cuda]`, or, where that fails, "
            "`python -m onnxc.tools.install_pycuda`"
        ) from error
    except ImportError as error:
        if "libcuda" in str(error) and "undefined symbol" not in str(error):
            raise TargetError(
                f"target cuda: NVIDIA's driver is not installed on this machine ({error}); models can be compiled for "
                "GPUs without it, but not run"
            ) from error
        raise TargetError(
            f"target cuda: PyCUDA does not fit the installed driver ({error}): update the driver, or build PyCUDA for "
            "it by `python -m onnxc.tools.install_pycuda`"
        ) from error


class Device:
    """A GPU with its primary context. `with device:` makes the context the current one of this thread.

    What is allocated here is given back when its owner is collected: at once, or, while a graph is being captured or
    memory is being freed, right after that.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self.driver = driver = pycuda_driver()
        try:
            driver.init()
            if driver.Device.count() <= ordinal:
                raise TargetError(f"target cuda: this machine has no GPU {ordinal} that CUDA can use")
            device = driver.Device(ordinal)
            attribute = driver.device_attribute
            self.ordinal = ordinal
            self.facts = DeviceFacts(
                device.name(),
                device.compute_capability(),
                device.get_attribute(attribute.MULTIPROCESSOR_COUNT),
                device.total_memory(),
                # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
                device.get_attribute(attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
                driver.get_driver_version(),
            )
            self._context = device.retain_primary_context()
        except driver.Error as error:
            raise TargetError(f"target cuda: the GPU cannot be used: {error}") from error
        self._pop = driver.Context.pop
        self._process = os.getpid()
        self._exclusive = threading.Lock()
        self._waste: deque[Callable[[], Any]] = deque()
        self._spare: weakref.WeakSet[Any] = weakref.WeakSet()
        # The base class's destructor, which would run else, does not release a primary context.
        weakref.finalize(self, self._context.detach)

    def __enter__(self) -> Device:
        if os.getpid() != self._process:
            raise DeviceError(
                "CUDA cannot be used in a process that was forked from one that uses it: start processes by "
                "multiprocessing.get_context('spawn')"
            )
        try:
            self._context.push()
        except self.driver.Error as error:
            raise DeviceError(f"{self.facts.name} cannot be used any more: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._pop()

    def __repr__(self) -> str:
        return f"<{self.facts.name}, {self.facts.architecture}>"

    # What is given back

    def owned(self, owner: object, release: Callable[[], Any]) -> None:
        """Calls `release` with this context when `owner` is collected and nothing runs on the GPU."""
        weakref.finalize(owner, self.discard, release)

    def discard(self, release: Callable[[], Any]) -> None:
        """Calls `release` when nothing runs on the GPU: now, unless another thread (or this one, further out) is busy
        with what must not be disturbed; then it does so when it is done. Safe at any time, as in a destructor."""
        self._waste.append(release)
        self._clean()

    def _clean(self) -> None:
        while self._waste and os.getpid() == self._process and self._exclusive.acquire(blocking=False):
            try:
                with self:
                    # A kernel that failed is reported where its results are waited for.
                    with suppress(self.driver.Error):
                        self.driver.Context.synchronize()
                    while self._waste:
                        with suppress(self.driver.Error):
                            self._waste.popleft()()
            finally:
                self._exclusive.release()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No memory is freed and nobody waits for the whole context meanwhile: either would break a capture."""
        try:
            with self._exclusive:
                yield
        finally:
            self._clean()

    def synchronize(self) -> None:
        """Waits for all work of this process on the GPU."""
        with self.exclusive():
            self.driver.Context.synchronize()

    # Memory

    def keeps_spare(self, pool: Any) -> None:
        """Has `pool.trim()` called before an allocation is given up."""
        self._spare.add(pool)

    def allocate(self, size: int, purpose: str) -> Block:
        """Memory of at least one byte. DeviceError, with sizes, where there is none."""
        return Block(self, size, self._tried(lambda: self.driver.mem_alloc(max(size, 1)), size, purpose))

    def allocate_pinned(self, size: int, purpose: str) -> Any:
        """Page-locked memory of the host as a numpy array of bytes."""
        where = f"{purpose} (page-locked memory of the host)"
        array = self._tried(lambda: self.driver.pagelocked_empty(size, "u1"), size, where)
        self.owned(array, array.base.free)
        return array

    def _tried(self, allocate: Callable[[], Any], size: int, purpose: str) -> Any:
        for attempt in range(SPARE_ROUNDS):
            try:
                return allocate()
            except self.driver.MemoryError as error:
                if attempt + 1 < SPARE_ROUNDS:
                    for pool in list(self._spare):
                        pool.trim()
                    continue
                free, total = self.driver.mem_get_info()
                raise DeviceError(
                    f"{self.facts.name}: no memory for {purpose}: {size:,} bytes are asked for, {free:,} of {total:,} "
                    "are free; run smaller inputs, or release other models and arrays on this GPU"
                ) from error
        raise AssertionError("unreachable")

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """PyCUDA's errors inside as DeviceError: `what` could not be done."""
        try:
            yield
        except self.driver.Error as error:
            raise DeviceError(f"{what}: {error}{self.state()}") from error

    def state(self) -> str:
        """What to add to a message where a failed kernel has left CUDA unusable in this process."""
        try:
            self.driver.mem_get_info()
        except self.driver.Error as error:
            return (
                f"; CUDA answers every call with {str(error).rpartition(': ')[2]!r} from now on, so that GPUs can be "
                "used again only by a new process (CUDA_LAUNCH_BLOCKING=1 makes the message name the kernel)"
            )
        return ""


class Block:
    """Memory of a GPU: its address and its bytes."""

    __slots__ = ("__weakref__", "address", "size")

    def __init__(self, device: Device, size: int, allocation: Any) -> None:
        self.address = int(allocation)
        self.size = size
        device.owned(self, allocation.free)


class Stream:
    """Work of a GPU in order. Such work waits for what was queued before it on CUDA's default stream, and the default
    stream for it, so that libraries that use that one need no more care; `apart` has none of that."""

    __slots__ = ("__weakref__", "_held", "handle")

    def __init__(self, device: Device, apart: bool = False) -> None:
        self._held = [device.driver.Stream(1 if apart else 0)]  # CU_STREAM_NON_BLOCKING
        self.handle: int = self._held[0].handle
        # The list alone holds the stream: it is destroyed where the list is cleared, with its context.
        device.owned(self, self._held.clear)

    @property
    def pycuda(self) -> Any:
        """The stream as PyCUDA's functions take it."""
        return self._held[0]


@functools.cache
def _device(ordinal: int) -> Device:
    return Device(ordinal)


_OPENING = threading.Lock()


def open_device(ordinal: int = 0) -> Device:
    """The GPU of that number among those that CUDA shows (see CUDA_VISIBLE_DEVICES); one for all of the process.

    TargetError where there is none or what it needs is not installed.
    """
    with _OPENING:
        return _device(ordinal)
