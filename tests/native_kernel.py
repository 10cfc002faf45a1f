"""Kernels compiled and called on numpy arrays, which lie between pages that must not be touched."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxc.backends.cpu.jit import CodeImage
from onnxc.backends.cpu.llvm import render_kernel
from onnxc.backends.cpu.objects import compile_objects
from onnxc.ir import loops as k
from onnxc.ir import scalars as s
from onnxc.ir.dims import symbol
from onnxc.ir.dtypes import BF16, BOOL, F16, F32, F64, I8, I16, I32, I64, U8, U16, U32, U64, DType
from onnxc.ir.scalars import Buffer, Scalar, load
from onnxc.ir.target import Target

Array = npt.NDArray[Any]

INTEGERS = (I8, I16, I32, I64, U8, U16, U32, U64)
FLOATS = (F32, F64, F16, BF16)
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
    kernel: k.Kernel,
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


Statements = Sequence[k.Statement]


def kernel(body: Statements, *buffers: Buffer, outputs: int = 1, sizes: tuple[str, ...] = (), **more: Any) -> k.Kernel:
    """A kernel that writes the first `outputs` buffers."""
    return k.Kernel("k", buffers, tuple(buffer.name for buffer in buffers[:outputs]), sizes, tuple(body), **more)


def samples(dtype: DType, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Values of all kinds, the awkward ones first."""
    random = np.random.default_rng(seed)
    if dtype == BOOL:
        return random.integers(0, 2, count).astype(np.bool_)
    if dtype.is_float:
        special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.5, 2.5, 0.5, -0.5, 3.5, 8388609.0, 1e-7, 6e-8]
        values = np.concatenate([special, random.normal(0, 1, count), random.normal(0, 1000, count)])
        with np.errstate(over="ignore"):
            return random.permutation(values)[:count].astype(dtype.numpy)
    low, high = (int(limit) for limit in dtype.limits)
    values = [low, high, 0, 1, 2, 3, high - 1, low + 1, *([-1] if low else [])]
    wide = [int(random.integers(low, high, dtype=dtype.numpy, endpoint=True)) for _ in range(count)]
    small = [int(v) for v in random.integers(max(low, -9), 10, count)]
    picked = [(values + wide + small)[i] for i in random.permutation(len(values) + 2 * count)[:count]]
    return np.array(picked, dtype.numpy)


BINARY = {
    "float": ("add", "sub", "mul", "div", "min", "max", "lt", "le", "eq", "ne"),
    "int": ("add", "sub", "mul", "div", "rem", "min", "max", "and", "or", "xor", "shl", "shr", "lt", "le", "eq", "ne"),
    "bool": ("and", "or", "xor", "eq", "ne"),
}
BINARY["uint"] = BINARY["int"]
UNARY = {
    "float": ("neg", "abs", "sqrt", "floor", "ceil", "round", "trunc", "isnan"),
    "int": ("neg", "abs", "not"),
    "uint": ("not", "popcount"),
    "bool": ("not",),
}


def arithmetic(dtype: DType, *lanes: int) -> list[Scalar]:
    """Every operation on a type."""
    a, b = Buffer("a", dtype, 64), Buffer("b", dtype, 64)
    values: list[Scalar] = []
    for count in lanes:
        x, y = load(a, 0, count), load(b, 0, count)
        values += [s.binary(op, x, y) for op in BINARY[dtype.kind]]
        values += [s.unary(op, x) for op in UNARY[dtype.kind]]
    if dtype.is_integer:
        for constant in (3, 7, 8, int(dtype.limits[0]) or 5):
            values += [s.binary(op, load(a, 0, 16), s.const(constant, dtype)) for op in ("div", "rem")]
        values += [s.binary(op, load(a, 0, 16), s.const(5, dtype)) for op in ("shl", "shr")]
        values += [s.binary("pow", load(a, 0, count), load(b, 0, count)) for count in (1, 4)]
    return values


N = symbol("n", 0, 1000)
V = k.index_symbol("v", N)
X, Y = Buffer("x", F32, N), Buffer("y", F32, N)


def f32(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(0, 1, int(np.prod(shape))).astype(np.float32)
