"""The stand-in driver is as late and as strict as a driver may be: PyCUDA sees it."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from emulator import harness
from standin import driver, models


@pytest.fixture
def cuda() -> Iterator[Any]:
    missing = "g++ is not installed" if harness.compiler() is None else driver.available()
    if missing:
        pytest.skip(f"no stand-in driver: {missing}")
    import pycuda.driver

    pycuda.driver.init()
    context = pycuda.driver.Device(0).retain_primary_context()
    context.push()
    yield pycuda.driver
    context.pop()
    driver.reset()
    context.detach()


def words(cuda: Any, address: Any, count: int) -> list[int]:
    content = np.empty(count, np.uint32)
    cuda.memcpy_dtoh(content, address)
    return [int(word) for word in content]


def test_it_looks_like_an_h200(cuda: Any) -> None:
    device, attribute = cuda.Device(0), cuda.device_attribute
    assert device.compute_capability() == (9, 0)
    assert device.get_attribute(attribute.MULTIPROCESSOR_COUNT) == 132
    assert device.get_attribute(attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) == 227 << 10
    assert device.get_attribute(attribute.MAX_THREADS_PER_BLOCK) == 1024
    assert cuda.get_driver_version() == 13000
    with pytest.raises(cuda.LogicError, match="invalid device ordinal"):
        cuda.Device(1)


def test_memory_is_poisoned_and_bounded(cuda: Any) -> None:
    block = cuda.mem_alloc(100)
    assert int(block) % 256 == 0
    assert words(cuda, block, 25) == [0xFFFFFFFF] * 25
    for copy in (
        lambda: cuda.memcpy_dtoh(np.empty(101, np.uint8), block),
        lambda: cuda.memcpy_htod(int(block) + 1, np.zeros(100, np.uint8)),
        lambda: cuda.memcpy_dtod(block, int(block) + 50, 51),
        lambda: cuda.memset_d8(block, 0, 101),
    ):
        with pytest.raises(cuda.LogicError, match="invalid argument"):
            copy()
    block.free()
    with pytest.raises(cuda.LogicError, match="invalid argument"):
        cuda.memset_d8(block, 0, 1)


def test_what_runs_over_its_end_is_counted(cuda: Any) -> None:
    before = driver.counter("overruns")
    block = cuda.mem_alloc(100)
    ctypes.memset(int(block), 0, 101)  # as a kernel would
    block.free()
    assert driver.counter("overruns") == before + 1
    for page in ("int(block) + 256", "int(block) - 4096"):
        code = f"""
