"""Kernels compiled and called on numpy arrays, which lie between pages that must not be touched."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxc.backends.cpu.jit import CodeImage
from onnxc.backends.cpu.llvm import render_kernel
from onnxc.backends.cpu.objects import compile_objects
from onnxc.ir.loops import Kernel
from onnxc.ir.target import Target

Array = npt.NDArray[Any]

_LEVELS = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64")
HOST = Target.host()
RUNNABLE = [
    HOST,
    *(
        target
        for target in map(Target.parse, _LEVELS)
        if target.architecture == HOST.architecture and target.enabled <= HOST.enabled | {"lzcnt", "movbe"}
    ),
]


class Fenced:
    """A copy of an array that ends where memory ends (or, with `at_start`, begins where it begins)."""

    def __init__(self, content: Array, at_start: bool = False):
        page = mmap.PAGESIZE
        room = -(-max(content.nbytes, 1) // page) * page
        self._map = mmap.mmap(-1, room + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for fence in (base, base + page + room):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0
        offset = page if at_start else page + room - content.nbytes
        self.address = base + offset
        self.array = np.frombuffer(self._map, content.dtype, content.size, offset)
        self.array[:] = content


def run_native(
    kernel: Kernel,
    buffers: Mapping[str, Array],
    sizes: Mapping[str, int] | None = None,
    target: Target = HOST,
    threads: int = 1,
    at_start: bool = False,
) -> None:
    """Runs a kernel on flat arrays, one per parameter by name; outputs are written in place."""
    text = render_kernel(kernel, target, threaded=threads > 1)
    image = CodeImage(compile_objects([(kernel.name, text)], target), [kernel.name], target)
    memory = [Fenced(buffers[buffer.name], at_start) for buffer in kernel.parameters]
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(memory), *[ctypes.c_int64] * (len(kernel.sizes) + 1))
    numbers = [(sizes or {})[name] for name in kernel.sizes]
    function(image.address(kernel.name))(*(entry.address for entry in memory), *numbers, threads)
    for buffer, entry in zip(kernel.parameters, memory, strict=True):
        buffers[buffer.name][:] = entry.array
    image.close()
