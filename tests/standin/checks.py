"""What the runtime's tests share: the check that nothing is left, arrays in the memory of the stand-in's GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from emulator import harness
from onnxc.backends.cuda.runtime.arrays import GpuArray
from onnxc.backends.cuda.runtime.driver import open_device
from onnxc.compiler.cuda_executable import CudaExecutable
from standin import driver, models

Array = np.ndarray[Any, Any]

LIVE = ("allocations", "pinned", "streams", "events", "modules", "graphs", "graph_executables")


def counters(*names: str) -> list[int]:
    return [driver.counter(name) for name in names]


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """Every test of a module that imports this runs on the stand-in, gives back what it took and leaves no context
    behind."""
    missing = "g++ is not installed" if harness.compiler() is None else driver.available()
    if missing:
        pytest.skip(f"no stand-in driver: {missing}")
    before = counters(*LIVE, "overruns")
    yield
    driver.reset()
    if counters(*LIVE) != before[: len(LIVE)]:
        gc.collect()
    assert counters(*LIVE, "overruns") == before
    assert open_device().driver.Context.get_current() is None


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


class Interface:
    """An array of another library that speaks the CUDA array interface."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, **more: Any):
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": "<f4", "data": (address, False), "strides": strides, "version": 2, **more,
        }  # fmt: skip


class Exported:
    """An array of another library that speaks DLPack."""

    def __init__(self, array: GpuArray) -> None:
        self.array = array

    def __dlpack__(self, stream: int | None = None) -> Any:
        return self.array.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def on_gpu(array: Array) -> GpuArray:
    """The array in the GPU's memory, computed by a model."""
    zero = np.zeros_like(array)
    result = CudaExecutable(models.total()).run({"x": array / 2, "y": zero}, on_device=True)["z"]
    assert isinstance(result, GpuArray)
    return result


def on_gpu_row(row: Array) -> Interface:
    """One axis of numbers in the GPU's memory, as another library's."""
    array = on_gpu(row.reshape(1, -1))
    array.numpy()
    taken = Interface(array.address, row.shape)
    taken.array = array  # type: ignore[attr-defined]
    return taken
