"""CUDA C to machine code by NVRTC: kernel by kernel, in parallel, and only once for each text and architecture.

NVRTC needs neither a GPU nor a driver. Each kernel is a translation unit of its own, behind the prelude: that costs
some 15 ms a kernel, but units compile in parallel, and a kernel that was compiled before comes from the cache whatever
model it is in.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path

from ...ir.errors import OnnxcError, TargetError
from ..object_cache import ObjectCache, key_of, usable_processors

PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
"""Distributions that bring the library."""
_MAJORS = (13, 12)
_OPTIONS = (
    "--std=c++17",
    "-default-device",
    # Arithmetic as the kernel language has it: subnormals stay, divisions and roots are rounded correctly.
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--fmad=true",
    "--ptxas-options=-v",
)
_SINCE = (((12, 9), "-minimal"),)
"""Options that older versions do not know: without CUDA's runtime declarations a unit costs 7 ms less."""


@dataclass(frozen=True)
class Resources:
    """What a kernel takes. Bytes: a thread's local memory (`stack_bytes`) and its stores and loads there of registers
    that did not suffice; a block's static shared memory; constants."""

    registers: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    shared_bytes: int = 0
    barriers: int = 0
    constant_bytes: int = 0


@dataclass(frozen=True)
class CompileResult:
    """A cubin, or PTX as text that ends with a zero byte; what the compilers said."""

    image: bytes
    log: str

    @property
    def resources(self) -> dict[str, Resources]:
        """By the name of the kernel; none for PTX, in which registers are not assigned yet."""
        return parse_resources(self.log)


def compile_kernels(
    prelude: str,
    kernels: Mapping[str, str],
    architecture: str,
    progress: Callable[[int, int], None] | None = None,
    jobs: int | None = None,
    objects: ObjectCache | None = None,
) -> dict[str, CompileResult]:
    """Each kernel behind the prelude as an image of its own: "sm_90" gives cubins, "compute_90" PTX.

    `kernels` has their texts by name, `progress` is told how many of how many are done; up to `jobs` threads compile,
    by default as many as there are CPUs. Raises TargetError where NVRTC is missing or does not know the architecture,
    OnnxcError, with the lines it is about, where it rejects a kernel.
    """
    objects = objects or ObjectCache.default()
    nvrtc = library()
    nvrtc.check(architecture)
    results: dict[str, CompileResult] = {}
    missing: dict[str, str] = {}

    def finish(name: str, result: CompileResult) -> None:
        results[name] = result
        if progress is not None:
            progress(len(results), len(kernels))

    keys = {name: key_of(*nvrtc.recipe, architecture, prelude, text) for name, text in kernels.items()}
    for name, key in keys.items():
        stored = objects.load(key)
        if stored is None:
            missing[name] = kernels[name]
        else:
            log, _, image = stored.partition(b"\0")
            finish(name, CompileResult(image, log.decode()))
    with ThreadPoolExecutor(min(jobs or usable_processors(), len(missing)) or 1) as threads:
        largest_first = sorted(missing, key=lambda name: -len(missing[name]))
        futures = {
            threads.submit(nvrtc.compile, f"{prelude}\n{missing[name]}", architecture, name): name
            for name in largest_first
        }
        try:
            for future in as_completed(futures):
                name, result = futures[future], future.result()
                objects.store(keys[name], result.log.encode() + b"\0" + result.image)
                finish(name, result)
        finally:
            threads.shutdown(cancel_futures=True)
    if missing:
        objects.keep_within_limit()
    return {name: results[name] for name in kernels}


def compile_source(source: str, architecture: str, name: str = "kernels") -> CompileResult:
    """A whole translation unit, not from the cache; raises as `compile_kernels` does."""
    nvrtc = library()
    nvrtc.check(architecture)
    return nvrtc.compile(source, architecture, name)


def compile_image(source: str, architecture: str) -> bytes:
    """The image that `compile_source` makes."""
    return compile_source(source, architecture).image


def is_available() -> bool:
    """Whether NVRTC is installed."""
    try:
        library()
    except TargetError:
        return False
    return True


def parse_resources(log: str) -> dict[str, Resources]:
    """What ptxas reports of each kernel with `-v`; functions that a kernel calls count with it."""
    found: dict[str, Resources] = {}
    kernel = ""
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '([^']+)'", line):
            kernel = entry[1]
            found[kernel] = Resources()
        elif (numbers := _FRAME.search(line)) and kernel:
            stack, stores, loads = map(int, numbers.groups())
            old = found[kernel]
            found[kernel] = replace(
                old,
                stack_bytes=old.stack_bytes + stack,
                spill_store_bytes=old.spill_store_bytes + stores,
                spill_load_bytes=old.spill_load_bytes + loads,
            )
        elif (registers := re.search(r"Used (\d+) registers", line)) and kernel:
            found[kernel] = replace(
                found[kernel],
                registers=int(registers[1]),
                barriers=_sum(r"used (\d+) barriers", line),
                shared_bytes=_sum(r"(\d+) bytes smem", line),
                constant_bytes=_sum(r"(\d+) bytes cmem", line),
            )
    return found


