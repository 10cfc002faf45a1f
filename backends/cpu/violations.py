"""What kernels that check themselves tell (see `bounds`), for who runs them. It imports little: each model loads it."""

from __future__ import annotations

import ctypes
import os

from ...ir.errors import AccessError

VIOLATION = "onnxc_violation"
"""Words that the first part of a program holds: the address of a message, the offset in bytes, the buffer's bytes."""


def wanted() -> bool:
    """Whether kernels are to check themselves."""
    return os.environ.get("ONNXC_CHECK_BOUNDS", "") not in ("", "0")


def raise_violation(address: int) -> None:
    """AccessError where a kernel has told one at the address of `VIOLATION`, which is cleared."""
    words = (ctypes.c_int64 * 3).from_address(address)
    message, offset, size = words
    if message:
        words[0] = 0
        raise AccessError(f"{ctypes.string_at(message).decode()}, at byte {offset} of {size}")
