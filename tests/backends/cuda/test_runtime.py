"""The runtime on the stand-in driver: PyCUDA itself, graphs, arrays of the GPU, errors, threads."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import onnxc
import pytest
from emulator import harness
from onnxc.backends.cuda.launch import Launch
from onnxc.backends.cuda.runtime import workspace as workspace_module
from onnxc.backends.cuda.runtime.arrays import GpuArray
from onnxc.backends.cuda.runtime.driver import DeviceFacts, open_device
from onnxc.backends.cuda.runtime.program import chosen_images
from onnxc.backends.cuda.runtime.steps import Launches
from onnxc.compiler import cuda_executable as executable_module
from onnxc.compiler.cuda_executable import CudaExecutable
from onnxc.ir.errors import DeviceError
from standin import driver, models
from standin.checks import LIVE, Array, Interface, counters, floats, leaves_nothing, on_gpu

__all__ = ["leaves_nothing"]


# Calls


def test_arguments_by_position_and_by_name() -> None:
    total = CudaExecutable(models.total())
    x, y = floats(2, 3), floats(2, 3, seed=1)
    for z in (total(x, y), total(x, y=y), total(y=y, x=x), total.run({"y": y, "x": x})["z"]):
        np.testing.assert_array_equal(z, 2 * (x + y))
        assert type(z) is np.ndarray and z.flags.owndata and z.dtype == np.float32
    assert repr(total) == "<onnxc.CudaExecutable total: (x: f32[n, m], y: f32[n, m]) -> (z: f32[n, m])>"


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.copy("F"),
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x[::-1].copy()[::-1],
        lambda x: x.astype(x.dtype.newbyteorder()),
        lambda x: x.tolist(),
        memoryview,
    ],
    ids=["Fortran", "strided", "reversed", "swapped", "list", "buffer"],
)
def test_arrays_of_every_form(form: Callable[[Array], Any]) -> None:
    total = CudaExecutable(models.total())
    x, y = floats(2, 3), floats(2, 3, seed=1)
    for _ in range(3):
        np.testing.assert_array_equal(total(form(x), y), 2 * (x + y))


def test_many_sizes_and_none() -> None:
    total = CudaExecutable(models.total())
    for n, m in [(1, 1), (0, 3), (40, 33), (7, 5), (2, 0), (100, 100), (1, 1), (0, 3)]:
        x, y = floats(n, m), floats(n, m, seed=1)
        np.testing.assert_array_equal(total(x, y), 2 * (x + y))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: f(x), r"missing: y"),
        (lambda f, x: f(x, x, x), r"3 arguments for 2 inputs: x, y"),
        (lambda f, x: f(x, x=x), r"given twice, by position and by name; the inputs are x, y"),
        (lambda f, x: f.run({"x": x}, on_device=True), r"missing: y"),
        (lambda f, x: f(x, x[0]), r"input 'y' has shape \(3,\): it must have rank 2, y: f32\[n, m\]"),
        (lambda f, x: f(x, x[:1]), r"axis 0 of input 'y' is 1: it must be n.*\(n = 2 by axis 0 of input 'x'\)"),
        (lambda f, x: f(x, x.astype(np.float64)), r"input 'y' is of float64: it must be float32, y: f32\[n, m\]"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(onnxc.ShapeError, match=message):
        call(CudaExecutable(models.total()), floats(2, 3))


def test_weights_are_uploaded_once() -> None:
    bias = floats(70)
    before = driver.counter("htod")
    biased = CudaExecutable(models.biased(bias))
    assert driver.counter("htod") == before + 2
    allocations = driver.counter("allocations")
    for seed in range(4):
        np.testing.assert_array_equal(biased(floats(70, seed=seed)), floats(70, seed=seed) + bias)
    assert counters("htod", "allocations") == [before + 2 + 2, allocations + 2]  # two copies are in a graph


def test_more_shared_memory_than_kernels_have_unasked() -> None:
    x = floats(20000)
    np.testing.assert_array_equal(CudaExecutable(models.reversal())(x), x[::-1])


# Steps that the host decides


def test_a_size_that_the_run_tells() -> None:
    positives = CudaExecutable(models.positives())
    for n in (5, 50, 0, 5, 200):
        x = floats(n, seed=n)
        for _ in range(2):
            y, z = positives(x)
            np.testing.assert_array_equal(y, 2 * x[x > 0])
            np.testing.assert_array_equal(z, x + x)
    y, z = positives(-np.abs(floats(5)))
    assert y.shape == (0,) and z.shape == (5,)


def test_branches() -> None:
    choice, x = CudaExecutable(models.choice()), floats(9)
    for flag in (True, False, True):
        np.testing.assert_array_equal(choice(np.array(flag), x), x * (2 if flag else 4))


def test_a_loop_while_a_condition_holds() -> None:
    doubling = CudaExecutable(models.doubling())
    for start, rounds in [(60.0, 0), (1.0, 6), (0.001, 8), (30.0, 1)]:
        x = np.full(40, start, np.float32)
        y, ones = doubling(x)
        np.testing.assert_array_equal(y, x * np.float32(2 ** (1 + rounds)))
        np.testing.assert_array_equal(ones, np.full(rounds + 1, 7, np.float32))


def test_a_loop_of_known_length_is_one_graph() -> None:
    counted, x = CudaExecutable(models.counted(models.N * 2)), np.arange(5, dtype=np.float32)
    before = counters("captures", "launch_calls")
    for _ in range(4):
        np.testing.assert_array_equal(counted(x), 1 + x * sum(range(10)))
    assert counters("captures", "launch_calls") == [before[0] + 1, before[1] + 2 * 11]


def test_a_very_long_loop_is_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxc.backends.cuda.runtime.program.LAUNCHES_KEPT", 50)
    counted, x = CudaExecutable(models.counted(models.N * 20)), np.arange(5, dtype=np.float32)
    before = driver.counter("captures")
    for _ in range(3):
        np.testing.assert_array_equal(counted(x), 1 + x * sum(range(100)))
    assert driver.counter("captures") == before


# Graphs


def test_a_setting_gets_a_graph_when_it_comes_again() -> None:
    total, x = CudaExecutable(models.total()), floats(3, 4)
    names = ("captures", "instantiations", "graph_launches", "launch_calls", "launches")
    seen = [counters(*names)]
    for _ in range(4):
        np.testing.assert_array_equal(total(x, x), 4 * x)
        seen.append(counters(*names))
    steps = [[b - a for a, b in zip(first, then, strict=True)] for first, then in pairwise(seen)]
    assert steps == [[0, 0, 0, 2, 2], [1, 1, 1, 2, 2], [0, 0, 1, 0, 2], [0, 0, 1, 0, 2]]


def test_graphs_and_settings_are_bounded() -> None:
    total = CudaExecutable(models.total())
    before = driver.counter("graph_executables")
    total(floats(100, 1), floats(100, 1))  # so that nothing grows later
    for n in range(1, 100):
        for _ in range(2):
            np.testing.assert_array_equal(total(floats(n, 1), floats(n, 1)), 4 * floats(n, 1))
        assert driver.counter("graph_executables") <= before + workspace_module.GRAPHS_KEPT
    assert driver.counter("graph_executables") == before + workspace_module.GRAPHS_KEPT
    assert len(total._known) == executable_module.SHAPES_KEPT


def test_what_is_used_often_keeps_its_graph() -> None:
    total = CudaExecutable(models.total())
    total(floats(200, 1), floats(200, 1))  # so that nothing grows later
    before = driver.counter("captures")
    for n in range(2, 40):
        for size in (n, n, 1):
            total(floats(size, 1), floats(size, 1))
    assert driver.counter("captures") == before + 38 + 1


def test_memory_that_grows_is_not_used_by_old_graphs() -> None:
    total = CudaExecutable(models.total())
    for n in (3, 3, 3, 2000, 3, 3, 2000, 2000, 3):
        np.testing.assert_array_equal(total(floats(n, 2), floats(n, 2)), 4 * floats(n, 2))
    before = counters("allocations", "pinned", "captures")
    for n in (3, 2000) * 4:
        np.testing.assert_array_equal(total(floats(n, 2), floats(n, 2)), 4 * floats(n, 2))
    assert counters("allocations", "pinned", "captures") == before


# Errors


def test_no_memory_for_the_weights() -> None:
    driver.set_memory(1 << 20)
    with pytest.raises(
        DeviceError, match=r"no memory for the weights: 3,200,000 bytes are asked for, 1,048,576 of 1,0"
    ):
        CudaExecutable(models.biased(floats(400000)))
    driver.reset()
    bias = floats(400000)
    np.testing.assert_array_equal(CudaExecutable(models.biased(bias))(bias), bias + bias)


def test_no_memory_for_a_call_leaves_the_model_usable() -> None:
    total, x = CudaExecutable(models.total()), floats(10, 10)
    for _ in range(3):
        total(x, x)
    driver.set_memory(3 << 20)
    with pytest.raises(DeviceError, match=r"no memory for inputs and outputs: 12,000,000 bytes are asked for"):
        total(floats(1000, 1000), floats(1000, 1000))
    np.testing.assert_array_equal(total(x, x), 4 * x)
    driver.reset()
    np.testing.assert_array_equal(total(floats(1000, 1000), floats(1000, 1000)), 4 * floats(1000, 1000))


@pytest.mark.parametrize("point", ["alloc", "pinned"])
@pytest.mark.parametrize("after", range(3))
def test_every_allocation_may_fail(point: str, after: int) -> None:
    x = floats(10, 10)
    total = CudaExecutable(models.total())
    with driver.failing(point, after, 100):
        if after < {"alloc": 2, "pinned": 1}[point]:
            with pytest.raises(DeviceError, match=r"bytes are asked for, [\d,]+ of [\d,]+ are free"):
                total(x, x)
        else:
            np.testing.assert_array_equal(total(x, x), 4 * x)
    np.testing.assert_array_equal(total(x, x), 4 * x)


def test_what_pools_keep_is_given_up_when_memory_is_short() -> None:
    total, x = CudaExecutable(models.total()), on_gpu(floats(100, 100))
    for n in range(1, 20):
        total(np.zeros((n, 100), np.float32), on_gpu(np.zeros((n, 100), np.float32)))
    with driver.failing("alloc", 0, 2):  # PyCUDA tries twice itself
        np.testing.assert_array_equal(total(x, x).numpy(), 4 * floats(100, 100))


def test_a_launch_that_is_refused_names_the_kernel() -> None:
    total, x = CudaExecutable(models.total()), floats(100, 10)
    message = (
        r"\(from node_{0}\) of 32 blocks of 32 threads with 0 bytes of shared memory cannot be launched: cuLaunchKernel"
    )
    with driver.failing("launch", 1), pytest.raises(DeviceError, match="kernel twice " + message.format("twice")):
        total(x, x)
    np.testing.assert_array_equal(total(x, x), 4 * x)
    # In a capture, and then without one.
    with driver.failing("launch", 1, 2), pytest.raises(DeviceError, match="kernel add " + message.format("add")):
        total(x, x)
    for _ in range(3):
        np.testing.assert_array_equal(total(x, x), 4 * x)
    assert driver.counter("graphs") == 0


def test_a_capture_that_another_thread_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    total, x = CudaExecutable(models.total()), floats(100, 10)
    total(x, x)
    device, queue = open_device(), Launches.queue

    def wait() -> None:
        with device, pytest.raises(device.driver.LogicError, match="not permitted when stream is capturing"):
            device.driver.Context.synchronize()

    def disturbed(launches: Launches, regions: Any, stream: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            if driver.counter("capturing"):
                pool.submit(wait).result()
        queue(launches, regions, stream)

    before = driver.counter("captures")
    with monkeypatch.context() as patch:
        patch.setattr(Launches, "queue", disturbed)
        np.testing.assert_array_equal(total(x, x), 4 * x)
    assert driver.counter("captures") == before
    np.testing.assert_array_equal(total(x, x), 4 * x)
    assert driver.counter("captures") == before + 1


@pytest.mark.parametrize("point", ["instantiate", "graph_launch", "copy"])
def test_the_driver_refuses_what_it_may(point: str) -> None:
    total, x = CudaExecutable(models.total()), floats(5, 5)
    total(x, x)
    with driver.failing(point), pytest.raises(DeviceError, match="failed: "):
        total(x, x)
    for _ in range(3):
        np.testing.assert_array_equal(total(x, x), 4 * x)


def test_a_kernel_that_fails_on_the_way_is_reported() -> None:
    total, x = CudaExecutable(models.total()), floats(5, 5)
    with driver.failing("fault", 1):
        with pytest.raises(
            DeviceError, match=r"an illegal memory access was encountered; CUDA answers every call with"
        ):
            total(x, x)
        with pytest.raises(DeviceError, match="illegal memory access"):
            total(x, x)
        gc.collect()  # what cannot be freed any more does no harm
    np.testing.assert_array_equal(CudaExecutable(models.total())(x, x), 4 * x)


def test_the_emulator_reports_a_kernel_that_goes_astray() -> None:
    stray = CudaExecutable(models.stray())
    with pytest.raises(DeviceError, match="unspecified launch failure"):
        stray(floats(4))
    assert "astray" in driver.message()


def test_images_that_do_not_suit() -> None:
    with pytest.raises(onnxc.TargetError, match=r"kernel \w+ cannot be loaded on stand-in.*no kernel image"):
        CudaExecutable(models.total(images={"sm_90": dict.fromkeys(["add", "twice"], b"\x7fELF")}))
    with pytest.raises(onnxc.TargetError, match=r"kernel \w+ cannot be loaded .*named symbol not found"):
        other = harness.image_of('extern "C" __global__ void other(int n) {}')
        CudaExecutable(models.total(images={"sm_90": dict.fromkeys(["add", "twice"], other)}))
    with pytest.raises(onnxc.TargetError, match=r"compiled for sm_80, sm_100.*\(sm_90\) does not run: .*cuda:sm_90"):
        CudaExecutable(models.total(images={"sm_80": {}, "sm_100": {}}))
    with pytest.raises(onnxc.TargetError, match=r"kernel add takes 300,000 bytes of shared memory: .* has 232,448"):
        CudaExecutable(models.total(launches={"add": Launch(1, 32, 300_000, 32)}))


@pytest.mark.parametrize(
    ("held", "capability", "expected"),
    [
        (["sm_80", "sm_90", "sm_90a", "compute_90"], (9, 0), "sm_90a"),
        (["sm_80", "sm_86", "compute_80"], (8, 9), "sm_86"),
        (["sm_90a", "compute_80"], (9, 0), "sm_90a"),
        (["sm_90", "sm_90a", "compute_90"], (10, 0), "compute_90"),
        (["compute_75", "compute_80", "compute_90a"], (12, 0), "compute_80"),
        (["sm_100f", "sm_100a"], (10, 3), "sm_100f"),
        (["sm_86", "compute_90"], (8, 0), None),
    ],
)
def test_the_image_that_suits_best(held: list[str], capability: tuple[int, int], expected: str | None) -> None:
    facts = DeviceFacts("a GPU", capability, 100, 1 << 30, 100_000, 13000)
    images = {name: {"kernel": name.encode()} for name in held}
    if expected is None:
        with pytest.raises(onnxc.TargetError):
            chosen_images(images, facts)
    else:
        assert chosen_images(images, facts) == {"kernel": expected.encode()}


def test_indices_of_32_bits_that_do_not_suffice() -> None:
    device = open_device()
    total = CudaExecutable(models.total())
    with device:
        block = device.driver.mem_alloc(1 << 10)
    shape = (1 << 16, 1 << 15)  # not so much memory, but it is never read
    with pytest.raises(onnxc.ShapeError, match=r"node_add: 2,147,483,648 elements are more than .*dims="):
        total(Interface(int(block), shape), Interface(int(block), shape))
    np.testing.assert_array_equal(total(floats(2, 2), floats(2, 2)), 4 * floats(2, 2))
    with device:
        block.free()


# Threads, several models


def test_threads() -> None:
    bias = floats(64)
    total, biased, positives = map(CudaExecutable, (models.total(), models.biased(bias), models.positives()))
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        start.wait()
        for step in range(30):
            x, y = floats(1 + step % 7, 8, seed=seed), floats(1 + step % 7, 8, seed=step)
            np.testing.assert_array_equal(total(x, y), 2 * (x + y))
            np.testing.assert_array_equal(biased(bias * seed), bias * seed + bias)
            np.testing.assert_array_equal(positives(x[0])[0], 2 * x[0][x[0] > 0])
            z = total(on_gpu(x), y)
            np.testing.assert_array_equal(total(z, z).numpy(), 8 * (x + y))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_a_model_is_collected_on_any_thread() -> None:
    held: list[CudaExecutable | GpuArray] = []

    def work() -> None:
        total = CudaExecutable(models.total())
        held.append(total)
        held.append(total(on_gpu(floats(4, 4)), floats(4, 4)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before = driver.counter("allocations")
    held.clear()
    gc.collect()
    assert driver.counter("allocations") < before


def test_a_model_that_is_collected_leaves_nothing() -> None:
    """At once, without the garbage collector."""
    before, frees = counters(*LIVE), driver.counter("frees_of_pending_work")
    for make in (models.total, models.positives):
        executable = CudaExecutable(make())
        given = [floats(3, 3)] * 2 if make is models.total else [floats(9)]
        for _ in range(3):
            executable(*given)
        assert counters(*LIVE) != before
        del executable
        assert counters(*LIVE) == before
    z = CudaExecutable(models.total()).run({"x": floats(3, 3), "y": floats(3, 3)}, on_device=True)["z"]
    gc.collect()  # the model, while what it queued has not been done
    np.testing.assert_array_equal(z.numpy(), 4 * floats(3, 3))
    del z
    assert counters(*LIVE) == before
    assert driver.counter("frees_of_pending_work") == frees


def test_a_forked_process_is_told_that_it_has_no_gpu() -> None:
    total, x = CudaExecutable(models.total()), floats(2, 2)
    total(x, x)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            total(x, x)
        except DeviceError as error:
            os.write(writing, str(error).encode())
        del total
        gc.collect()  # leaves alone what belongs to the other process
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        assert "forked" in said.read()
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(total(x, x), 4 * x)


def test_a_context_that_others_use_is_left_as_it_was() -> None:
    device = open_device()
    cuda = device.driver
    own = cuda.Device(0).retain_primary_context()
    own.push()
    total = CudaExecutable(models.total())
    np.testing.assert_array_equal(total(floats(2, 2), floats(2, 2)), 4 * floats(2, 2))
    assert cuda.Context.get_current() == own
    del total
    assert cuda.Context.get_current() == own
    own.pop()
    own.detach()


def test_code_for_a_cpu_is_refused() -> None:
    from small_models import small_cnn

    model = onnxc.compile(small_cnn())
    with pytest.raises(onnxc.TargetError, match="does not run on a GPU"):
        CudaExecutable(model.compiled)
