"""Generated CUDA kernels compiled by g++ over an emulating prelude, and launched on numpy arrays.

    library = compile_source(render_kernels(kernels))
    library.launch("relu", grid=4, threads=256, shared_bytes=0, arguments=[x, y, x.size])

What a kernel writes is written to the arrays. EmulationError tells what it did wrong: a barrier that not all threads
reach, memory outside of its arguments, a deadlock; checked=True also finds data races and is some ten times slower.
The same text is compiled for a GPU: nothing in it is changed, it stands between the prelude and the launch functions.

Libraries are kept in ONNXC_CACHE_DIR (default: a folder among the temporary files) by their content. Launches that name
no seed (those of the stand-in driver) take ONNXC_EMULATOR_SEED and ONNXC_EMULATOR_THREADS of the environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxc

from .fences import Fenced

Array = npt.NDArray[Any]

HERE = Path(__file__).parent
DEVICE_PRELUDE = Path(onnxc.__file__).parent / "backends" / "cuda" / "prelude.cuh"
RUNTIME = ("fibers.cpp", "warp.cpp", "launch.cpp", "memory.cpp", "faults.cpp", "check.cpp")
HEADERS = ("runtime.h", "worker.h", "fibers.h", "device.h", "prelude.h")
MAGIC = b"ONNXCEMU"
"""What an image begins with that the stand-in driver loads; the path of a library follows, then a zero byte."""
_COMMON = ("-std=c++17", "-march=native", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-pthread")
# Fibers push to the stack that they leave, and are entered by jumps.
_X86 = ("-mno-red-zone", "-fcf-protection=none") if platform.machine() == "x86_64" else ()
_KERNEL = (
    # Kernels reinterpret memory and let integers wrap, as nvcc allows; every operation is rounded by itself.
    *("-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-fno-asynchronous-unwind-tables", "-w", "-g1"),
)
_CHECKED = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")
_SIZES = {
    "float": 4, "double": 8, "f16": 2, "bf16": 2, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8,
    "u64": 8, "bool": 1, "int": 4, "unsigned": 4, "void": 1,
}  # fmt: skip
_PACKED = {
    "int": "<i",
    "i32": "<i",
    "unsigned": "<I",
    "u32": "<I",
    "i64": "<q",
    "u64": "<Q",
    "float": "<f",
    "double": "<d",
}
_PROTOTYPE = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\((?P<bound>\d+)[^)]*\)\s*)?(?P<name>\w+)\s*\((?P<parameters>[^)]*)\)'
)
_COLLECTIVE = re.compile(
    r"\b(barrier|warp_barrier|shared_memory|shuffle\w*|ballot|copy_async\w*|load_matrix\w*|mma_\w+)\b"
)


class EmulationError(Exception):
    """What a kernel did wrong: kernel, block, thread, and the memory or the line of the text."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel; the C type is that of the elements where it is a pointer."""

    name: str
    type: str
    is_pointer: bool
    writable: bool

    @property
    def declaration(self) -> str:
        return f"{'' if self.writable else 'const '}{self.type}{'*' if self.is_pointer else ''}"


@dataclass(frozen=True)
class Prototype:
    """A kernel as its text declares it; one without collectives and shared memory runs without fibers."""

    name: str
    parameters: tuple[Parameter, ...]
    largest_block: int
    needs_fibers: bool


def prototypes(source: str) -> tuple[Prototype, ...]:
    """The kernels of a text. ValueError for a parameter of a type that is not known."""
    found = list(_PROTOTYPE.finditer(source))
    shared_text = source[: found[0].start()] if found else ""
    common = bool(_COLLECTIVE.search(_without_comments(shared_text)))
    result = []
    for position, match in enumerate(found):
        end = found[position + 1].start() if position + 1 < len(found) else len(source)
        body = _without_comments(source[match.end() : end])
        parameters = tuple(map(_parameter, filter(str.strip, match["parameters"].split(","))))
        fibers = common or bool(_COLLECTIVE.search(body))
        result.append(Prototype(match["name"], parameters, int(match["bound"] or 0), fibers))
    return tuple(result)


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def _parameter(text: str) -> Parameter:
    words = re.findall(r"\w+|\*", text)
    kept = [word for word in words if word not in ("const", "__restrict__", "*")]
    kind = "i64" if kept[:-1] == ["long", "long"] else " ".join(kept[:-1])
    if kind not in _SIZES:
        raise ValueError(f"parameter {text.strip()!r}: the type {kind!r} is not known here")
    return Parameter(kept[-1], kind, "*" in words, "const" not in words)


def compiler() -> str | None:
    """The C++ compiler that emulation needs, None where there is none."""
    return shutil.which("g++")


