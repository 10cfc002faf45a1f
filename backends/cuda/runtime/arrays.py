"""Arrays in a GPU's memory: those that calls return, and those of other libraries, taken by DLPack or by
`__cuda_array_interface__` without a copy."""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ....ir.dtypes import BY_NAME, of_numpy
from ....ir.errors import ShapeError
from .driver import Block, Device, Stream
from .graphs import LEGACY_STREAMS, order
from .memory import Pool

CUDA, CUDA_MANAGED = 2, 13
"""DLPack's numbers of devices."""
_CODES = {"int": 0, "uint": 1, "float": 2, "complex": 5, "bool": 6}
_OWN_CODES = {"bf16": 4, "f8e4m3fn": 10, "f8e4m3fnuz": 11, "f8e5m2": 12, "f8e5m2fnuz": 13, "f8e8m0": 14}
"""DLPack's codes of kinds of elements, and of types that have one of their own. It packs those of less than 8 bits."""


class _Tensor(ctypes.Structure):
    """DLManagedTensor of DLPack's dlpack.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


@functools.cache
def _python() -> Any:
    """Functions of CPython; those that see capsules while they are destroyed take them as addresses."""
    api = ctypes.PyDLL(None)
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    api.PyCapsule_IsValid.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    api.Py_IncRef.argtypes = api.Py_DecRef.argtypes = [ctypes.c_void_p]
    return api


def _delete(address: int) -> None:
    """The deleter of tensors given away: releases what holds the array and the tensor itself."""
    _python().Py_DecRef(_Tensor.from_address(address).context)


def _drop_capsule(capsule: int) -> None:
    """The destructor of capsules: one that was taken has another name."""
    if _python().PyCapsule_IsValid(capsule, b"dltensor"):
        _delete(_python().PyCapsule_GetPointer(capsule, b"dltensor"))


@functools.cache
def _callbacks() -> tuple[Any, Any]:
    """The two functions above for C: the first may be called on any thread."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_delete), ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_drop_capsule)


class GpuArray:
    """An array in a GPU's memory, contiguous in C order: what a model returns that was given such arrays.

    PyTorch, CuPy, JAX and others take it without a copy (`torch.from_dlpack(array)`, `cupy.asarray(array)`), `numpy()`
    copies it to the host. Its content may be still being computed: whoever takes it waits on the GPU, not on the host.
    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        pool: Pool,
        block: Block,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        checked: Callable[[], None] = lambda: None,
    ) -> None:
        """`checked` raises the error of the run that makes the content, once that is done."""
        self.shape = shape
        self._checked = checked
        self.dtype = dtype
        self.device = device
        self.stream = stream
        self._block = block
        self._shared = [False]  # whether other libraries have its address
        weakref.finalize(self, _give_back, weakref.ref(pool), block, self._shared)

    @property
    def address(self) -> int:
        return self._block.address

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"<onnxc.GpuArray {self.dtype}{list(self.shape)} on {self.device.facts.name}>"

    def numpy(self) -> np.ndarray:
        """A copy on the host."""
        result = np.empty(self.shape, self.dtype)
        with self.device, self.device.errors("an array cannot be copied from the GPU"):
            self.stream.pycuda.synchronize()
            self._checked()
            if result.nbytes:
                self.device.driver.memcpy_dtoh(result.reshape(-1).view(np.uint8), self.address)
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array in a GPU's memory becomes numpy's by a copy only")
        return self.numpy().astype(dtype or self.dtype, copy=False)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype.isbuiltin != 1:
            raise AttributeError(f"the CUDA array interface has no {self.dtype}: use DLPack")
        self._shared[0] = True
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address if self.size else 0, False),
            "strides": None,
            "version": 3,
            "stream": self.stream.handle,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.device.ordinal

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule for work on the consumer's `stream` (None: the default stream; -1: the consumer waits itself)."""
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("an array in a GPU's memory is given away there and without a copy only")
        code, bits = _dlpack_type(self.dtype)
        if stream is not None and stream != -1 and stream not in LEGACY_STREAMS:
            with self.device:
                order(self.stream.handle, stream)
        # What the default stream does with the array is done before later work of this array's stream.
        if stream is not None and stream not in LEGACY_STREAMS:
            self._shared[0] = True
        shape = (ctypes.c_int64 * max(self.ndim, 1))(*self.shape)
        tensor = _Tensor(self.address, CUDA, self.device.ordinal, self.ndim, code, bits, 1, shape, None, 0, None, None)
        deleter, destructor = (ctypes.cast(callback, ctypes.c_void_p).value for callback in _callbacks())
        tensor.deleter = deleter
        holder = (self, tensor, shape)
        tensor.context = id(holder)
        _python().Py_IncRef(id(holder))
        return _python().PyCapsule_New(ctypes.addressof(tensor), b"dltensor", destructor)


def _dlpack_type(dtype: np.dtype[Any]) -> tuple[int, int]:
    """DLPack's code and bits of an element type. BufferError for one that it packs in another way or has not."""
    found = of_numpy(dtype)
    own = _OWN_CODES.get(found.name)
    if own is None and (dtype.isbuiltin != 1 or found.kind not in _CODES):
        raise BufferError(f"DLPack has no elements like {dtype} in memory")
    return _CODES[found.kind] if own is None else own, found.bits