import ctypes
from standin import driver
driver.available()
import pycuda.driver as cuda
cuda.init()
context = cuda.Device(0).retain_primary_context()
context.push()
block = cuda.mem_alloc(100)
ctypes.memset({page}, 0, 1)
"""
        folder = os.path.dirname(os.path.dirname(__file__))
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, check=False)
        assert done.returncode == -11, done.stderr  # SIGSEGV


def test_memory_ends(cuda: Any) -> None:
    driver.set_memory(1 << 20)
    block = cuda.mem_alloc(1 << 19)
    assert cuda.mem_get_info() == (1 << 19, 1 << 20)
    with pytest.raises(cuda.MemoryError, match="out of memory"):
        cuda.mem_alloc((1 << 19) + 1)
    block.free()
    cuda.mem_alloc(1 << 20).free()


def test_work_is_done_when_it_is_waited_for(cuda: Any) -> None:
    block, host = cuda.mem_alloc(4), cuda.pagelocked_empty(1, np.uint32)
    stream = cuda.Stream()
    host[0] = 1
    cuda.memcpy_htod_async(block, host, stream)
    host[0] = 2  # too early
    stream.synchronize()
    assert words(cuda, block, 1) == [2]
    cuda.memset_d32_async(block, 3, 1, stream)
    cuda.memcpy_dtoh_async(host, block, stream)
    assert host[0] == 2
    assert not stream.is_done()
    stream.synchronize()
    assert host[0] == 3 and stream.is_done()
    block.free()


def test_streams_are_in_order_where_something_orders_them(cuda: Any) -> None:
    block = cuda.mem_alloc(4)
    first, second, apart = cuda.Stream(), cuda.Stream(), cuda.Stream(1)
    cuda.memset_d32(block, 0, 1)
    cuda.memset_d32_async(block, 1, 1, first)
    second.synchronize()
    apart.synchronize()
    host = cuda.pagelocked_empty(1, np.uint32)
    cuda.memcpy_dtoh_async(host, block, second)
    second.synchronize()
    assert host[0] == 0  # nothing has waited for `first`
    event = cuda.Event()
    event.record(first)
    assert not event.query()
    second.wait_for_event(event)
    cuda.memcpy_dtoh_async(host, block, second)
    second.synchronize()
    assert host[0] == 1 and event.query()
    cuda.memset_d32_async(block, 2, 1, apart)
    cuda.memset_d32_async(block, 3, 1, first)
    assert words(cuda, block, 1) == [3]  # the default stream waits for `first`, not for `apart`
    assert words(cuda, block, 1) == [3]
    apart.synchronize()
    assert words(cuda, block, 1) == [2]
    block.free()


def test_launches_are_checked(cuda: Any) -> None:
    module = cuda.module_from_buffer(models.image())
    twice, stream = module.get_function("twice"), cuda.Stream()
    block = cuda.mem_alloc(256)
    packed = struct.pack("<QQq", int(block), int(block) + 128, 8)
    cuda.memset_d32(block, 0x3F800000, 64)
    twice._launch_kernel((1,), (32,), packed, 0, stream)
    stream.synchronize()
    assert words(cuda, block, 64)[32:40] == [0x40000000] * 8
    for grid, threads, shared in [((0,), (32,), 0), ((1,), (1025,), 0), ((1, 65536), (32,), 0), ((1,), (32,), 49153)]:
        with pytest.raises(cuda.LogicError, match="invalid argument"):
            twice._launch_kernel(grid, threads, packed, shared, stream)
    attribute = cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
    twice.set_attribute(attribute, 227 << 10)
    twice._launch_kernel((1,), (32,), packed, 49153, stream)
    with pytest.raises(cuda.LogicError, match="invalid argument"):
        twice.set_attribute(attribute, (227 << 10) + 1)
    with pytest.raises(cuda.LogicError, match="named symbol not found"):
        module.get_function("thrice")
    with pytest.raises(cuda.RuntimeError, match="no kernel image is available"):
        cuda.module_from_buffer(b"\x7fELF a cubin")
    with pytest.raises(cuda.LogicError, match="device kernel image is invalid"):
        cuda.module_from_buffer(harness.MAGIC + b"/nowhere.so\0")
    stream.synchronize()
    block.free()


def library() -> Any:
    return ctypes.CDLL(driver.SONAME)


def capture(handle: int, mode: int) -> None:
    assert library().cuStreamBeginCapture_v2(ctypes.c_void_p(handle), mode) == 0


def captured(handle: int) -> int:
    """What ending the capture answers; a graph is destroyed."""
    graph = ctypes.c_void_p()
    code = int(library().cuStreamEndCapture(ctypes.c_void_p(handle), ctypes.byref(graph)))
    if code == 0:
        library().cuGraphDestroy(graph)
    return code


def test_captures_are_broken_by_what_breaks_them(cuda: Any) -> None:
    block, stream, apart = cuda.mem_alloc(4), cuda.Stream(), cuda.Stream(1)
    relaxed, strict = 2, 0
    capture(apart.handle, relaxed)
    cuda.memset_d32_async(block, 7, 1, apart)
    cuda.mem_alloc(4).free()
    assert words(cuda, block, 1) == [0xFFFFFFFF]  # nothing runs yet, and the default stream may be used
    assert captured(apart.handle) == 0
    for handle, mode, breaks in [
        (apart.handle, relaxed, apart.synchronize),
        (apart.handle, relaxed, cuda.Context.synchronize),
        (apart.handle, relaxed, lambda: cuda.Event().record(apart)),
        (apart.handle, strict, lambda: cuda.mem_alloc(4)),
        (stream.handle, relaxed, lambda: cuda.memset_d32(block, 7, 1)),  # waits for the blocking stream
    ]:
        capture(handle, mode)
        with pytest.raises(cuda.LogicError, match="captur"):
            breaks()
        assert captured(handle) == 901  # CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    stream.synchronize()
    apart.synchronize()
    block.free()


def test_graphs_are_replayed_and_updated(cuda: Any) -> None:
    block, stream = cuda.mem_alloc(8), cuda.Stream(1)
    api = library()
    graphs = []
    for value in (5, 6):
        capture(stream.handle, 2)
        cuda.memset_d32_async(block, value, 1, stream)
        graph = ctypes.c_void_p()
        assert api.cuStreamEndCapture(ctypes.c_void_p(stream.handle), ctypes.byref(graph)) == 0
        graphs.append(graph)
    executable = ctypes.c_void_p()
    assert api.cuGraphInstantiateWithFlags(ctypes.byref(executable), graphs[0], ctypes.c_ulonglong(0)) == 0
    for graph, expected in zip(graphs, (5, 6), strict=True):
        assert api.cuGraphExecUpdate_v2(executable, graph, None) == 0
        for _ in range(2):
            cuda.memset_d32(block, 0, 1)
            assert api.cuGraphLaunch(executable, ctypes.c_void_p(stream.handle)) == 0
            assert words(cuda, block, 1) == [0]
            stream.synchronize()
            assert words(cuda, block, 1) == [expected]
    capture(stream.handle, 2)
    other = ctypes.c_void_p()
    assert api.cuStreamEndCapture(ctypes.c_void_p(stream.handle), ctypes.byref(other)) == 0
    assert api.cuGraphExecUpdate_v2(executable, other, None) == 910  # another number of nodes
    for graph in (*graphs, other):
        assert api.cuGraphDestroy(graph) == 0
    assert api.cuGraphExecDestroy(executable) == 0
    block.free()


def test_failures_are_as_asked_for(cuda: Any) -> None:
    with driver.failing("alloc", 1, 2):  # PyCUDA tries twice
        cuda.mem_alloc(4).free()
        with pytest.raises(cuda.MemoryError):
            cuda.mem_alloc(4)
        cuda.mem_alloc(4).free()
    module, stream = cuda.module_from_buffer(models.image()), cuda.Stream()
    block = cuda.mem_alloc(256)
    fill, packed = module.get_function("fill"), struct.pack("<Qii", int(block), 1, 1)
    with driver.failing("launch"), pytest.raises(cuda.LaunchError, match="too many resources"):
        fill._launch_kernel((1,), (1,), packed, 0, stream)
    with driver.failing("fault"):
        fill._launch_kernel((1,), (1,), packed, 0, stream)
        for call in (stream.synchronize, lambda: cuda.mem_alloc(4), cuda.mem_get_info):
            with pytest.raises(cuda.LogicError, match="illegal memory access"):
                call()  # for good
    cuda.mem_alloc(4).free()
    block.free()
