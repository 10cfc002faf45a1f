"""Native code for other programs: an object file or a shared library, with a C header beside it.

Everything is in one object file that our own writer joins (backends/cpu/elf.py): the kernels, the code that calls them,
the weights as read-only data, the thread pool, and the two functions that the header declares. Only these are visible,
so that several models link into one program. No linker and no assembler is needed but for a shared library.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from shutil import which

from ..backends.cpu.elf import ObjectFile, data_object, join
from ..backends.cpu.entry import render_sizes_check
from ..backends.cpu.objects import compile_objects
from ..backends.cpu.runtime import ENTRY_POINT, pool_module
from ..ir.dims import symbols
from ..ir.errors import TargetError, UnsupportedError
from ..ir.graph import Value
from ..ir.program import ALIGNMENT
from ..ir.run_state import RECORD, STATE, WORDS, words_of
from ..ir.target import Target
from .binding import Port, plain
from .compiled import Compiled

LARGEST = 7 << 28
"""Bytes of weights that code reaches with the 32-bit distances of the small code model; some room is the code's."""

FIRST_CHECK = 16
"""The status that the first of a model's checks gives; those below are the interface's own."""

_C_TYPES = {"f32": "float", "f64": "double", "bool": "uint8_t"} | {
    f"{letter}{bits}": f"{prefix}int{bits}_t" for letter, prefix in (("i", ""), ("u", "u")) for bits in (8, 16, 32, 64)
}


def write_native(compiled: Compiled, path: str | os.PathLike[str], threaded: bool = True) -> tuple[Path, Path]:
    """Writes `path` (.o, or .so by the system's cc) and the header beside it; returns both.

    Without `threaded` all runs on the caller's thread, and the object file needs no library. Raises UnsupportedError
    for a model with sizes that depend on data, TargetError where the target's objects are not ELF, or where a shared
    library is wanted and cannot be linked.
    """
    path = Path(path)
    if path.suffix not in (".o", ".so"):
        raise UnsupportedError(f"{path}: native code is written as .o or .so, an artifact as .onnxc")
    if compiled.target.kind != "cpu":
        raise UnsupportedError(f"{path}: code for {compiled.target} is written as an artifact, .onnxc")
    header, name = path.with_suffix(".h"), c_identifier(path.stem)
    pieces = object_file(compiled, name, threaded)
    if path.suffix == ".o":
        _write(path, pieces)
    else:
        _link(compiled.target, pieces, path)
    header.write_text(c_header(compiled, name), encoding="utf-8")
    return path, header


def object_file(compiled: Compiled, name: str, threaded: bool = True) -> Iterable[bytes | memoryview]:
    """The pieces of an object file with `NAME_run` and `NAME_arena_bytes`."""
    if compiled.segments > 1 or any(compiled.ready):
        raise UnsupportedError(
            f"{compiled.name}: sizes that depend on data need memory in the middle of a run, which native code cannot"
            " ask for: save it as .onnxc"
        )
    target = compiled.target
    objects = [ObjectFile.parse(content) for content in compiled.objects]
    weights = f"{name}_weights"
    parts = list(compiled.weights.values())
    if sum(map(len, parts)) > LARGEST:
        raise UnsupportedError(f"{compiled.name}: more than {LARGEST >> 20} MiB of weights: save it as .onnxc")
    data, offsets = data_object(objects[0], weights, parts, ALIGNMENT)
    # For a system that it does not know the pool is the plain call, which needs nothing.
    pool = pool_module(target.triple if threaded else f"{target.architecture}-unknown-none")
    modules = [("interface", _interface(compiled, name, weights, offsets)), ("threads", pool)]
    made = [ObjectFile.parse(content) for content in compile_objects(modules, target)]
    exported = {f"{name}_run", f"{name}_arena_bytes"} | ({ENTRY_POINT} if threaded else set())
    return join([*objects, *made, data], exported)