_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def _sum(pattern: str, line: str) -> int:
    return sum(map(int, re.findall(pattern, line)))


class Nvrtc:
    """The library, loaded. Its functions may be called by several threads at once."""

    def __init__(self, path: str) -> None:
        self._functions = ctypes.CDLL(path)
        self._functions.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        self.options = (*_OPTIONS, *(option for version, option in _SINCE if self.version >= version))

    @property
    def recipe(self) -> tuple[str, ...]:
        """What an image depends on besides source and architecture."""
        return ("nvrtc", str(self.version), *self.options)

    def architectures(self) -> tuple[int, ...]:
        """The compute capabilities that it compiles for: 90 for "sm_90"."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return tuple(numbers)

    def check(self, architecture: str) -> None:
        """Raises TargetError for an architecture that it does not compile for."""
        wanted = re.fullmatch(r"(?:sm|compute)_(\d+)[af]?", architecture)
        if wanted is None or int(wanted[1]) not in self.architectures():
            known = ", ".join(f"sm_{number}" for number in self.architectures())
            version = ".".join(map(str, self.version))
            raise TargetError(f"NVRTC {version} does not compile for {architecture}; it knows {known}")

    def compile(self, source: str, architecture: str, name: str) -> CompileResult:
        """The image of a translation unit. Raises OnnxcError where it is wrong."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None)
        try:
            options = [f"--gpu-architecture={architecture}".encode(), *(option.encode() for option in self.options)]
            array = (ctypes.c_char_p * len(options))(*options)
            status = self._functions.nvrtcCompileProgram(program, len(options), array)
            log = self._content("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if status:
                ptx = compile_image(source, architecture.replace("sm_", "compute_")) if _PTX_LINE.search(log) else b""
                raise OnnxcError(
                    f"NVRTC rejects kernel {name} for {architecture}: this is a fault of onnxc, please report it.\n"
                    f"{log.strip() or self._meaning(status)}\n{_excerpts(log, source, ptx.decode())}"
                )
            return CompileResult(self._content("CUBIN" if architecture.startswith("sm_") else "PTX", program), log)
        finally:
            self._functions.nvrtcDestroyProgram(ctypes.byref(program))

    def _content(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, content)
        return content.raw

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._functions, name)(*arguments)
        if status:
            raise OnnxcError(f"{name} failed: {self._meaning(status)}")

    def _meaning(self, status: int) -> str:
        text: bytes = self._functions.nvrtcGetErrorString(status)
        return text.decode()


@cache
def library() -> Nvrtc:
    """NVRTC, from a package of this environment, a CUDA toolkit or where the system has its libraries.

    Raises TargetError where it is nowhere, saying what to install.
    """
    reasons = []
    for path in _candidates():
        try:
            # The library opens its builtins by name alone: it finds them, in whatever folder, if they are loaded.
            for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so*")) if "/" in path else ():
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return Nvrtc(path)
        except (OSError, AttributeError, OnnxcError) as error:
            if "/" in path:
                reasons.append(f"\n{path}: {error}")
    raise TargetError(
        "CUDA C is compiled by NVRTC, which is not here. Install it by `pip install nvidia-cuda-nvrtc` (for drivers "
        "before 580 nvidia-cuda-nvrtc-cu12), or set CUDA_HOME to a CUDA toolkit's folder" + "".join(reasons)
    )


def packaged_files(packages: tuple[str, ...], pattern: str) -> Iterator[str]:
    """Files whose names match, of those of the distributions that are installed."""
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            files = metadata.distribution(package).files or ()
            yield from (str(file.locate()) for file in files if re.fullmatch(pattern, file.name))


def toolkit_folders() -> Iterator[Path]:
    """Folders that may hold a CUDA toolkit."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(name):
            yield Path(folder)
    yield Path("/usr/local/cuda")


def _candidates() -> Iterator[str]:
    """Places to try the library from, the best first."""
    yield from packaged_files(PACKAGES, r"libnvrtc\.so\.\d+")
    for folder in toolkit_folders():
        for libraries in ("lib64", "lib"):
            yield from (str(folder / libraries / f"libnvrtc.so.{major}") for major in _MAJORS)
    yield from (f"libnvrtc.so.{major}" for major in _MAJORS)


_ERROR_LINE = re.compile(r"\((\d+)\): (?:catastrophic )?error")
_PTX_LINE = re.compile(r"ptx input, line (\d+); error")


def _excerpts(log: str, source: str, ptx: str) -> str:
    """The lines that the log complains of, with what is around them."""
    parts = []
    for text, pattern in ((source, _ERROR_LINE), (ptx, _PTX_LINE)):
        lines = text.splitlines()
        for number in sorted({int(found) for found in pattern.findall(log)})[:3]:
            first = max(number - 3, 1)
            around = enumerate(lines[first - 1 : number + 2], first)
            parts.append("\n".join(f"{'>' if at == number else ' '} {at:5} | {line}" for at, line in around))
    return "\n\n".join(parts)
