"""What PyCUDA does not wrap of the driver, by ctypes: graphs of a stream's work, and one stream waiting for another."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ....ir.errors import DeviceError
from .driver import Device, Stream

_RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED: other threads may allocate meanwhile."""
_NO_TIMING = 2
"""CU_EVENT_DISABLE_TIMING."""
_INVALIDATED = 901
"""CUDA_ERROR_STREAM_CAPTURE_INVALIDATED."""
LEGACY_STREAMS = (0, 1)
"""Handles of the default stream, with which every `Stream` is in order anyway."""

_POINTER, _HANDLE = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
_FUNCTIONS: dict[str, Sequence[Any]] = {
    "cuStreamBeginCapture_v2": (_POINTER, ctypes.c_int),
    "cuStreamEndCapture": (_POINTER, _HANDLE),
    "cuGraphInstantiateWithFlags": (_HANDLE, _POINTER, ctypes.c_ulonglong),
    "cuGraphLaunch": (_POINTER, _POINTER),
    "cuGraphDestroy": (_POINTER,),
    "cuGraphExecDestroy": (_POINTER,),
    "cuEventCreate": (_HANDLE, ctypes.c_uint),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuEventDestroy_v2": (_POINTER,),
    "cuStreamWaitEvent": (_POINTER, _POINTER, ctypes.c_uint),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    for name, arguments in _FUNCTIONS.items():
        getattr(library, name).argtypes = arguments
    return library


class CaptureBroken(DeviceError):
    """Another thread has done what breaks captures, such as waiting for the whole device."""


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_library(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(code, ctypes.byref(text))
        kind = CaptureBroken if code == _INVALIDATED else DeviceError
        raise kind(f"{name} failed: {(text.value or b'unknown error').decode()}")


def _made(name: str, *arguments: Any) -> int:
    """Calls a function that makes something; its handle."""
    handle = ctypes.c_void_p()
    _call(name, ctypes.byref(handle), *arguments)
    return handle.value or 0


def order(first: int, then: int) -> None:
    """Work queued from now on at the stream `then` waits for what is queued at `first` (handles of streams)."""
    event = _made("cuEventCreate", _NO_TIMING)
    try:
        _call("cuEventRecord", event, first)
        _call("cuStreamWaitEvent", then, event, 0)
    finally:
        _library().cuEventDestroy_v2(event)


class Graph:
    """The work that `record` queues at the stream it is given, to be launched as one.

    DeviceError where the driver refuses it, CaptureBroken where something has come in between. What `record` does must
    not depend on results; the addresses that it uses are part of the graph.
    """

    __slots__ = ("__weakref__", "_handle")

    def __init__(self, device: Device, stream: Stream, record: Callable[[Stream], None]) -> None:
        with device.exclusive():
            graph = ctypes.c_void_p()
            _call("cuStreamBeginCapture_v2", stream.handle, _RELAXED)
            try:
                record(stream)
            except BaseException as error:
                code = _library().cuStreamEndCapture(stream.handle, ctypes.byref(graph))
                if code == _INVALIDATED and isinstance(error, Exception):
                    raise CaptureBroken(str(error)) from error
                if not code:
                    _library().cuGraphDestroy(graph)
                raise
            _call("cuStreamEndCapture", stream.handle, ctypes.byref(graph))
            try:
                self._handle = _made("cuGraphInstantiateWithFlags", graph, 0)
            finally:
                _library().cuGraphDestroy(graph)
        device.owned(self, partial(_library().cuGraphExecDestroy, self._handle))

    def launch(self, stream: Stream) -> None:
        """Queues all of it."""
        _call("cuGraphLaunch", self._handle, stream.handle)