def _interface(compiled: Compiled, name: str, weights: str, offsets: list[int]) -> str:
    """The LLVM module of the two functions that C calls.

    They copy the sizes, to which a run may add symbols of its own, and build the table of addresses.
    """
    symbol_count, given = max(len(compiled.symbols), 1), len(_input_symbols(compiled))
    inputs, outputs = len(compiled.inputs), len(compiled.outputs)
    entries = inputs + outputs + len(offsets) + bool(compiled.checks) + 1
    number = count()

    def address(array: str, element: str, index: int) -> tuple[str, str]:
        name = f"%a.{next(number)}"
        return name, f"  {name} = getelementptr inbounds {element}, ptr {array}, i64 {index}\n"

    def copied(source: str, target: str, element: str, items: int, first: int = 0) -> str:
        text = ""
        for i in range(items):
            (old, old_text), (new, new_text) = address(source, element, i), address(target, element, first + i)
            value = f"%v.{next(number)}"
            text += f"{old_text}{new_text}  {value} = load {element}, ptr {old}\n  store {element} {value}, ptr {new}\n"
        return text

    def stored(value: str, target: str, index: int) -> str:
        name, text = address(target, value.split()[0], index)
        return f"{text}  store {value}, ptr {name}\n"

    prepare = copied("%sizes", "%symbols", "i64", given)
    prepare += "".join(stored("i64 0", "%symbols", i) for i in range(given, symbol_count))
    table = copied("%inputs", "%table", "ptr", inputs) + copied("%outputs", "%table", "ptr", outputs, inputs)
    for i, (kind, offset) in enumerate(zip(compiled.constants, offsets, strict=True)):
        place = f"ptr getelementptr inbounds (i8, ptr @{weights}, i64 {offset})"
        place = "ptr @random_state" if kind == STATE else place  # what the program writes
        table += stored(place, "%table", inputs + outputs + i)
    words, status = words_of(len(compiled.checks)), "i64 0"
    faults = f"  %faults = alloca [{words} x i64]\n" if words else ""
    found = ""
    if words:
        # Zero by store, not by memset: the object file needs no library.
        table += "".join(stored("i64 0", "%faults", i) for i in (0, *range(1, words, RECORD)))
        table += stored("ptr %faults", "%table", inputs + outputs + len(offsets))
        for i in reversed(range(len(compiled.checks))):
            at, text = address("%faults", "i64", 1 + RECORD * i)
            value, bad, code = (f"%v.{next(number)}" for _ in range(3))
            found += f"{text}  {value} = load i64, ptr {at}\n  {bad} = icmp ne i64 {value}, 0\n"
            found += f"  {code} = select i1 {bad}, i64 {FIRST_CHECK + i}, {status}\n"
            status = f"i64 {code}"
    table += stored("ptr %arena", "%table", entries - 1)
    return f"""target triple = "{compiled.target.triple}"
@{weights} = external hidden constant i8, align {ALIGNMENT}
@random_state = internal global [{WORDS} x i64] zeroinitializer, align {ALIGNMENT}
declare void @onnxc_size_0(ptr, ptr)
declare void @onnxc_run_0(ptr, ptr, i64)

{render_sizes_check("sizes_fit", compiled.target, compiled.symbols[:given], compiled.assumptions, compiled.outputs)}
define i64 @{name}_arena_bytes(ptr %sizes) {{
  %symbols = alloca [{symbol_count} x i64]
  %result = alloca i64
{prepare}
  call void @sizes_fit(ptr %symbols, ptr %result)
  %fits = load i64, ptr %result
  %good = icmp ne i64 %fits, 0
  br i1 %good, label %measure, label %refuse
measure:
  call void @onnxc_size_0(ptr %symbols, ptr %result)
  %bytes = load i64, ptr %result
  ret i64 %bytes
refuse:
  ret i64 -1
}}

define i32 @{name}_run(ptr %inputs, ptr %outputs, ptr %sizes, ptr %arena, i32 %threads) {{
  %table = alloca [{entries} x ptr]
  %symbols = alloca [{symbol_count} x i64]
  %result = alloca i64
{faults}{prepare}
  call void @sizes_fit(ptr %symbols, ptr %result)
  %fits = load i64, ptr %result
  %good = icmp ne i64 %fits, 0
  br i1 %good, label %check, label %refuse
check:
  %place = ptrtoint ptr %arena to i64
  %odd = and i64 %place, {ALIGNMENT - 1}
  %aligned = icmp eq i64 %odd, 0
  br i1 %aligned, label %go, label %misplaced
go:
{table}
  %wanted = call i32 @llvm.smax.i32(i32 %threads, i32 1)
  %participants = sext i32 %wanted to i64
  call void @onnxc_run_0(ptr %table, ptr %symbols, i64 %participants)
{found}  %status = trunc {status} to i32
  ret i32 %status
refuse:
  ret i32 1
misplaced:
  ret i32 2
}}

attributes #0 = {{ nounwind }}
"""


def _input_symbols(compiled: Compiled) -> list[str]:
    """The symbols that a caller gives, in order; they come first among the program's."""
    return list(dict.fromkeys(s.name for value in compiled.inputs for dim in value.shape for s in symbols(dim)))


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    with open(path, "wb") as file:
        file.writelines(pieces)


