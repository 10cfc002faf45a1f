"""Memory whose neighbouring pages may not be touched."""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT = 256
"""Bytes that addresses are a multiple of: what a GPU's allocator gives."""
_FILL = 0xFF
_NOTHING = 0  # the system's PROT_NONE


class Fenced:
    """A copy of an array between two pages that may not be touched: it ends as near to the second as its alignment
    allows (with `at_start`: begins behind the first). What is left between is filled, so that writes there are seen
    and floats read there are NaN.
    """

    def __init__(self, content: npt.NDArray[Any], at_start: bool = False):
        page = mmap.PAGESIZE
        self.size = content.nbytes
        self._room = -(-max(self.size, 1) // page) * page
        self._map = mmap.mmap(-1, self._room + 2 * page)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + page
        offset = 0 if at_start else self._room - -(-self.size // ALIGNMENT) * ALIGNMENT
        self.address = self._base + offset
        everything = np.frombuffer(self._map, np.uint8, self._room, page)
        self._outside = everything[:offset], everything[offset + self.size :]
        for part in self._outside:
            part[:] = _FILL
        self.array = everything[offset : offset + self.size].view(content.dtype)
        self.array[:] = content.reshape(-1)
        for fence in (self._base - page, self._base + self._room):
            _protect(fence, page, _NOTHING)

    def protect(self, writable: bool) -> None:
        """Makes the memory read-only, or not."""
        _protect(self._base, self._room, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))

    def is_overrun(self) -> bool:
        """Whether something was written between the array and the pages around it."""
        return any(bool((part != _FILL).any()) for part in self._outside)


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _protect(address: int, size: int, protection: int) -> None:
    if _library().mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection) != 0:
        raise OSError(f"mprotect of {size} bytes failed")
