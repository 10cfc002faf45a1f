"""Arrays in the GPU's memory as inputs and outputs: no copy, no wait, nothing too early."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxc
import pytest
from onnxc.backends.cuda.runtime.arrays import GpuArray, view_of
from onnxc.backends.cuda.runtime.driver import open_device
from onnxc.compiler.cuda_executable import CudaExecutable
from onnxc.ir.dtypes import BY_NAME
from standin import driver, models
from standin.checks import Array, Exported, Interface, counters, floats, leaves_nothing, on_gpu, on_gpu_row

__all__ = ["leaves_nothing"]
COPIES = ("htod", "dtoh", "dtod")


@pytest.mark.parametrize(
    "form", [lambda x: x, Exported, lambda x: Interface(x.address, x.shape)], ids=["own", "DLPack", "interface"]
)
def test_arrays_of_the_gpu_are_not_copied(form: Callable[[GpuArray], Any]) -> None:
    total = CudaExecutable(models.total())
    x, y = floats(30, 5), floats(30, 5, seed=1)
    device_x, device_y = on_gpu(x), on_gpu(y)
    device_x.numpy()
    device_y.numpy()
    before = counters(*COPIES)
    for _ in range(5):
        z = total(form(device_x), form(device_y))
        assert isinstance(z, GpuArray) and z.shape == (30, 5) and z.dtype == np.float32
    assert counters(*COPIES) == before
    np.testing.assert_array_equal(z.numpy(), 2 * (x + y))
    np.testing.assert_array_equal(np.asarray(z), 2 * (x + y))


def test_results_go_from_call_to_call_without_waiting() -> None:
    total, x = CudaExecutable(models.total()), floats(6, 2)
    z = y = on_gpu(x)
    expected = x
    before = driver.counter("launches")
    for _ in range(5):
        z = total(z, y)
        expected = 2 * (expected + x)
    # The stand-in does little where one only looks whether work is done.
    assert driver.counter("launches") < before + 10
    np.testing.assert_allclose(z.numpy(), expected, rtol=1e-6)
    assert driver.counter("launches") >= before + 10


def test_a_graph_for_addresses_that_come_again() -> None:
    total, x = CudaExecutable(models.total()), on_gpu(floats(6, 2))
    total(x, x)
    before = counters("captures", "graph_launches")
    for _ in range(6):
        z = total(x, x)  # the block of the result before is used again
    captures, launches = (now - then for now, then in zip(counters("captures", "graph_launches"), before, strict=True))
    assert 1 <= captures <= 2 and launches >= 4
    np.testing.assert_array_equal(z.numpy(), 4 * floats(6, 2))


def test_a_result_that_lives_is_not_written_again() -> None:
    total = CudaExecutable(models.total())
    kept = [(n, total(on_gpu(np.full((4, 4), n, np.float32)), np.zeros((4, 4), np.float32))) for n in range(12)]
    for n, z in kept:
        np.testing.assert_array_equal(z.numpy(), np.full((4, 4), 2 * n, np.float32))


def test_a_result_outlives_its_model() -> None:
    total = CudaExecutable(models.total())
    z = total(on_gpu(floats(3, 3)), floats(3, 3))
    del total
    gc.collect()
    np.testing.assert_array_equal(z.numpy(), 4 * floats(3, 3))


def test_page_locked_memory_is_not_written_before_it_is_read() -> None:
    total, zero = CudaExecutable(models.total()), on_gpu(np.zeros((5, 5), np.float32))
    results = [total(np.full((5, 5), n, np.float32), zero) for n in range(6)]
    for n, z in enumerate(results):
        np.testing.assert_array_equal(z.numpy(), np.full((5, 5), 2 * n, np.float32))


@pytest.mark.parametrize(
    ("view", "copies"),
    [
        (lambda x: x[:, 1:4], 1),
        (lambda x: x[::2], 1),
        (lambda x: x.T, 6),
        (lambda x: x[::-1], 8),
        (lambda x: x[:, ::3], 8),
        (lambda x: np.broadcast_to(x[0], (3, 6)), 3),
        (lambda x: x[2:], 0),
        (lambda x: x[2:3, 1:2], 1),  # contiguous, but not aligned
    ],
    ids=["columns", "rows", "transposed", "reversed", "strided", "broadcast", "part", "unaligned"],
)
def test_strided_arrays_of_the_gpu_are_copied_there(view: Callable[[Array], Array], copies: int) -> None:
    base = floats(8, 6)
    device = on_gpu(base)
    device.numpy()
    taken = view(base)
    address = device.address + taken.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    total = CudaExecutable(models.total())
    before = counters(*COPIES)
    z = total(Interface(address, taken.shape, taken.strides), on_gpu(np.zeros_like(taken)))
    assert driver.counter("dtod") == before[2] + copies
    np.testing.assert_array_equal(z.numpy(), 2 * taken)


def test_work_of_other_streams_is_waited_for() -> None:
    """The stand-in does what a stream has queued as late as it may."""
    device, x = open_device(), floats(16, 16)
    total = CudaExecutable(models.total())
    with device:
        cuda = device.driver
        source, target = cuda.mem_alloc(x.nbytes), cuda.mem_alloc(x.nbytes)
        cuda.memcpy_htod(source, x)
        for stream in (cuda.Stream(), cuda.Stream(1)):
            cuda.memset_d8(target, 0, x.nbytes)
            cuda.memcpy_dtod_async(target, source, x.nbytes, stream)
            z = total(Interface(int(target), x.shape, stream=stream.handle, version=3), x)
            np.testing.assert_array_equal(z.numpy(), 4 * x)
        source.free()
        target.free()
        del stream


def test_inputs_live_until_they_have_been_read() -> None:
    total, x = CudaExecutable(models.total()), floats(4, 4)
    results = []
    for n in range(150):
        array = on_gpu(np.full((4, 4), n, np.float32))
        results.append(total(array, array))
        del array
    for n, z in enumerate(results):
        np.testing.assert_array_equal(z.numpy(), np.full((4, 4), 4 * n, np.float32))
    np.testing.assert_array_equal(total(x, x), 4 * x)


def test_arrays_that_other_libraries_hold_are_used_again_when_all_work_is_done() -> None:
    total, zero = CudaExecutable(models.total()), on_gpu(np.zeros((8, 8), np.float32))
    device = open_device()
    with device:
        stream, copy = device.driver.Stream(1), device.driver.mem_alloc(256)
        z = total(np.full((8, 8), 3, np.float32), zero)
        address = z.__cuda_array_interface__["data"][0]
        assert z.__cuda_array_interface__["stream"] == z.stream.handle
        event = device.driver.Event()
        event.record(z.stream.pycuda)
        stream.wait_for_event(event)
        device.driver.memcpy_dtod_async(copy, address, 256, stream)  # another library's work, not waited for
        del z
        again = total(np.full((8, 8), 4, np.float32), zero)
        assert again.address == address
        again.numpy()
        content = np.empty((8, 8), np.float32)
        device.driver.memcpy_dtoh(content, copy)
        np.testing.assert_array_equal(content, np.full((8, 8), 6, np.float32))
        copy.free()
        del stream, event


def test_dlpack() -> None:
    x = floats(3, 5)
    z = on_gpu(x)
    assert z.__dlpack_device__() == (2, 0)
    capsule = z.__dlpack__(stream=1, max_version=(1, 0))
    assert "dltensor" in repr(capsule)
    before = driver.counter("allocations")
    del z
    gc.collect()
    assert driver.counter("allocations") == before  # the capsule holds it
    del capsule
    gc.collect()
    assert driver.counter("allocations") < before
    z = on_gpu(x)
    for refused in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError):
            z.__dlpack__(**refused)
    with pytest.raises(onnxc.ShapeError, match="input 'flag' is of float32: it must be bool"):
        CudaExecutable(models.choice()).run({"flag": Exported(z), "x": x[0]})


@pytest.mark.parametrize(
    "name", ["bf16", "f8e4m3fn", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz", "f8e8m0", "c64", "bool", "i8"]
)
def test_dlpack_of_element_types(name: str) -> None:
    """What goes out comes back as the same type; those that DLPack packs are not given away."""
    dtype, array = BY_NAME[name].numpy, on_gpu(floats(6, 4))
    array.dtype = dtype  # type: ignore[misc]
    view = view_of(Exported(array), open_device())
    assert (view.dtype, view.shape, view.address) == (dtype, (6, 4), array.address)
    array.dtype = BY_NAME["i4"].numpy  # type: ignore[misc]
    with pytest.raises(BufferError, match="DLPack has no elements like int4"):
        array.__dlpack__()


def test_dlpack_for_another_stream() -> None:
    """The consumer's stream waits for the result, and the memory is not used again before the consumer is done."""
    total, zero = CudaExecutable(models.total()), on_gpu(np.zeros((8, 8), np.float32))
    device = open_device()
    with device:
        stream, copy = device.driver.Stream(1), device.driver.mem_alloc(256)
        content = np.empty((8, 8), np.float32)
        x = on_gpu(floats(8, 8))
        z = total(x, x)
        z.__dlpack__(stream=stream.handle)
        device.driver.memcpy_dtod_async(copy, z.address, 256, stream)
        stream.synchronize()
        device.driver.memcpy_dtoh(content, copy)
        np.testing.assert_array_equal(content, 4 * floats(8, 8))
        del z
        z = total(np.full((8, 8), 3, np.float32), zero)
        address = z.address
        capsule = z.__dlpack__(stream=stream.handle)
        device.driver.memcpy_dtod_async(copy, address, 256, stream)
        del z, capsule
        again = total(np.full((8, 8), 4, np.float32), zero)
        assert again.address == address
        again.numpy()
        device.driver.memcpy_dtoh(content, copy)
        np.testing.assert_array_equal(content, np.full((8, 8), 6, np.float32))
        copy.free()
        del stream


def test_outputs_of_data_dependent_shapes_stay_on_the_gpu() -> None:
    positives = CudaExecutable(models.positives())
    x = floats(3, 8)
    for row in range(3):
        y, z = positives(on_gpu_row(x[row]))
        assert isinstance(y, GpuArray) and y.shape == ((x[row] > 0).sum(),)
        np.testing.assert_array_equal(y.numpy(), 2 * x[row][x[row] > 0])
        np.testing.assert_array_equal(z.numpy(), 2 * x[row])