def _link(target: Target, pieces: Iterable[bytes | memoryview], path: Path) -> None:
    linker = shlex.split(os.environ.get("CC") or "cc")
    host = Target.host()
    found = which(linker[0]) is not None
    if not found or target.architecture != host.architecture:
        why = f"{linker[0]} links for {host.architecture}" if found else f"there is no C compiler ({linker[0]})"
        raise TargetError(f"{path}: cannot be linked here for {target.triple}: {why}; write {path.stem}.o or .onnxc")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "model.o"
        _write(whole, pieces)
        # Idle workers of the pool sleep in the library's code: it must stay.
        command = [*linker, "-shared", "-Wl,-z,nodelete", f"-Wl,-soname,{path.name}", "-o", os.fspath(path), str(whole)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TargetError(f"{path}: {linker[0]} fails: {done.stderr.strip()}")


# The header


def c_identifier(text: str) -> str:
    """A name for C made of a file's: letters, digits and underscores; it begins with a letter."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", text)
    return name if re.match(r"[A-Za-z]", name) else f"model_{name}"


def _c_string(text: str) -> str:
    """A C literal of the UTF-8 bytes; what is not a plain character is octal."""
    plain = [chr(b) if 32 <= b < 127 and chr(b) not in '"\\?*' else f"\\{b:03o}" for b in text.encode()]
    return f'"{"".join(plain)}"'


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text).replace("*/", "* /").replace("/*", "/ *")


def c_header(compiled: Compiled, name: str) -> str:
    """The C (and C++) declarations of `object_file`, with what a caller must know of inputs, outputs and sizes."""
    from .. import __version__

    guard, names = name.upper(), [s.removeprefix("$") for s in _input_symbols(compiled)]
    rules = [f"{plain(a)} = {plain(b)}" for a, b in compiled.assumptions]
    ports = [("INPUT", compiled.inputs), ("OUTPUT", compiled.outputs)]
    found = [text.replace("{value}", "(value)").replace("{limit}", "(limit)") for text in compiled.checks]
    refusals = "".join(f";\n   {FIRST_CHECK + i}: {_comment(text)}" for i, text in enumerate(found)) + "."
    target = compiled.target
    lines = [
        f"/* {_comment(compiled.name)}, compiled by onnxc {__version__} for {target.triple}, {target.cpu}.",
        "",
        *(f"   {kind.lower()} {i}: {_comment(str(Port.of(v)))}" for kind, vs in ports for i, v in enumerate(vs)),
        *(f"   size {i}: {_comment(symbol)}" for i, symbol in enumerate(names)),
        *([f"   The sizes must keep: {_comment(', '.join(rules))}."] if rules else []),
        "*/",
        f"#ifndef {guard}_H",
        f"#define {guard}_H",
        "#include <stdint.h>",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        f"#define {guard}_INPUTS {len(compiled.inputs)}",
        f"#define {guard}_OUTPUTS {len(compiled.outputs)}",
        f"#define {guard}_SIZES {len(names)}",
        f"#define {guard}_ALIGNMENT {ALIGNMENT} /* bytes, of the arena */",
        *(line for kind, vs in ports for i, v in enumerate(vs) for line in _port_lines(f"{guard}_{kind}_{i}", v)),
        f"""
/* Bytes of the arena for these sizes; -1 where they do not fit the model. */
int64_t {name}_arena_bytes(const int64_t* sizes);

/* Runs the model. inputs[i] and outputs[i] point to contiguous arrays in row-major order, the caller's own; sizes hold
   the symbolic sizes in the order above (NULL if there are none); arena has {name}_arena_bytes(sizes) bytes at a
   multiple of {guard}_ALIGNMENT (NULL if 0). At most `threads` threads work on it. Calls with different arenas may run
   at once. Returns 0; 1 where the sizes do not fit the model; 2 where the arena is not aligned{refusals} */
int {name}_run(const void* const* inputs, void* const* outputs, const int64_t* sizes, void* arena, int threads);

#ifdef __cplusplus
}}
#endif
#endif
""",
    ]
    return "\n".join(lines)


def _port_lines(prefix: str, value: Value) -> list[str]:
    dtype = value.dtype
    c_type = _C_TYPES.get(dtype.name, {8: "uint8_t", 16: "uint16_t"}.get(dtype.bytes * 8, "unsigned char"))
    note = "" if dtype.name in _C_TYPES else f" /* the bits of {dtype.name}, {dtype.bytes} bytes each */"
    shape = ", ".join(map(str, Port.of(value).shape))
    return [
        f"#define {prefix}_NAME {_c_string(value.name)}",
        f"#define {prefix}_TYPE {c_type}{note}",
        f"#define {prefix}_RANK {len(value.shape)} /* [{_comment(shape)}] */",
    ]