def _give_back(pool: weakref.ref[Pool], block: Block, shared: Sequence[bool]) -> None:
    living = pool()
    if living is not None:
        living.give_back(block, shared[0])


class View(NamedTuple):
    """Memory of a GPU that belongs to another: its address, shape and strides in bytes (None: contiguous).

    `stream` is where its content is being computed (0: what uses the default stream is in order with that). `owner`
    keeps it alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...] | None = None
    stream: int = 0
    owner: Any = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def is_on_gpu(argument: Any) -> bool:
    """Whether an argument is an array in a GPU's memory."""
    if isinstance(argument, np.ndarray | np.generic):
        return False
    if isinstance(argument, GpuArray):
        return True
    if hasattr(argument, "__dlpack_device__"):
        return int(argument.__dlpack_device__()[0]) in (CUDA, CUDA_MANAGED)
    return hasattr(argument, "__cuda_array_interface__")


def view_of(argument: Any, device: Device) -> View:
    """An array in a GPU's memory as it lies there. ShapeError for one that cannot be taken."""
    if isinstance(argument, GpuArray):
        return View(argument.address, argument.shape, argument.dtype, None, argument.stream.handle, argument)
    if hasattr(argument, "__dlpack_device__"):
        _, ordinal = argument.__dlpack_device__()
        if ordinal != device.ordinal:
            raise ShapeError(f"an array lies on GPU {ordinal}: the model runs on GPU {device.ordinal}")
        # In order with the default stream is in order with ours.
        return _from_capsule(argument.__dlpack__(stream=1))
    return _from_interface(argument.__cuda_array_interface__, argument)


def _from_capsule(capsule: Any) -> View:
    """What lies in a capsule. The capsule stays unused: when it is collected, its own destructor frees the tensor."""
    if not _python().PyCapsule_IsValid(id(capsule), b"dltensor"):
        raise ShapeError("an array's __dlpack__ gives no tensor that can be taken")
    tensor = _Tensor.from_address(_python().PyCapsule_GetPointer(id(capsule), b"dltensor"))
    bits, code = tensor.bits, tensor.code
    kinds = {_CODES["int"]: "i", _CODES["uint"]: "u", _CODES["float"]: "f", _CODES["complex"]: "c"}
    own = next((BY_NAME[name] for name, number in _OWN_CODES.items() if number == code), None)
    if own is not None and own.bits == bits:
        dtype = own.numpy
    elif code == _CODES["bool"] and bits == 8:
        dtype = np.dtype(np.bool_)
    elif code in kinds and bits % 8 == 0 and tensor.lanes == 1:
        dtype = np.dtype(f"{kinds[code]}{bits // 8}")
    else:
        raise ShapeError(f"an array's elements are of DLPack's type {code} with {bits} bits: no input has such")
    shape = tuple(tensor.shape[i] for i in range(tensor.rank))
    strides = tuple(tensor.strides[i] * dtype.itemsize for i in range(tensor.rank)) if tensor.strides else None
    return View((tensor.data or 0) + tensor.byte_offset, shape, dtype, strides, 0, capsule)


def _from_interface(interface: dict[str, Any], owner: Any) -> View:
    strides = interface.get("strides")
    stream = interface.get("stream") or 0
    return View(
        interface["data"][0],
        tuple(interface["shape"]),
        np.dtype(interface["typestr"]),
        None if strides is None else tuple(strides),
        0 if stream in LEGACY_STREAMS else stream,
        owner,
    )


def is_contiguous(view: View) -> bool:
    """Whether the elements lie without gaps in C order."""
    if view.strides is None:
        return True
    expected = view.dtype.itemsize
    for size, stride in reversed(list(zip(view.shape, view.strides, strict=True))):
        if size == 0:
            return True
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def copy_contiguous(view: View, target: int, device: Device, stream: Stream) -> None:
    """Queues a copy of a view, element after element, to `target`."""
    driver, item = device.driver, view.dtype.itemsize
    if view.nbytes == 0:
        return
    if is_contiguous(view):
        driver.memcpy_dtod_async(target, view.address, view.nbytes, stream.pycuda)
        return
    assert view.strides is not None
    axes = [(size, stride) for size, stride in zip(view.shape, view.strides, strict=True) if size != 1]
    width = item
    while axes and axes[-1][1] == width:
        width *= axes.pop()[0]
    # One copy moves rows of `width` bytes that lie apart by the innermost stride; a copy's rows cannot go backwards.
    rows, pitch = axes.pop() if axes and axes[-1][1] > width else (1, width)
    for index in np.ndindex(*(size for size, _ in axes)):
        source = view.address + sum(i * stride for i, (_, stride) in zip(index, axes, strict=True))
        copy = driver.Memcpy2D()
        copy.set_src_device(source)
        copy.set_dst_device(target)
        copy.src_pitch, copy.dst_pitch, copy.width_in_bytes, copy.height = pitch, width, width, rows
        copy(stream.pycuda)
        target += width * rows