@functools.cache
def _machine() -> str:
    """What code compiled here depends on: the compiler and the processor's instructions."""
    version = subprocess.run([compiler() or "g++", "--version"], capture_output=True, text=True, check=True).stdout
    try:
        flags = re.search(r"^(flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        flags = None
    return version + (flags[0] if flags else "")


def _folder() -> Path:
    root = os.environ.get("ONNXC_CACHE_DIR") or Path(tempfile.gettempdir()) / f"onnxc-tests-{os.getuid()}"
    folder = Path(root) / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _prune() -> None:
    """Removes what no run has used for a week."""
    for path in _folder().glob("*.so"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > 7 * 24 * 3600:
                path.unlink()


def _built(stem: str, key: Sequence[str], arguments: Sequence[str], source: str | None = None) -> Path:
    """The library made by g++ with these arguments, from the cache where it was made before from the same."""
    digest = hashlib.blake2b("\0".join([_machine(), *key, *arguments]).encode(), digest_size=12).hexdigest()
    target = _folder() / f"{stem}-{digest}.so"
    with contextlib.suppress(FileNotFoundError):
        os.utime(target)  # in use: _prune keeps it
        return target
    with tempfile.TemporaryDirectory(dir=_folder()) as scratch:
        made = Path(scratch) / "made.so"
        text = Path(scratch) / "kernels.cpp"
        if source is not None:
            text.write_text(source)
        command = [compiler() or "g++", *([str(text)] if source is not None else []), *arguments, "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EmulationError(f"the text does not compile:\n{done.stderr}")
        os.replace(made, target)
    return target


@functools.cache
def runtime() -> Path:
    """The library that all compiled kernels share: scheduler, collectives, checks."""
    _prune()
    key = [(HERE / name).read_text() for name in (*HEADERS, *RUNTIME)]
    return _built("runtime", key, [*(str(HERE / name) for name in RUNTIME), *_COMMON, *_X86, "-O2"])


def _launch_function(kernel: Prototype, checked: bool) -> str:
    """What makes a kernel callable by CUDA's parameter buffer, whose layout is that of a struct."""
    members = " ".join(f"{p.declaration} p{i};" for i, p in enumerate(kernel.parameters))
    arguments = ", ".join(f"p.p{i}" for i in range(len(kernel.parameters)))
    call = f"const Parameters& p = *(const Parameters*)buffer; (void)p; ::{kernel.name}({arguments});"
    # The index is volatile: a report may be made, by a signal, from the middle of an inlined kernel.
    loop = "volatile unsigned& thread = emulator_place->thread->index.x; for (thread = 0; thread < count; ++thread)"
    flags = f"{kernel.largest_block}, {str(kernel.needs_fibers).lower()}, {str(checked).lower()}"
    return f"""
extern "C" __attribute__((visibility("default"), no_sanitize("thread"))) int emulated_{kernel.name}(
    const void* parameters, const unsigned* grid, const unsigned* block, unsigned long shared_bytes) {{
    struct Parameters {{ {members} char end; }};
    struct Code {{
        UNCHECKED static void one(const void* buffer) {{ {call} }}
        UNCHECKED static void all(const void* buffer, unsigned count) {{ {loop} {{ {call} }} }}
    }};
    static const EmulatorKernel kernel = {{"{kernel.name}", {flags}, Code::one, Code::all, &__ehdr_start, &_end}};
    return emulator_launch(&kernel, parameters, grid, block, shared_bytes);
}}"""


def _program(source: str, checked: bool) -> str:
    """The whole text for g++."""
    head = f"""#include "{HERE / "device.h"}"
#define ONNXC_EMULATED "{HERE / "prelude.h"}"
#include "{DEVICE_PRELUDE}"
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start, _end;
#define UNCHECKED __attribute__((no_sanitize("thread")))
#line 1 "kernels.cu"
"""
    return head + source + "".join(_launch_function(kernel, checked) for kernel in prototypes(source)) + "\n"


def without_prelude(source: str) -> str:
    """The kernels of a text for a GPU: what follows the prelude, if it begins with that."""
    return source.removeprefix(DEVICE_PRELUDE.read_text())


def _compiled(source: str, checked: bool) -> Path:
    source = without_prelude(source)
    key = [source, DEVICE_PRELUDE.read_text(), *((HERE / name).read_text() for name in HEADERS)]
    options = [*_COMMON, *_KERNEL, *(_CHECKED if checked else ()), "-O1", "-nostdlib", str(runtime()), "-lm", "-lc"]
    return _built("checked" if checked else "kernels", key, options, _program(source, checked))


@functools.lru_cache(maxsize=64)
def compile_source(source: str, checked: bool = False) -> Library:
    """The kernels of a text, with or without the device prelude in front. EmulationError where g++ refuses it."""
    return Library(_compiled(source, checked), without_prelude(source))


def image_of(source: str, checked: bool = False) -> bytes:
    """What the stand-in driver loads instead of a cubin."""
    return MAGIC + os.fsencode(_compiled(source, checked)) + b"\0"


class Library:
    """Compiled kernels. `path` is a shared library that exports `emulated_NAME` for each (see runtime.h)."""

    def __init__(self, path: Path, source: str):
        self.path = path
        self.kernels = {kernel.name: kernel for kernel in prototypes(source)}
        self._source = source
        self._code = ctypes.CDLL(str(path))
        self._code.emulator_error.restype = ctypes.c_char_p
        self._code.emulator_register_range.argtypes = [
            ctypes.c_void_p, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_int,
        ]  # fmt: skip
        self._code.emulator_forget_range.argtypes = [ctypes.c_void_p]

    def launch(
        self,
        name: str,
        grid: int,
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Array | int],
        seed: int = 0,
        os_threads: int = 1,
        at_start: bool = False,
    ) -> None:
        """Runs a kernel; arrays that it may write (no const) are changed in place.

        Arrays are copied to memory that ends at a page which may not be touched (with `at_start`: begins there), at
        addresses that are multiples of 256; the same array twice is one buffer. The seed chooses the order of blocks,
        warps and lanes: 0 as numbered, 1 backwards, others shuffled. TypeError where arguments do not fit parameters.
        """
        kernel = self.kernels[name]
        if len(arguments) != len(kernel.parameters):
            raise TypeError(f"{name} takes {len(kernel.parameters)} arguments, {len(arguments)} were given")
        if grid == 0:
            return
        memory: dict[int, tuple[Fenced, Array, bool, str]] = {}
        packed = b""
        for parameter, argument in zip(kernel.parameters, arguments, strict=True):
            if parameter.is_pointer:
                array = _checked_array(name, parameter, argument)
                fenced, _, writable, label = memory.get(id(array)) or (
                    Fenced(array, at_start),
                    array,
                    False,
                    parameter.name,
                )
                memory[id(array)] = (fenced, array, writable or parameter.writable, label)
                code, value = "<Q", fenced.address
            else:
                code, value = _PACKED[parameter.type], argument  # type: ignore[assignment]
            packed += b"\0" * (-len(packed) % struct.calcsize(code)) + struct.pack(code, value)
        self._run(name, packed, grid, threads, shared_bytes, (seed, os_threads), list(memory.values()))

    def _run(
        self,
        name: str,
        packed: bytes,
        grid: int,
        threads: int,
        shared_bytes: int,
        options: tuple[int, int],
        memory: Sequence[tuple[Fenced, Array, bool, str]],
    ) -> None:
        code = self._code
        try:
            for fenced, _, writable, label in memory:
                code.emulator_register_range(fenced.address, fenced.size, label.encode(), writable)
                fenced.protect(writable)
            code.emulator_configure(*options)
            three = ctypes.c_uint * 3
            failed = code[f"emulated_{name}"](
                packed, three(grid, 1, 1), three(threads, 1, 1), ctypes.c_ulong(shared_bytes)
            )
            report = code.emulator_error().decode()
        finally:
            for fenced, *_ in memory:
                code.emulator_forget_range(fenced.address)
        if failed:
            raise EmulationError(self._with_lines(report))
        for fenced, array, writable, label in memory:
            if fenced.is_overrun():
                raise EmulationError(f"kernel {name}: a write just outside of {label}, which has {array.nbytes} bytes")
            if writable:
                array.reshape(-1)[:] = fenced.array

    def _with_lines(self, report: str) -> str:
        """The report with lines instead of addresses of code, and the text of those lines."""
        report = re.sub(r"code (0x[0-9a-f]+)", lambda match: self._line_of(match[1]), report)
        lines = self._source.split("\n")
        named = sorted({int(number) for number in re.findall(r"\bline (\d+)", report)})
        return "\n".join([report, *(f"    {n}: {lines[n - 1].strip()}" for n in named if 0 < n <= len(lines))])

    def _line_of(self, code: str) -> str:
        command = ["addr2line", "-i", "-e", str(self.path), code]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        line = re.search(r"kernels\.cu:(\d+)", found)
        return f"line {line[1]}" if line else f"code {code}"


def _checked_array(name: str, parameter: Parameter, argument: Array | int) -> Array:
    if not isinstance(argument, np.ndarray):
        raise TypeError(f"{name}: {parameter.name} is a pointer, {argument!r} was given")
    if argument.dtype.itemsize != _SIZES[parameter.type]:
        raise TypeError(f"{name}: {parameter.name} points to {parameter.type}, an array of {argument.dtype} was given")
    if not argument.flags.c_contiguous:
        raise TypeError(f"{name}: the array for {parameter.name} is not contiguous")
    return argument
