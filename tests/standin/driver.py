"""The stand-in `libcuda.so.1`: built by g++ and loaded before PyCUDA's own modules are, which then run on it.

A process has one driver for good: either this or NVIDIA's. `available()` loads it and tells why it cannot.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
SONAME = "libcuda.so.1"


def cache_folder() -> Path:
    """Where what tests build is kept from one run to the next."""
    root = os.environ.get("ONNXC_CACHE_DIR") or os.path.join(tempfile.gettempdir(), f"onnxc-tests-{os.getuid()}")
    folder = Path(root) / "standin"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build() -> Path:
    """The library, built where it is not yet. It has every symbol that PyCUDA's extension module asks for; those that
    the stand-in lacks answer that the operation is not supported."""
    spec = importlib.util.find_spec("pycuda._driver")
    assert spec is not None and spec.origin is not None
    listed = subprocess.run(["nm", "-D", "--undefined-only", spec.origin], capture_output=True, text=True, check=True)
    wanted = sorted({line.split()[-1] for line in listed.stdout.splitlines() if line.split()[-1].startswith("cu")})
    text = (HERE / "libcuda.cpp").read_text()
    missing = [name for name in wanted if f"DRIVER({name}," not in text and f"DRIVER({name})" not in text]
    text += "".join(f"DRIVER({name}) {{ return 801; }}\n" for name in missing)
    key = (HERE / "device.h").read_bytes() + text.encode()
    library = cache_folder() / hashlib.blake2b(key, digest_size=8).hexdigest() / SONAME
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        temporary = library.with_name(f"{os.getpid()}.so")
        command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,-soname,{SONAME}"]
        command += [f"-I{HERE}", "-x", "c++", "-", "-o", str(temporary), "-ldl", "-lpthread"]
        subprocess.run(command, input=text, text=True, check=True)
        os.replace(temporary, library)
    return library


@functools.cache
def available() -> str:
    """Loads the stand-in; what is missing where that cannot be, else an empty text."""
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if importlib.util.find_spec("pycuda") is None:
        return "PyCUDA is not installed"
    if "pycuda._driver" not in sys.modules:
        ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    try:
        _library()
    except (OSError, AttributeError):
        return "PyCUDA runs on a real driver in this process"
    return ""


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(SONAME)
    library.standin_counter.restype = ctypes.c_long
    library.standin_counter.argtypes = [ctypes.c_char_p]
    library.standin_message.restype = ctypes.c_char_p
    library.standin_fail.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_long]
    library.standin_set_memory.argtypes = [ctypes.c_size_t]
    return library


def counter(name: str) -> int:
    """How often something was done, or how much of it there is: see `counters` in libcuda.cpp."""
    return int(_library().standin_counter(name.encode()))


def message() -> str:
    """What the last kernel that failed has said."""
    return str(_library().standin_message().decode())


def set_memory(size: int) -> None:
    """The bytes of the device's memory, until `reset`."""
    _library().standin_set_memory(size)


@contextlib.contextmanager
def failing(point: str, after: int = 0, count: int = 1) -> Iterator[None]:
    """Inside, the uses `after` to `after + count - 1` of a point fail: alloc, pinned, copy, launch, fault, instantiate
    or graph_launch. A failed allocation is tried again by PyCUDA, so that it takes two to be seen."""
    _library().standin_fail(point.encode(), after, count)
    try:
        yield
    finally:
        reset()


def reset() -> None:
    """Forgets failures: those that were asked for and those that happened."""
    _library().standin_reset()
