"""Constants in large pages. A page of 4 KiB holds a thousand weights: for a matrix that is read once, translating
addresses and restarting the processor's prefetching at each page takes longer than the memory itself (GPT-2's step of
one token ran 1.4 times as fast in pages of 2 MiB)."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

PAGE_BYTES = 2 << 20
"""Of a large page, on x86-64 and (with small ones of 4 KiB) on AArch64."""
LEAST = PAGE_BYTES // 4
"""Bytes of constants from which on a large page is worth it: small pages of so many miss each other's places in a
second-level cache by chance alone."""
ALIGNMENT = 64
LET_GO = 32 << 20
"""Bytes read of mapped files after which their pages are let go."""

Array = np.ndarray[Any, Any]


class LargePages(mmap.mmap):
    """Zeroed memory for arrays, in large pages where the system has some; free when no array is left in it."""

    _end: int

    def __new__(cls, room: int) -> LargePages:
        made = super().__new__(cls, -1, room + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            made.madvise(mmap.MADV_HUGEPAGE)
        made._end = -np.frombuffer(made, np.uint8).ctypes.data % PAGE_BYTES
        return made

    def put(self, array: Array) -> Array:
        """A copy in this memory."""
        found = np.frombuffer(self, np.uint8, array.nbytes, self._end) if array.nbytes else np.empty(0, np.uint8)
        self._end += rounded(array.nbytes)
        copy = found.view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy


def rounded(size: int) -> int:
    """The bytes that an array of `size` bytes takes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def room_for(sizes: list[int]) -> LargePages | None:
    """Memory for arrays of these bytes; None where large pages are not worth it or unknown."""
    total = sum(map(rounded, sizes))
    return LargePages(total) if total >= LEAST and hasattr(mmap, "MADV_HUGEPAGE") else None


def aligned(array: Array) -> Array:
    """The array, copied where it does not begin with a line of the caches: vectors of twice as many would be read."""
    if array.ctypes.data % ALIGNMENT == 0:
        return array
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def in_large_pages(constants: Mapping[str, Array]) -> Mapping[str, Array]:
    """Constants, copied into large pages where they do not lie in such; pages of a file that hold them are let go."""
    if all(isinstance(_owner(array), LargePages) for array in constants.values()):
        return constants
    room = room_for([array.nbytes for array in constants.values()])
    if room is None:
        return constants
    found: dict[str, Array] = {}
    for name, array in constants.items():
        found[name] = room.put(array)
        _let_go(array)
    return found


def _owner(array: Array) -> object:
    """Whose memory an array shows."""
    found: object = array
    while True:
        inner = found.base if isinstance(found, np.ndarray) else found.obj if isinstance(found, memoryview) else None
        if inner is None:
            return found
        found = inner


class MappedFiles:
    """The mapped files that arrays show. What is read of them counts as this process's memory until it is let go."""

    def __init__(self, arrays: Iterable[Array]) -> None:
        owners = {id(owner): owner for array in arrays if type(owner := _owner(array)) is mmap.mmap}
        self._files = [file for file in owners.values() if hasattr(file, "madvise")]
        self._read = 0

    def used(self, size: int) -> None:
        """So many bytes of them, or made of them, are not needed again. From time to time all is let go."""
        self._read += size
        if self._read >= LET_GO:
            self._read = 0
            for file in self._files:
                file.madvise(mmap.MADV_DONTNEED)


def _let_go(array: Array) -> None:
    """Tells the system that what an array shows of a file is not needed now; it is read again where it is."""
    file = _owner(array)
    if type(file) is not mmap.mmap:
        return
    start = np.frombuffer(file, np.uint8).ctypes.data
    first = -(-(array.ctypes.data - start) // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (array.ctypes.data + array.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        file.madvise(mmap.MADV_DONTNEED, first, last - first)
